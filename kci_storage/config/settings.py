"""The configuration: one TOML file, read and validated once, then never changed.

Every setting is defined in one place, a field of a dataclass below: its name, type and default, and, in
``metadata["setting"]``, its help, unit and bounds (:class:`Setting`). The validation here, ``config.toml.sample`` and
``docs/configuration.md`` all follow that one definition; tests hold them together.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_type_hints
from urllib.parse import urlsplit

from kci_storage.http.networks import parse_subnet
from kci_storage.retention import tags as retention

CONFIG_VARIABLE = "KCI_STORAGE_CONFIG"
PORT_VARIABLE = "KCI_STORAGE_PORT"
PARALLELISM_VARIABLE = "KCI_STORAGE_ARCHIVE_PARALLELISM"
DEBUG_VARIABLES = ("STORAGE_DEBUG", "STORAGE_VERBOSE")  # one of them not empty: debug logging
DEFAULT_FILE = "config.toml"

_DAY = 86_400  # seconds
_MOST_BYTES = 2**63 - 1  # what the system takes as a file's size
_LONGEST_SOCKET_PATH = 107  # bytes: sockaddr_un.sun_path without its closing NUL


class ConfigError(Exception):
    """The configuration cannot be used: one line that names the file, the key and what was expected."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of one setting beside its name, type and default."""

    help: str  # one line
    unit: str = ""  # "bytes", "seconds", "%" …
    minimum: float | None = None
    maximum: float | None = None
    expects: str = ""  # what is accepted, in words, where type and bounds do not say it
    accepts: Callable[[Any], bool] | None = None  # whether a value of the right type, or each of a list, is
    secret: bool = False  # its value is never shown


def _setting(default: Any, help: str, **more: Any) -> Any:
    setting = Setting(help, **more)
    return field(default=default, repr=not setting.secret, metadata={"setting": setting})


def split_bind(bind: str) -> tuple[str, int] | None:
    """Host and port of ``host:port`` or ``[v6]:port``; None for anything else, ``unix:path`` too.

    >>> split_bind("127.0.0.1:3000")
    ('127.0.0.1', 3000)
    >>> split_bind("[::1]:3000")
    ('::1', 3000)
    >>> split_bind("unix:/run/kci-storage.sock") is None
    True
    """
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]/\s]+)):([0-9]{1,5})", bind)
    if not match or not 1 <= int(match[3]) <= 65535 or (match[1] and not _is_ipv6(match[1])):
        return None
    return match[1] or match[2], int(match[3])


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _is_bind(bind: str) -> bool:
    return split_bind(bind) is not None or (bind.startswith("unix:") and len(bind) > len("unix:"))


def _is_location(path: str) -> bool:
    return not path or re.fullmatch(r"/(?:[A-Za-z0-9._~-]+/)+", path) is not None


def _is_cache_control(value: str) -> bool:
    directive = r"[A-Za-z-]+(?:=(?:[0-9A-Za-z-]+|\"[0-9A-Za-z, -]*\"))?"
    return re.fullmatch(rf"{directive}(?:, *{directive})*", value) is not None


def _is_base64(key: str) -> bool:
    try:
        base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _is_account(name: str) -> bool:
    return not name or re.fullmatch(r"[a-z0-9]{3,24}", name) is not None


def _is_container(name: str) -> bool:
    return not name or re.fullmatch(r"\$root|\$web|(?=.{3,63}$)[a-z0-9]+(?:-[a-z0-9]+)*", name) is not None


def _is_sas_token(token: str) -> bool:
    return not token or re.search(r"(?:^\??|&)sig=[^&]", token) is not None


def _is_service_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return not url or bool(usable and not parts.query and not parts.fragment and not parts.username)


_AGE_TEXT = "nothing or an age such as 30d, 6m or 2y"


def _is_age_or_none(text: str) -> bool:
    return not text or retention.is_age(text)


def _is_retention_key(text: str) -> bool:
    return retention.is_tag_key(text) and text != retention.OWNER


def _is_given(value: str) -> bool:
    return bool(value)


def _is_long_secret(secret: str) -> bool:
    return not secret or len(secret) >= 32


