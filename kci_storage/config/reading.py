# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading and validating a configuration file; errors are one line each."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from kci_storage.config.checks import MAX_SOCKET_PATH, split_bind
from kci_storage.config.settings import (
    SECTIONS,
    ArchiveConfig,
    CacheConfig,
    Config,
    ConfigError,
    DownloadChallengeConfig,
    RetentionConfig,
    RetentionRule,
    ServerConfig,
    Setting,
    User,
    expectation,
    settings,
)

CONFIG_VARIABLE = "KCI_STORAGE_CONFIG"
PORT_VARIABLE = "KCI_STORAGE_PORT"
PARALLELISM_VARIABLE = "KCI_STORAGE_ARCHIVE_PARALLELISM"
DEBUG_VARIABLES = ("STORAGE_DEBUG", "STORAGE_VERBOSE")  # debug logging if one of them is not empty
DEFAULT_FILE = "config.toml"


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and validate the configuration.

    :param path: the file; None: the one that ``KCI_STORAGE_CONFIG`` names, else ``config.toml`` in the working
        directory. Relative paths in it are relative to its folder.
    :param environ: where ``KCI_STORAGE_CONFIG``, ``KCI_STORAGE_PORT`` and ``KCI_STORAGE_ARCHIVE_PARALLELISM`` are
        looked up; an empty one counts as unset.
    :raises ConfigError: the file cannot be read, or something in it is wrong.
    """
    file = _File(Path(path or environ.get(CONFIG_VARIABLE) or DEFAULT_FILE), environ)
    config = file.config()
    port = environ.get(PORT_VARIABLE)
    if port:
        config = dataclasses.replace(config, server=_with_port(config.server, port))
    parallelism = environ.get(PARALLELISM_VARIABLE)
    if parallelism:
        config = dataclasses.replace(config, archive=_with_parallelism(config.archive, parallelism))
    return config


def wants_debug(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for debug logging."""
    return any(map(environ.get, DEBUG_VARIABLES))


def _with_port(server: ServerConfig, port: str) -> ServerConfig:
    if split_bind(server.bind) is None:
        raise ConfigError(f"{PORT_VARIABLE}: expected a server.bind that has a port, not {server.bind}")
    bind = f"{server.bind.rpartition(':')[0]}:{port}"
    if split_bind(bind) is None:
        raise ConfigError(f"{PORT_VARIABLE}: expected a port from 1 to 65535, got {port!r}")
    return dataclasses.replace(server, bind=bind)


def _with_parallelism(archive: ArchiveConfig, text: str) -> ArchiveConfig:
    setting = settings(ArchiveConfig)["parallelism"].metadata["setting"]
    if not re.fullmatch("[0-9]{1,9}", text) or not _fits(int, setting, int(text)):
        raise ConfigError(f"{PARALLELISM_VARIABLE}: expected {expectation(setting, int)}, got {_shown(text)}")
    return dataclasses.replace(archive, parallelism=int(text))


_FILE = "_file"  # the suffix of a key that names a secret's file
_CREDENTIALS = "$CREDENTIALS_DIRECTORY"  # systemd's folder for the files of LoadCredential


