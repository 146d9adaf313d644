# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules that `make check` cannot express: which modules write files, and how large things may be."""

from __future__ import annotations

import ast
import re
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

WRITERS = {name for name in MODULES if name.startswith("files.")}
WRITERS |= {"client.part"}  # files on the client's machine need no durability
MAX_MODULES = 6  # in the root
MAX_FILES = 12  # in any other folder

WRITING_CALLS = {
    "os": {
        "rename", "replace", "unlink", "remove", "rmdir", "removedirs", "renames", "mkdir", "makedirs", "link",
        "symlink", "truncate", "ftruncate", "pwrite", "fsync", "fdatasync", "mkfifo", "mknod",
    },
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move"},
}  # fmt: skip
WRITING_METHODS = {"write_text", "write_bytes", "touch", "rename", "unlink", "rmdir", "mkdir", "symlink_to"}
WRITING_FLAGS = {"O_CREAT", "O_WRONLY", "O_RDWR", "O_APPEND", "O_TRUNC", "O_TMPFILE"}

SILENCED = re.compile(r"type: ignore|noqa")
WITH_REASON = re.compile(r"# (type: ignore\[[a-z, -]+\]  # |noqa: [A-Z0-9, ]+  \()\w")


def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


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
            if (
                called.attr in WRITING_CALLS.get(owner, ())
                or (called.attr == "open" and owner not in ("os", "self._tree") and writing_mode(node))
                or (called.attr in WRITING_METHODS and owner not in ("os", "durable", "shutil"))
            ):
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
def test_public_names_are_documented(name):
    tree = parsed(name)
    assert ast.get_docstring(tree), f"{name} does not say what it is"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name} has no docstring"


FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_small_and_has_a_docstring(folder):
    modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= (MAX_MODULES if folder == PACKAGE else MAX_FILES)
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_left_unimplemented(name):
    assert "NotImplementedError" not in MODULES[name].read_text()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_suppression_has_a_reason(name):
    silenced = [line for line in MODULES[name].read_text().splitlines() if SILENCED.search(line)]
    assert [line for line in silenced if not WITH_REASON.search(line)] == []


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