def _is_subnet(text: str) -> bool:
    return parse_subnet(text) is not None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """``[server]``: how clients are served."""

    bind: str = _setting(
        "127.0.0.1:3000", "where to listen", expects="host:port, [v6]:port or unix:path", accepts=_is_bind
    )
    workers: int = _setting(0, "worker processes; 0: one per core", minimum=0, maximum=1024)
    threads: int = _setting(64, "threads per worker, each serves one request at a time", minimum=1, maximum=10_000)
    max_upload_bytes: int = _setting(
        10_737_418_240, "the largest upload request", unit="bytes", minimum=1, maximum=_MOST_BYTES
    )
    lock_timeout: float = _setting(
        30.0, "how long a request waits for another one's work on its key", unit="seconds", minimum=0, maximum=3600
    )
    trusted_proxies: int = _setting(
        0, "how many proxies in front set X-Forwarded-*; 0 trusts none", minimum=0, maximum=16
    )
    accel_redirect: str = _setting(
        "",
        'nginx\'s internal location over the cache directory, e.g. "/_cache/"; empty: files leave by the server',
        expects='nothing or a path that starts and ends with "/"',
        accepts=_is_location,
    )
    cache_control: str = _setting(
        "public, no-cache",
        "the Cache-Control of downloads: browsers and CDNs may keep a copy, and ask before they use it",
        expects='directives such as "public, max-age=60"',
        accepts=_is_cache_control,
    )
    send_timeout: float = _setting(
        60.0, "after this long without progress a stalled client is dropped", unit="seconds", minimum=1, maximum=_DAY
    )

    certfile: str = _setting(
        "", "the certificate, with those up to its root, for TLS without a proxy; empty: no TLS", expects="a path"
    )
    keyfile: str = _setting("", "its key; empty: it stands in the same file", expects="a path")

    @property
    def worker_count(self) -> int:
        """How many worker processes there are."""
        return self.workers or os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class AzureConfig:
    """``[azure]``: the container in Azure Blob Storage, for ``driver = "azure"``."""

    account: str = _setting(
        "", "the storage account", expects="3 to 24 lower-case letters and digits", accepts=_is_account
    )
    key: str = _setting(
        "", "the account key; this or sastoken", expects="base64 text", accepts=_is_base64, secret=True
    )
    sastoken: str = _setting(
        "",
        'a SAS token, with or without its "?"; used where there is no key',
        expects='a token that holds "sig="',
        accepts=_is_sas_token,
        secret=True,
    )
    container: str = _setting(
        "",
        "the container in that account",
        expects="3 to 63 lower-case letters, digits and single hyphens",
        accepts=_is_container,
    )
    endpoint: str = _setting(
        "",
        "another service URL: an emulator, a sovereign cloud; empty: Azure's own for the account",
        expects="nothing or an http(s) URL without a query",
        accepts=_is_service_url,
    )
    connect_timeout: float = _setting(
        5.0,
        "how long to wait for a connection, and for the backend to take a piece of an upload",
        unit="seconds",
        minimum=0.1,
        maximum=600,
    )
    read_timeout: float = _setting(
        20.0,
        "after this long without a byte of its answer the backend is asked again, or given up",
        unit="seconds",
        minimum=0.1,
        maximum=600,
    )


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """``[local]``: files on this machine, for ``driver = "local"``."""

    storage_path: Path = _setting(Path("./storage"), "the folder that holds the objects, each as a file at its key")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """``[cache]``: the copies on local disk, and when they go."""

    directory: Path = _setting(Path("./cache"), "the folder that holds the copies")
    max_files: int = _setting(1_000_000, "the most files to keep", unit="files", minimum=1, maximum=10**9)
    max_bytes: int = _setting(
        0, "the most to keep; 0: no limit but the disk's", unit="bytes", minimum=0, maximum=_MOST_BYTES
    )
    low_disk_percent: float = _setting(
        12.0, "start evicting below this percentage of free disk space", unit="%", minimum=0, maximum=100
    )
    recover_disk_percent: float = _setting(
        13.0, "and stop above this percentage; not less than low_disk_percent", unit="%", minimum=0, maximum=100
    )
    cleanup_chunk_size: int = _setting(
        100_000, "files evicted between two looks at the limits", unit="files", minimum=1, maximum=10**9
    )
    interval: float = _setting(
        300.0, "time between two looks at the limits", unit="seconds", minimum=0.1, maximum=_DAY
    )
    max_fills: int = _setting(
        64, "objects fetched into the cache at once; further ones wait, then get 503", minimum=1, maximum=10_000
    )
    revalidate_after: float = _setting(
        0.0,
        "age from which a hit asks the backend whether it is still the latest; 0: never",
        unit="seconds",
        minimum=0,
        maximum=365 * _DAY,
    )


@dataclass(frozen=True, slots=True)
class ArchiveConfig:
    """``[archive]``: archives that are unpacked by the server."""

    max_files: int = _setting(10_000, "the most files in one archive", unit="files", minimum=1, maximum=1_000_000)
    max_file_bytes: int = _setting(
        536_870_912, "the largest file in an archive, unpacked", unit="bytes", minimum=1, maximum=_MOST_BYTES
    )
    max_total_bytes: int = _setting(
        2_147_483_648, "all files of an archive, unpacked", unit="bytes", minimum=1, maximum=_MOST_BYTES
    )
    parallelism: int = _setting(
        64, "files of archives that a worker uploads at the same time", unit="files", minimum=1, maximum=1024
    )