class _File:
    """A configuration file that is being read into the dataclasses."""

    def __init__(self, path: Path, environ: Mapping[str, str]):
        self.path = path
        self.folder = path.absolute().parent
        self.credentials = environ.get("CREDENTIALS_DIRECTORY", "")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{self.path}: {key}: {problem}")

    def config(self) -> Config:
        """The file's content, validated."""
        document = self._parse()
        sections = {name: document.pop(name, {}) for name in SECTIONS}
        users = document.pop("users", [])
        plugins = self._plugins(document)
        config = Config(
            path=self.path.absolute(),
            **self._values(Config, "", document),
            **{name: self._section(name, table) for name, table in sections.items()},
            users=self._users(users),
            plugins=plugins,
        )
        self._check_secrets(config)
        self._check_azure(config)
        self._check_cache(config.cache)
        self._check_challenge(config.download_challenge)
        self._check_certificate(config.server)
        self._check_folders(config)
        return config

    def _plugins(self, document: dict[str, Any]) -> dict[str, Any]:
        """The section of a plug-in driver, removed from the document; the driver itself validates it."""
        driver = document.get("driver")
        if isinstance(driver, str) and isinstance(document.get(driver), dict):
            return {driver: document.pop(driver)}
        return {}

    def _parse(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self._text())
        except RecursionError:
            raise ConfigError(f"{self.path}: not valid TOML: nested too deeply") from None
        except ValueError as exc:  # TOMLDecodeError, and int() on thousands of digits
            raise ConfigError(f"{self.path}: not valid TOML: {' '.join(str(exc).split())}") from None

    def _text(self) -> str:
        try:
            return self.path.read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            hint = f"start from config.toml.sample, or name another one in {CONFIG_VARIABLE}"
            raise ConfigError(f"{self.path}: no such file; {hint}") from None
        except OSError as exc:
            raise ConfigError(f"{self.path}: cannot be read: {exc.strerror}") from None
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{self.path}: not valid TOML: byte {exc.start} is not UTF-8") from None

    def _section(self, name: str, table: object) -> Any:
        if not isinstance(table, dict):
            self.fail(name, f"expected a section, [{name}]")
        if name == "retention":
            return self._retention(table)
        section = SECTIONS[name](**self._values(SECTIONS[name], f"{name}.", table))
        return self._absolute(section)

    def _retention(self, table: dict[str, Any]) -> RetentionConfig:
        table = dict(table)
        rules = table.pop("rules", [])
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            self.fail("retention.rules", "expected one section [[retention.rules]] for each rule")
        return RetentionConfig(
            **self._values(RetentionConfig, "retention.", table),
            rules=tuple(self._retention_rule(number, rule) for number, rule in enumerate(rules, start=1)),
        )

    def _retention_rule(self, number: int, table: dict[str, Any]) -> RetentionRule:
        name = f"retention.rules #{number} "
        for key in ("prefix", "value"):
            if key not in table:
                self.fail(name + key, "expected in each rule, it is missing")
        return RetentionRule(**self._values(RetentionRule, name, table))

    def _absolute(self, section: Any) -> Any:
        values = {name: getattr(section, name) for name in settings(type(section))}
        paths: dict[str, Any] = {
            name: self.folder / value for name, value in values.items() if isinstance(value, Path)
        }
        if isinstance(section, ServerConfig) and section.bind.startswith("unix:"):
            socket = self.folder / section.bind.removeprefix("unix:")
            if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
                self.fail("server.bind", f"expected a socket's path of at most {MAX_SOCKET_PATH} bytes")
            paths["bind"] = f"unix:{socket}"
        if isinstance(section, ServerConfig):
            files = {name: getattr(section, name) for name in ("certfile", "keyfile")}
            paths |= {name: str(self.folder / path) for name, path in files.items() if path}
        return dataclasses.replace(section, **paths)

    def _users(self, tables: object) -> tuple[User, ...]:
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self.fail("users", "expected one section [[users]] for each user")
        return tuple(self._user(number, table) for number, table in enumerate(tables, start=1))

    def _user(self, number: int, table: dict[str, Any]) -> User:
        user = User(**self._values(User, f"users #{number} ", table))
        if not user.name:
            self.fail(f"users #{number} name", "expected the user's email, it is missing")
        return user

    def _values(self, section: type[Any], prefix: str, table: dict[str, Any]) -> dict[str, Any]:
        known = settings(section)
        hints = get_type_hints(section)
        table = self._with_secrets_from_files(known, prefix, table)
        for key in table:
            if key not in known:
                self._fail_unknown(prefix, key, known)
        return {
            key: self._value(prefix + key, hints[key], known[key].metadata["setting"], value)
            for key, value in table.items()
        }

    def _with_secrets_from_files(
        self, known: Mapping[str, Any], prefix: str, table: dict[str, Any]
    ) -> dict[str, Any]:
        """The table with each ``key_file = "path"`` replaced by ``key = "the file's content"``."""
        table = dict(table)
        for key in [key for key, item in known.items() if item.metadata["setting"].secret]:
            path = table.pop(key + _FILE, None)
            if path is not None:
                if key in table:
                    self.fail(prefix + key, f"expected either {key} or {key}{_FILE}, got both")
                table[key] = self._secret(prefix + key + _FILE, path)
        return table

    def _secret(self, name: str, path: object) -> str:
        """The content of a secret's file, without line breaks at its end."""
        if not isinstance(path, str) or not path:
            self.fail(name, f"expected a path, got {_shown(path)}")
        expanded = path.replace(_CREDENTIALS, self.credentials) if self.credentials else path
        try:
            return (self.folder / expanded).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as exc:
            problem = exc.strerror if isinstance(exc, OSError) else "not UTF-8"
            self.fail(name, f"expected a file that can be read, got {_shown(path)}: {problem}")

    def _fail_unknown(self, prefix: str, key: str, known: Mapping[str, Any]) -> NoReturn:
        names = [*known, *([] if prefix else [*SECTIONS, "users"])]
        close = difflib.get_close_matches(key, names, n=1)
        expected = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}"
        self.fail(prefix + _shown(key).strip('"'), f"unknown key; {expected}")

    def _value(self, name: str, kind: Any, setting: Setting, value: Any) -> Any:
        if _fits(kind, setting, value):
            converted = tuple(value) if kind == tuple[str, ...] else kind(value)
            value = _refused(setting, converted)
            if value is None:
                return converted
        got = "" if setting.secret else f", got {_shown(value)}"
        self.fail(name, f"expected {expectation(setting, kind)}{got}")

    def _check_secrets(self, config: Config) -> None:
        if not config.secrets:
            self.fail("jwt_secret", "expected a secret, it is missing; `kci-storage secret` prints a new one")

    def _check_azure(self, config: Config) -> None:
        if config.driver != "azure":
            return
        azure = config.azure
        for key in ("account", "container"):
            if not getattr(azure, key):
                self.fail(f"azure.{key}", "expected with the azure driver, it is missing")
        if not azure.key and not azure.sastoken:
            self.fail("azure.key", "expected azure.key or azure.sastoken, both are missing")

    def _check_cache(self, cache: CacheConfig) -> None:
        if cache.low_disk_percent > cache.recover_disk_percent:
            self.fail("cache.recover_disk_percent", "expected not less than cache.low_disk_percent")

    def _check_challenge(self, challenge: DownloadChallengeConfig) -> None:
        if challenge.user_agents and not challenge.secret:
            self.fail("download_challenge.secret", "expected with download_challenge.user_agents, it is missing")

    def _check_certificate(self, server: ServerConfig) -> None:
        if server.keyfile and not server.certfile:
            self.fail("server.certfile", "expected with server.keyfile, it is missing")

    def _check_folders(self, config: Config) -> None:
        """Every file below ``storage_path`` is public, so this file and the cache must lie elsewhere."""
        if config.driver != "local":
            return
        storage, cache = _real(config.local.storage_path), _real(config.cache.directory)
        if _real(config.path).is_relative_to(storage) or _real(config.path.parent).is_relative_to(storage):
            self.fail("local.storage_path", "expected a folder that does not hold the configuration file")
        if cache.is_relative_to(storage) or storage.is_relative_to(cache):
            self.fail("local.storage_path", "expected a folder apart from cache.directory")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() raises on a loop of links


def _refused(setting: Setting, value: Any) -> Any:
    """The value, or the first of a list's values, that is not accepted; None: all are."""
    if setting.accepts is None:
        return None
    values = value if isinstance(value, tuple) else (value,)
    return next((item for item in values if not setting.accepts(item)), None)


def _fits(kind: Any, setting: Setting, value: Any) -> bool:
    """Whether a TOML value has the type and is within the bounds. A bool is no number; an integer is a float, too."""
    if kind in (int, float):
        right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        return right and setting.minimum <= value <= setting.maximum
    if kind is bool:
        return isinstance(value, bool)
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(_is_text(item) for item in value)
    if not isinstance(value, str):
        return False
    return setting.secret or (_is_text(value) and (kind is not Path or bool(value)))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and all(character.isprintable() for character in value)


def _shown(value: object) -> str:
    """A value in a form for one-line messages.

    >>> _shown(True), _shown("two"), _shown([1])
    ('true', '"two"', 'a list')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a section"
    text = str(value) if not isinstance(value, str) else f'"{ascii(value)[1:-1]}"'
    return text if len(text) <= 80 else f"{text[:80]}…"
