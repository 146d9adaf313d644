# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: one TOML file, read and validated once, then never changed.

Each setting is defined once, as a field of a dataclass below: its name, type and default, and, in
``metadata["setting"]``, its help, unit and bounds (:class:`Setting`). The validation, ``config.toml.sample`` and
``docs/configuration.md`` follow that definition; tests compare them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kci_storage.config.checks import (
    AGE_TEXT,
    is_account,
    is_age_or_none,
    is_base64,
    is_bind,
    is_cache_control,
    is_container,
    is_given,
    is_location,
    is_long_secret,
    is_retention_key,
    is_sas_token,
    is_service_url,
    is_subnet,
    is_tag_policy,
    is_verify,
)
from kci_storage.config.cores import usable_cores

_DAY = 86_400  # seconds
_MAX_BYTES = 2**63 - 1  # the largest possible file size (off_t)


class ConfigError(Exception):
    """The configuration cannot be used: one line that names the file, the key and what was expected."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting's properties beside its name, type and default."""

    help: str  # one line
    unit: str = ""  # "bytes", "seconds", "%" …
    minimum: float | None = None
    maximum: float | None = None
    expects: str = ""  # the accepted values in words, if type and bounds do not say it
    accepts: Callable[[Any], bool] | None = None  # whether it accepts a value of the right type, or one of a list
    secret: bool = False  # its value is never shown


def _setting(default: Any, purpose: str, **more: Any) -> Any:
    setting = Setting(purpose, **more)
    return field(default=default, repr=not setting.secret, metadata={"setting": setting})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """``[server]``: how clients are served."""

    bind: str = _setting(
        "127.0.0.1:3000", "where to listen", expects="host:port, [v6]:port or unix:path", accepts=is_bind
    )
    workers: int = _setting(0, "worker processes; 0: one per core that may be used", minimum=0, maximum=1024)
    threads: int = _setting(64, "threads per worker, each serves one request at a time", minimum=1, maximum=10_000)
    connections: int = _setting(
        0,
        "connections per worker; 0: as many as the limit of open files allows, up to 10000",
        minimum=0,
        maximum=1_000_000,
    )
    max_upload_bytes: int = _setting(
        10_737_418_240, "the largest upload request", unit="bytes", minimum=1, maximum=_MAX_BYTES
    )
    lock_timeout: float = _setting(
        30.0,
        "how long a request waits for another one that writes the same key",
        unit="seconds",
        minimum=0,
        maximum=3600,
    )
    trusted_proxies: int = _setting(
        0, "how many proxies in front set X-Forwarded-*; 0 trusts none", minimum=0, maximum=16
    )
    accel_redirect: str = _setting(
        "",
        'nginx\'s internal location over the cache directory, e.g. "/_cache/"; empty: the server sends the files',
        expects='nothing or a path that starts and ends with "/"',
        accepts=is_location,
    )
    cache_control: str = _setting(
        "public, no-cache",
        "the Cache-Control of downloads; the default lets browsers and CDNs keep a copy that they check before use",
        expects='directives such as "public, max-age=60"',
        accepts=is_cache_control,
    )
    send_timeout: float = _setting(
        60.0,
        "the connection of a client without progress is closed after this long",
        unit="seconds",
        minimum=1,
        maximum=_DAY,
    )

    certfile: str = _setting("", "the certificate chain, for TLS without a proxy; empty: no TLS", expects="a path")
    keyfile: str = _setting("", "the certificate's private key; empty: it is in certfile", expects="a path")

    @property
    def worker_count(self) -> int:
        """How many worker processes there are."""
        return self.workers or usable_cores()


