# SPDX-License-Identifier: LGPL-2.1-or-later
"""Storage backends, found by name.

A package adds one with an entry point in the group ``kci_storage.drivers`` that names its
:class:`~kci_storage.drivers.base.Driver`. The two drivers of this package are found in the same way.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from kci_storage.config.settings import Config, ConfigError
from kci_storage.drivers.base import Driver, Sweepable

GROUP = "kci_storage.drivers"


def load(name: str) -> type[Driver]:
    """The driver class of that name.

    :raises ConfigError: there is none, or it cannot be imported, or is no driver.
    """
    found = tuple(entry_points(group=GROUP, name=name))
    if not found:
        raise ConfigError(f"driver: there is none named {name!r}; there are: {_names()}")
    driver = _imported(found[0])
    if not (isinstance(driver, type) and issubclass(driver, Driver)):
        raise ConfigError(f"driver: {name!r} is {found[0].value}, which is not a Driver")
    return driver


def sweep(config: Config) -> int:
    """Sweep the configured driver's store, in a process that has no driver yet; how many files were removed."""
    driver = load(config.driver).from_config(config)
    return driver.sweep() if isinstance(driver, Sweepable) else 0


def _names() -> str:
    return ", ".join(sorted({entry.name for entry in entry_points(group=GROUP)})) or "none, is kci-storage installed?"


def _imported(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except Exception as exc:  # an import runs the plug-in's own code, which may raise anything
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise ConfigError(f"driver: {entry.name!r} cannot be loaded: {reason}") from exc
