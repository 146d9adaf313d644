# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of a configuration that need other parts of the program: secrets, the driver, the certificate."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from pathlib import Path

from kci_storage.access import tokens
from kci_storage.config.reading import load
from kci_storage.config.settings import Config, ConfigError
from kci_storage.net import tls


def usable(path: Path | None = None) -> Config:
    """Load a configuration, and check that its secrets can sign, and that driver and certificate can be loaded.

    :param path: as for :func:`kci_storage.config.reading.load`.
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
