"""Whether a configuration can be used: what only the whole program knows, beyond the file's own rules.

``python -m kci_storage.server.preflight FILE`` builds the server's parts as a worker does, without serving, and says
in one line what fails. The master runs it before it gives workers a new configuration, since a worker that does not
start ends the server.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from kci_storage.access import tokens
from kci_storage.cache.directory import Cache
from kci_storage.config.settings import Config, ConfigError, load
from kci_storage.net import tls

REHEARSAL_SECONDS = 60.0  # a driver may ask its backend something when it is made


def usable(path: Path | None = None) -> Config:
    """The configuration, of which the secrets can sign and the driver is installed.

    :param path: as of :func:`kci_storage.config.settings.load`.
    :raises ConfigError: it cannot be used.
    """
    config = load(path)
    for name in ("jwt_secret", "unified_secret"):
        if (value := getattr(config, name)) and (reason := tokens.check_secret(value)):
            raise ConfigError(f"{config.path}: {name}: expected a secret that can sign tokens, but {reason}")
    _check_driver(config)
    _check_certificate(config)
    return config


def _check_certificate(config: Config) -> None:
    server = config.server
    try:
        tls.server_context(server.certfile, server.keyfile)
    except OSError as exc:
        reason = getattr(exc, "reason", None) or exc.strerror or exc
        raise ConfigError(
            f"{config.path}: server.certfile: expected a certificate and its key, in PEM, that can be read: {reason}"
        ) from None


def _check_driver(config: Config) -> None:
    installed = sorted({point.name for point in entry_points(group="kci_storage.drivers")})
    if config.driver not in installed:
        close = difflib.get_close_matches(config.driver, installed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(installed)}"
        raise ConfigError(f"{config.path}: driver: no driver {config.driver!r} is installed; {hint}")


def usable_cache(config: Config) -> Cache:
    """The cache, in a directory that was tried.

    :raises ConfigError: the directory cannot be used.
    """
    try:
        cache = Cache(config.cache.directory)
        cache.locks.prove()
    except OSError as exc:
        raise ConfigError(
            f"{config.path}: cache.directory: expected a folder on a local disk with hard links, where this user can "
            f"make files, not {config.cache.directory}: {exc.strerror}"
        ) from exc
    return cache


def rehearse(config: Config) -> None:
    """Build a server's parts from the configuration's file, in a process of its own.

    :raises ConfigError: that fails.
    """
    command = [sys.executable, "-m", "kci_storage.server.preflight", str(config.path)]
    environ = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=REHEARSAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{config.path}: the server does not start with it in {REHEARSAL_SECONDS:g} s") from None
    if done.returncode == os.EX_CONFIG:
        raise ConfigError(done.stderr.strip())
    if done.returncode != 0:
        reason = (done.stderr.strip() or "for a reason unknown").splitlines()[-1]
        raise ConfigError(f"{config.path}: the server does not start with it: {reason}")


def main() -> int:
    """Build the parts; 0 when that worked."""
    from kci_storage import app  # only here, since it needs all that the server needs

    try:
        app.build_services(usable(Path(sys.argv[1])))
    except ConfigError as exc:
        print(exc, file=sys.stderr)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
