# SPDX-License-Identifier: LGPL-2.1-or-later
"""config.toml.sample and docs/configuration.md say what the code does, no more and no less."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import kci_storage
from kci_storage.config.reading import load
from kci_storage.config.settings import (
    SECTIONS,
    Config,
    ConfigError,
    RetentionRule,
    User,
    expectation,
    settings,
)

ROOT = Path(kci_storage.__file__).parent.parent
SAMPLE = (ROOT / "config.toml.sample").read_text()
DOCUMENT = (ROOT / "docs" / "configuration.md").read_text()
ALL_SECTIONS: dict[str, type[Any]] = {"": Config, **SECTIONS, "retention.rules": RetentionRule, "users": User}
HEADINGS = {
    "Top level": "",
    **{f"`[{name}]`": name for name in SECTIONS},
    **{f"`[[{name}]]`": name for name in ("retention.rules", "users")},
}
VARIABLE = re.compile(r"(?:KCI_)?STORAGE_[A-Z_]+|CREDENTIALS_DIRECTORY")


# The sample


def sample_keys() -> Iterator[tuple[str, str, str, Any]]:
    """Section, key, the comment above it and its value, whether the line is commented out or not."""
    section, comment = "", ""
    for line in SAMPLE.splitlines():
        text = line.removeprefix("# ")
        if heading := re.fullmatch(r"\[+([\w.]+)\]+", text):
            section = heading[1]
        elif re.fullmatch(r"\w+ = .+", text):
            key, value = next(iter(tomllib.loads(text).items()))
            yield section, key, comment, value
        comment = text


def test_the_sample_has_every_key_with_its_default_and_its_help():
    expected = []
    for section, cls in ALL_SECTIONS.items():
        for name, item in settings(cls).items():
            setting = item.metadata["setting"]
            unit = f" ({setting.unit})" if setting.unit in ("bytes", "seconds") else ""
            default = f"./{item.default}" if isinstance(item.default, Path) else item.default
            default = list(default) if isinstance(default, tuple) else default
            expected.append((section, name, setting.help + unit, default))
    assert list(sample_keys()) == expected


def test_the_sample_with_a_secret_and_a_container_is_valid_and_means_the_defaults(tmp_path):
    filled = {"jwt_secret": "s" * 32, "account": "kernelci", "key": "c2VjcmV0", "container": "artifacts"}
    text = SAMPLE
    for key, value in filled.items():
        text = text.replace(f'\n{key} = ""\n', f'\n{key} = "{value}"\n', 1)
    (tmp_path / "sample.toml").write_text(text)
    (tmp_path / "short.toml").write_text(
        f'jwt_secret = "{"s" * 32}"\n[azure]\naccount = "kernelci"\nkey = "c2VjcmV0"\ncontainer = "artifacts"\n'
    )
    sample, short = load(tmp_path / "sample.toml", {}), load(tmp_path / "short.toml", {})
    for name in (*settings(Config), *SECTIONS, "users", "plugins"):
        assert getattr(sample, name) == getattr(short, name)


def test_the_sample_as_it_stands_is_refused_for_want_of_a_secret(tmp_path):
    (tmp_path / "config.toml").write_text(SAMPLE)
    with pytest.raises(ConfigError, match="jwt_secret: expected text that is not empty"):
        load(tmp_path / "config.toml", {})


# The documentation


def tables() -> dict[str, list[list[str]]]:
    """The rows of each heading's table, without its head."""
    found: dict[str, list[list[str]]] = {}
    for part in re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)[1:]:
        rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        if rows:
            found[part.splitlines()[0]] = [[cell.strip() for cell in row] for row in rows[2:]]
    return found


def test_every_section_is_documented_and_no_other():
    assert set(tables()) - {"Environment"} == set(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_setting_is_documented_with_its_default_bounds_and_help(heading):
    cls = ALL_SECTIONS[HEADINGS[heading]]
    hints = get_type_hints(cls)
    expected = []
    for name, item in settings(cls).items():
        setting = item.metadata["setting"]
        expected.append((f"`{name}`", item.default, expectation(setting, hints[name]), setting.help))
    rows = tables()[heading]
    assert [(key, _parsed(default, key, cls), *rest) for key, default, *rest in rows] == expected


def _parsed(cell: str, key: str, cls: type[Any]) -> Any:
    value = tomllib.loads(f"x = {cell.strip('`')}")["x"]
    kind = type(settings(cls)[key.strip("`")].default)
    return kind(value) if kind in (tuple, float, type(Path())) else value


def test_every_environment_variable_is_documented_and_no_other():
    documented = {row[0].strip("`") for row in tables()["Environment"]}
    assert documented == set(_variables_in_the_code())


def _variables_in_the_code() -> Iterator[str]:
    for path in (ROOT / "kci_storage").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and VARIABLE.fullmatch(node.value):
                yield node.value
