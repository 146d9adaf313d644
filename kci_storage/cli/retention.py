# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands about retention: ``expire`` and ``lifecycle-policy``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kci_storage.config.settings import Config, ConfigError
from kci_storage.errors import StorageError
from kci_storage.http.sizes import readable_size
from kci_storage.retention import tags as retention
from kci_storage.server import preflight

if TYPE_CHECKING:
    from kci_storage.retention.expire import Expired, Expiry

PROGRESS_STEP = 10_000  # objects between two lines about progress


def add_to(add: Callable[[str, Callable[..., Any], str], argparse.ArgumentParser]) -> None:
    """Add the commands.

    :param add: makes a command from its name, its function and its help.
    """
    parser = add("expire", expire, "delete objects that are over the age that their retention tag allows")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be deleted")
    add("lifecycle-policy", lifecycle_policy, "print, as JSON, what Azure is to be told to do the same")


def expire(arguments: argparse.Namespace) -> int:
    """Delete expired objects, and print each key; 1 if one could not be deleted."""
    config = preflight.usable(arguments.config)
    if config.driver == "azure":
        raise ConfigError(f"{config.path}: driver: Azure deletes by itself what `kci-storage lifecycle-policy` says")
    _check_owner(config)
    expiry = _expiry(config)
    found = _would_expire(expiry) if arguments.dry_run else expiry.run()
    try:
        return _Report("would be deleted" if arguments.dry_run else "deleted", expiry).show(found)
    except StorageError as exc:
        print(f"kci-storage: {exc.message}", file=sys.stderr)
        return 1


def lifecycle_policy(arguments: argparse.Namespace) -> None:
    """Print Azure's rules."""
    config = preflight.usable(arguments.config)
    if config.driver != "azure":
        raise ConfigError(f"{config.path}: driver: expected azure; for others there is `kci-storage expire`")
    policy = retention.lifecycle_policy(config.retention, config.azure.container)
    if not policy["rules"]:
        raise ConfigError(f"{config.path}: retention.tag_value: expected an age, here or in a rule")
    print(json.dumps(policy, indent=2))


def _check_owner(config: Config) -> None:
    """Check that this process runs as the server's user, since the server must be able to use its locks."""
    for folder in (config.cache.directory, config.local.storage_path):
        with contextlib.suppress(FileNotFoundError, KeyError):
            owner = os.stat(folder).st_uid
            if owner != os.geteuid():
                raise ConfigError(f"{folder}: belongs to another user; run this as {pwd.getpwuid(owner).pw_name}")


def _expiry(config: Config) -> Expiry:
    from kci_storage.retention.expire import Expiry
    from kci_storage.services import build_services  # only now, since the import is slow

    services = build_services(config)
    return Expiry(services.driver, services.objects, config.retention.tag_key)


def _would_expire(expiry: Expiry) -> Iterable[Expired]:
    from kci_storage.retention.expire import Expired

    return map(Expired, expiry.find())


class _Report:
    """Prints the results, line by line.

    :param done: the result for an object, in words.
    :param expiry: counts the objects that have been looked at.
    """

    def __init__(self, done: str, expiry: Expiry):
        self._done = done
        self._expiry = expiry
        self._reported = 0  # objects in the last line about progress

    def show(self, found: Iterable[Expired]) -> int:
        """Print all results and a summary; the command's exit code."""
        deleted = size = failed = 0
        for item in found:
            self._progress()
            if item.failure is None:
                deleted, size = deleted + 1, size + item.info.size
                print(item.info.key, flush=True)
            else:
                failed += 1
                print(f"kci-storage: {item.info.key}: {item.failure}", file=sys.stderr)
        failures = f", {failed} failed" if failed else ""
        summary = f"{deleted} of {self._expiry.seen} objects {self._done}, {readable_size(size)}{failures}"
        print(f"kci-storage: {summary}", file=sys.stderr)
        return 1 if failed else 0

    def _progress(self) -> None:
        if self._expiry.seen - self._reported >= PROGRESS_STEP:
            self._reported = self._expiry.seen
            print(f"kci-storage: {self._reported} objects looked at", file=sys.stderr)