@dataclass(frozen=True, slots=True)
class AzureConfig:
    """``[azure]``: the container in Azure Blob Storage, for ``driver = "azure"``."""

    account: str = _setting(
        "", "the storage account", expects="3 to 24 lower-case letters and digits", accepts=is_account
    )
    key: str = _setting(
        "", "the account key; this or sastoken", expects="base64 text", accepts=is_base64, secret=True
    )
    sastoken: str = _setting(
        "",
        'a SAS token, with or without its "?"; used where there is no key',
        expects='a token that holds "sig="',
        accepts=is_sas_token,
        secret=True,
    )
    container: str = _setting(
        "",
        "the container in that account",
        expects="3 to 63 lower-case letters, digits and single hyphens",
        accepts=is_container,
    )
    endpoint: str = _setting(
        "",
        "another service URL: an emulator, a sovereign cloud; empty: Azure's own for the account",
        expects="nothing or an http(s) URL without a query",
        accepts=is_service_url,
    )
    connect_timeout: float = _setting(
        5.0,
        "how long to wait for a connection to the backend",
        unit="seconds",
        minimum=0.1,
        maximum=600,
    )
    read_timeout: float = _setting(
        20.0,
        "a request without progress, while it is sent or answered, is retried, or given up, after this long",
        unit="seconds",
        minimum=0.1,
        maximum=600,
    )
    tags: str = _setting(
        "required",
        'what becomes of an upload whose tags the account or the SAS token does not take: "required", it fails, or '
        '"best effort", it is stored without them',
        expects='"required" or "best effort"',
        accepts=is_tag_policy,
    )
    verify: str = _setting(
        "own",
        'whose digests an object must have to be served: "own", those of this server\'s uploads, or "all"; '
        "a wrong one of another program is logged",
        expects='"own" or "all"',
        accepts=is_verify,
    )
    retry_timeout: float = _setting(
        60.0,
        "how long an upload is retried while the backend cannot be reached, breaks off or is busy",
        unit="seconds",
        minimum=0,
        maximum=600,
    )


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """``[local]``: files on this machine, for ``driver = "local"``."""

    storage_path: Path = _setting(Path("./storage"), "the folder that holds the objects, each as a file at its key")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """``[cache]``: the copies on local disk, and their eviction."""

    directory: Path = _setting(Path("./cache"), "the folder that holds the copies")
    max_files: int = _setting(1_000_000, "the most files to keep", unit="files", minimum=1, maximum=10**9)
    max_bytes: int = _setting(
        0, "the most to keep; 0: no limit but the disk's", unit="bytes", minimum=0, maximum=_MAX_BYTES
    )
    low_disk_percent: float = _setting(
        12.0, "evict files below this percentage of free disk space", unit="%", minimum=0, maximum=100
    )
    recover_disk_percent: float = _setting(
        13.0, "stop evicting above this percentage; not less than low_disk_percent", unit="%", minimum=0, maximum=100
    )
    cleanup_chunk_size: int = _setting(
        100_000, "the most files to evict between two checks of the limits", unit="files", minimum=1, maximum=10**9
    )
    interval: float = _setting(
        300.0, "time between two checks of the limits", unit="seconds", minimum=0.1, maximum=_DAY
    )
    max_fills: int = _setting(
        64,
        "concurrent fetches of objects into the cache; further requests wait, then get 503",
        minimum=1,
        maximum=10_000,
    )
    revalidate_after: float = _setting(
        0.0,
        "age from which a hit is checked against the backend; 0: never",
        unit="seconds",
        minimum=0,
        maximum=365 * _DAY,
    )


@dataclass(frozen=True, slots=True)
class ArchiveConfig:
    """``[archive]``: archives that the server unpacks."""

    max_files: int = _setting(10_000, "the most files in one archive", unit="files", minimum=1, maximum=1_000_000)
    max_file_bytes: int = _setting(
        536_870_912, "the largest file in an archive, unpacked", unit="bytes", minimum=1, maximum=_MAX_BYTES
    )
    max_total_bytes: int = _setting(
        2_147_483_648, "the size of all files of an archive, unpacked", unit="bytes", minimum=1, maximum=_MAX_BYTES
    )
    parallelism: int = _setting(
        64, "files of archives that a worker uploads at the same time", unit="files", minimum=1, maximum=1024
    )


@dataclass(frozen=True, slots=True)
class RetentionRule:
    """``[[retention.rules]]``: how long some keys are kept."""

    prefix: str = _setting(
        "", 'its keys: whole leading segments, or plain text up to a closing "*"; the longest prefix counts'
    )
    value: str = _setting(
        "",
        "the tag's value for these keys, instead of tag_value; empty: kept for ever",
        expects=AGE_TEXT,
        accepts=is_age_or_none,
    )


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """``[retention]``: the tags for an object's age limit and owner."""

    tag_key: str = _setting(
        "retention",
        "the name of the tag",
        expects="1 to 128 letters, digits, blanks and +-./:=_, but not owner",
        accepts=is_retention_key,
    )
    tag_value: str = _setting(
        "",
        "its value for uploads without a rule; empty: kept for ever; without rules nothing is tagged",
        expects=AGE_TEXT,
        accepts=is_age_or_none,
    )
    rules: tuple[RetentionRule, ...] = ()