@dataclass(frozen=True, slots=True)
class RetentionRule:
    """``[[retention.rules]]``: how long some keys are kept."""

    prefix: str = _setting(
        "", 'the keys it is for: whole leading segments, or plain text up to a closing "*"; the longest prefix counts'
    )
    value: str = _setting(
        "", "their tag's value instead of tag_value; empty: kept for ever", expects=_AGE_TEXT, accepts=_is_age_or_none
    )


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """``[retention]``: tags that say how long an object is to be kept, and whose it is."""

    tag_key: str = _setting(
        "retention",
        "the name of the tag",
        expects="1 to 128 letters, digits, blanks and +-./:=_, but not owner",
        accepts=_is_retention_key,
    )
    tag_value: str = _setting(
        "",
        "its value for uploads that no rule is for; empty: kept for ever; without rules nothing is tagged",
        expects=_AGE_TEXT,
        accepts=_is_age_or_none,
    )
    rules: tuple[RetentionRule, ...] = ()


@dataclass(frozen=True, slots=True)
class UserAgentConfig:
    """``[useragent]``: who is not served because of the name that it gives itself."""

    ban: tuple[str, ...] = _setting(
        (),
        "requests whose User-Agent holds one of these texts, in whatever case, are refused",
        expects="a list of texts that are not empty",
        accepts=_is_given,
    )
    defaults: bool = _setting(
        True, "whether known crawlers, AI scrapers and SEO bots are refused as well; Google and Bing are not"
    )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """``[limits]``: how much one client may have at once, over all workers."""

    downloads_per_client: int = _setting(
        0, "downloads of one client at a time; 0: no limit", minimum=0, maximum=1_000_000
    )
    requests_per_second: float = _setting(
        0.0, "requests of one client in the long run; 0: no limit", minimum=0, maximum=1_000_000
    )
    burst: int = _setting(100, "requests that a client may send at once after a pause", minimum=1, maximum=1_000_000)
    ipv4_prefix_length: int = _setting(
        32, "how much of an IPv4 address makes a client", unit="bits", minimum=1, maximum=32
    )
    ipv6_prefix_length: int = _setting(
        64, "how much of an IPv6 address makes a client", unit="bits", minimum=1, maximum=128
    )


@dataclass(frozen=True, slots=True)
class DownloadChallengeConfig:
    """``[download_challenge]``: browsers that must run a script before they get a file."""

    user_agents: tuple[str, ...] = _setting(
        (),
        "browsers whose User-Agent holds one of these texts, in whatever case, are checked before a download",
        expects="a list of texts that are not empty",
        accepts=_is_given,
    )
    secret: str = _setting(
        "",
        "cookies are signed with this secret",
        expects="nothing or text of at least 32 characters",
        accepts=_is_long_secret,
        secret=True,
    )
    cookie_ttl_seconds: int = _setting(
        600, "how long a browser that was checked is not checked again", unit="seconds", minimum=30, maximum=_DAY
    )
    ipv4_prefix_length: int = _setting(
        24, "how much of an IPv4 address must stay the same meanwhile", unit="bits", minimum=1, maximum=32
    )
    ipv6_prefix_length: int = _setting(
        64, "how much of an IPv6 address must stay the same meanwhile", unit="bits", minimum=1, maximum=128
    )
    fallback_bytes_per_second: int = _setting(
        0,
        "the rate for browsers without JavaScript, kept by nginx in front (X-Accel-Limit-Rate); 0: they get nothing",
        unit="bytes",
        minimum=0,
        maximum=_MOST_BYTES,
    )
    secure_cookie: bool = _setting(True, "whether the cookie goes over HTTPS only")


