"""The layers of the code: who may import whom, and who may write files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kci_storage

PACKAGE = Path(kci_storage.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}

PURE = {
    "archives.unpacking",
    "errors",
    "http_semantics",
    "keys",
    "media",
    "pages.csp",
    "pages.kinds",
    "problems",
    "retention.tags",
    "sizes",
}
SERVICES = {
    "archives.receiving",
    "archives.files",
    "archives.run",
    "archives.staging",
    "retention.expire",
    "upload",
    "forms",
    "digests",
    "objects",
    "fill",
    "fetch",
    "cache",
    "evict",
    "misses",
    "freshness",
    "flights",
    "locks",
    "pages.directory",
}
VIEWS = {name for name in MODULES if name.startswith("blueprints.")}
DRIVERS = {name for name in MODULES if name.startswith("drivers.")}
CLIENT = {name for name in MODULES if name.startswith("client.")}
WRITERS = {"durable", "client.part"}  # the client's files are on another machine, and need no durability

# What only certain modules may import, of other people's.
OWNERS = {
    "azure": {"drivers.azure"},
    "flask": {"app"} | VIEWS,
    "prometheus_client": {"metrics"},
    "prometheus_flask_exporter": {"metrics"},
    "jwt": {"auth"},
    "portalocker": {"durable"},
    "gunicorn": {"worker", "net.connection", "net.request", "net.response"},
    "tqdm": {"client.progress"},
    "shtab": {"client.completion"},
}

WRITING_CALLS = {
    "os": {
        "rename", "replace", "unlink", "remove", "rmdir", "removedirs", "renames", "mkdir", "makedirs", "link",
        "symlink", "truncate", "ftruncate", "pwrite", "fsync", "fdatasync", "mkfifo", "mknod",
    },
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move"},
}  # fmt: skip
WRITING_METHODS = {"write_text", "write_bytes", "touch", "rename", "unlink", "rmdir", "mkdir", "symlink_to"}
WRITING_FLAGS = {"O_CREAT", "O_WRONLY", "O_RDWR", "O_APPEND", "O_TRUNC", "O_TMPFILE"}


def imports(tree: ast.AST) -> Iterator[str]:
    """What a module imports when it runs, dotted; what it needs for type hints alone does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for imported in imports(parsed(name)):
        if imported.startswith("kci_storage."):
            path = imported.removeprefix("kci_storage.")
            found |= {module for module in (path, path.rpartition(".")[0]) if module in MODULES}
    return found


def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_other_peoples_packages_stay_where_they_belong(name):
    for imported in imports(parsed(name)):
        owners = OWNERS.get(imported.partition(".")[0])
        assert owners is None or name in owners, f"{name} imports {imported}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_know_no_service(name):
    assert own_imports(name) <= PURE


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_services_know_no_view_and_no_certain_driver(name):
    known = own_imports(name)
    assert not known & VIEWS
    assert known & DRIVERS <= {"drivers.base"}
    assert not known & {"app", "metrics", "worker", "serving", "downloads", "sending", "transport"}


@pytest.mark.parametrize("name", sorted(DRIVERS))
def test_drivers_know_no_service(name):
    allowed = DRIVERS | PURE | {"config", "durable", "locks"}
    assert own_imports(name) <= allowed, own_imports(name) - allowed


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_views_reach_the_backend_through_services(name):
    assert own_imports(name) & DRIVERS <= {"drivers.base"}
    assert not own_imports(name) & {"cache", "fill", "durable", "locks"}


@pytest.mark.parametrize("name", sorted(CLIENT))
def test_the_client_knows_nothing_of_the_server_but_what_a_key_may_be(name):
    assert own_imports(name) <= CLIENT | {"keys", "errors", "sizes"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - CLIENT))
def test_the_server_knows_nothing_of_the_client(name):
    assert own_imports(name) & CLIENT <= ({"client.commands"} if name == "cli" else set())


def writes(tree: ast.AST) -> Iterator[str]:
    """The calls in a module that could write to the file system."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in WRITING_FLAGS:
            yield ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open" and writing_mode(node):
            yield ast.unparse(node)
        elif isinstance(called, ast.Attribute):
            owner = ast.unparse(called.value)
            if called.attr in WRITING_CALLS.get(owner, ()):
                yield ast.unparse(node)
            elif called.attr == "open" and owner not in ("os", "self._tree") and writing_mode(node):
                yield ast.unparse(node)
            elif called.attr in WRITING_METHODS and owner not in ("os", "durable", "shutil"):
                yield ast.unparse(node)


def writing_mode(call: ast.Call) -> bool:
    """Whether an open() may write."""
    modes = [argument.value for argument in call.args[:2] if isinstance(argument, ast.Constant)]
    modes += [keyword.value.value for keyword in call.keywords if keyword.arg == "mode"]
    return any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)


@pytest.mark.parametrize("name", sorted(set(MODULES) - WRITERS))
def test_files_are_written_in_one_place(name):
    assert list(writes(parsed(name))) == []


@pytest.mark.parametrize(
    "code",
    [
        "open('a', 'w')", "open('a', mode='ab')", "path.open('x')", "os.open('a', os.O_CREAT)", "os.rename('a', 'b')",
        "path.write_bytes(b'')", "path.mkdir()", "shutil.move('a', 'b')",
    ],
)  # fmt: skip
def test_writing_is_recognised(code):
    assert list(writes(ast.parse(code)))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_is_public_is_documented(name):
    tree = parsed(name)
    assert ast.get_docstring(tree), f"{name} does not say what it is"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_part_is_left_out(name):
    assert "NotImplementedError" not in MODULES[name].read_text()


def test_most_functions_are_short():
    """Nine in ten have fewer than 30 lines, and none is a page."""
    lengths = [
        node.end_lineno - node.lineno + 1
        for name in MODULES
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.FunctionDef)
    ]
    assert sum(length < 30 for length in lengths) > 0.9 * len(lengths)
    assert max(lengths) < 80