@dataclass(frozen=True, slots=True)
class UserAgentConfig:
    """``[useragent]``: clients that are refused because of their user agent."""

    ban: tuple[str, ...] = _setting(
        (),
        "requests whose User-Agent contains one of these texts, in upper or lower case, are refused",
        expects="a list of texts that are not empty",
        accepts=is_given,
    )
    defaults: bool = _setting(
        True, "whether known crawlers, AI scrapers and SEO bots are refused as well; Google and Bing are not"
    )


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """``[limits]``: limits per client, over all workers."""

    downloads_per_client: int = _setting(
        0, "concurrent downloads of one client; 0: no limit", minimum=0, maximum=1_000_000
    )
    requests_per_second: float = _setting(
        0.0, "requests of one client in the long run; 0: no limit", minimum=0, maximum=1_000_000
    )
    burst: int = _setting(100, "requests that a client may send at once after a pause", minimum=1, maximum=1_000_000)
    ipv4_prefix_length: int = _setting(
        32, "leading bits of an IPv4 address that identify a client", unit="bits", minimum=1, maximum=32
    )
    ipv6_prefix_length: int = _setting(
        64, "leading bits of an IPv6 address that identify a client", unit="bits", minimum=1, maximum=128
    )


@dataclass(frozen=True, slots=True)
class DownloadChallengeConfig:
    """``[download_challenge]``: browsers that must run a script before they get a file."""

    user_agents: tuple[str, ...] = _setting(
        (),
        "browsers whose User-Agent contains one of these texts, in upper or lower case, are challenged",
        expects="a list of texts that are not empty",
        accepts=is_given,
    )
    secret: str = _setting(
        "",
        "cookies are signed with this secret",
        expects="nothing or text of at least 32 characters",
        accepts=is_long_secret,
        secret=True,
    )
    cookie_ttl_seconds: int = _setting(
        600, "how long a browser that has passed is not challenged again", unit="seconds", minimum=30, maximum=_DAY
    )
    ipv4_prefix_length: int = _setting(
        24, "leading bits of the IPv4 address that a cookie is bound to", unit="bits", minimum=1, maximum=32
    )
    ipv6_prefix_length: int = _setting(
        64, "leading bits of the IPv6 address that a cookie is bound to", unit="bits", minimum=1, maximum=128
    )
    fallback_bytes_per_second: int = _setting(
        0,
        "the rate for browsers without JavaScript, enforced by nginx (X-Accel-Limit-Rate); 0: they get no file",
        unit="bytes",
        minimum=0,
        maximum=_MAX_BYTES,
    )
    secure_cookie: bool = _setting(True, "whether browsers send the cookie over HTTPS only")


@dataclass(frozen=True, slots=True)
class User:
    """``[[users]]``: which keys a user may write. Without any entry, every valid token may write every key."""

    name: str = _setting("", "the token's email", expects="text that is not empty", accepts=is_given)
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
        accepts=is_given,
    )
    jwt_secret: str = _setting(
        "",
        "tokens are signed with this secret; at least one of the two is required",
        expects="text that is not empty; `kci-storage secret` prints a new one",
        accepts=is_given,
        secret=True,
    )
    unified_secret: str = _setting(
        "",
        "a second secret for tokens, which other KernelCI services share",
        expects="text that is not empty",
        accepts=is_given,
        secret=True,
    )
    block_subnets: tuple[str, ...] = _setting(
        (),
        "clients whose address is in one of these subnets are refused",
        expects='a list of subnets such as "192.0.2.0/24" and "2001:db8::/32"',
        accepts=is_subnet,
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


# The keys and sections that take effect in a running server when the configuration is reloaded: those that
# kci_storage.access.policies is made from, and the certificate.
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
    """The settings of a section's dataclass (:class:`Config` for the top level), by name.

    >>> settings(LocalConfig)["storage_path"].default
    PosixPath('storage')
    """
    return {item.name: item for item in dataclasses.fields(section) if "setting" in item.metadata}


def expectation(setting: Setting, kind: Any) -> str:
    """The accepted values of a setting of the type ``kind``, in words.

    >>> expectation(settings(ServerConfig)["threads"].metadata["setting"], int)
    'a whole number from 1 to 10000'
    """
    if setting.minimum is None:
        return setting.expects or KINDS[kind]
    unit = f" of {setting.unit}" if setting.unit not in ("", "%") else ""
    return f"{KINDS[kind]}{unit} from {setting.minimum} to {setting.maximum}"


KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple[str, ...]: "a list of texts",
}