@dataclass(frozen=True, slots=True)
class User:
    """``[[users]]``: who may write where. Without any, every valid token may write everywhere."""

    name: str = _setting("", "the token's email", expects="text that is not empty", accepts=_is_given)
    prefixes: tuple[str, ...] = _setting(
        (), 'the keys that may be written: whole leading segments, or plain text up to a closing "*"; "": all'
    )


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration, valid. Its text form shows no secret."""

    path: Path  # of the file
    driver: str = _setting(
        "azure",
        'where objects are kept: "azure", "local" or an installed plug-in\'s name',
        expects="a driver's name",
        accepts=_is_given,
    )
    jwt_secret: str = _setting(
        "",
        "tokens are signed with this secret; at least one of the two must be there",
        expects="text that is not empty; `kci-storage secret` prints a new one",
        accepts=_is_given,
        secret=True,
    )
    unified_secret: str = _setting(
        "",
        "or with this one, which other KernelCI services share",
        expects="text that is not empty",
        accepts=_is_given,
        secret=True,
    )
    block_subnets: tuple[str, ...] = _setting(
        (),
        "clients whose address lies in one of these subnets are refused",
        expects='a list of subnets such as "192.0.2.0/24" and "2001:db8::/32"',
        accepts=_is_subnet,
    )
    server: ServerConfig = ServerConfig()
    azure: AzureConfig = AzureConfig()
    local: LocalConfig = LocalConfig()
    cache: CacheConfig = CacheConfig()
    archive: ArchiveConfig = ArchiveConfig()
    retention: RetentionConfig = RetentionConfig()
    useragent: UserAgentConfig = UserAgentConfig()
    limits: LimitsConfig = LimitsConfig()
    download_challenge: DownloadChallengeConfig = DownloadChallengeConfig()
    users: tuple[User, ...] = ()
    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)  # may hold secrets

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets that are set, in the order in which a token is tried with them."""
        return tuple(secret for secret in (self.jwt_secret, self.unified_secret) if secret)


SECTIONS: Mapping[str, type[Any]] = {
    "server": ServerConfig,
    "azure": AzureConfig,
    "local": LocalConfig,
    "cache": CacheConfig,
    "archive": ArchiveConfig,
    "retention": RetentionConfig,
    "useragent": UserAgentConfig,
    "limits": LimitsConfig,
    "download_challenge": DownloadChallengeConfig,
}


# What changes in a running server when the configuration is read again: the top level's keys and sections from which
# kci_storage.access.policies are made, and the certificate.
RELOADABLE = (
    "block_subnets",
    "useragent",
    "limits",
    "download_challenge",
    "retention",
    "users",
    "server.certfile",
    "server.keyfile",
)


def settings(section: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The settings that a section's dataclass (or :class:`Config`, for the top level) defines, by name.

    >>> settings(LocalConfig)["storage_path"].default
    PosixPath('storage')
    """
    return {item.name: item for item in dataclasses.fields(section) if "setting" in item.metadata}


def expectation(setting: Setting, kind: Any) -> str:
    """What a setting of the type ``kind`` accepts, in words.

    >>> expectation(settings(ServerConfig)["threads"].metadata["setting"], int)
    'a whole number from 1 to 10000'
    """
    if setting.minimum is None:
        return setting.expects or _KINDS[kind]
    unit = f" of {setting.unit}" if setting.unit not in ("", "%") else ""
    return f"{_KINDS[kind]}{unit} from {setting.minimum} to {setting.maximum}"


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple[str, ...]: "a list of texts",
}


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


_FILE = "_file"  # after a secret's name: the file that holds it
_CREDENTIALS = "$CREDENTIALS_DIRECTORY"  # where systemd puts what LoadCredential names


class _File:
    """The configuration file on its way into the dataclasses."""

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
        """The section of a driver that is none of ours, taken out of the document: its own to check."""
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
            if len(os.fsencode(socket)) > _LONGEST_SOCKET_PATH:
                self.fail("server.bind", f"expected a socket's path of at most {_LONGEST_SOCKET_PATH} bytes")
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
        """The table, in which ``key_file = "path"`` has become ``key = "what the file holds"``."""
        table = dict(table)
        for key in [key for key, item in known.items() if item.metadata["setting"].secret]:
            path = table.pop(key + _FILE, None)
            if path is not None:
                if key in table:
                    self.fail(prefix + key, f"expected either {key} or {key}{_FILE}, got both")
                table[key] = self._secret(prefix + key + _FILE, path)
        return table

    def _secret(self, name: str, path: object) -> str:
        """What a secret's file holds, without the line's end."""
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
        """Whatever lies under ``storage_path`` is public: neither this file nor the cache may."""
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
    """What of a value, or of a list's values, is not accepted; None: nothing."""
    if setting.accepts is None:
        return None
    values = value if isinstance(value, tuple) else (value,)
    return next((item for item in values if not setting.accepts(item)), None)


def _fits(kind: Any, setting: Setting, value: Any) -> bool:
    """Whether a TOML value is of the type and within the bounds. A bool is no number, a whole number is a float."""
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
    """A value as it may stand in a one-line message.

    >>> _shown(True), _shown("two"), _shown([1])
    ('true', '"two"', 'a list')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a section"
    text = str(value) if not isinstance(value, str) else f'"{ascii(value)[1:-1]}"'
    return text if len(text) <= 80 else f"{text[:80]}…"
