# SPDX-License-Identifier: LGPL-2.1-or-later
"""The master's state, which workers inherit when they are forked, and reloading the configuration (SIGHUP).

A worker starts with the last configuration that the master found valid, since the file may be in the middle of a
change, and a worker that cannot start would end the server.

On SIGHUP the master reads the file again. If it is not valid, the log says why, and nothing changes. Otherwise:

- The workers apply the sections in :data:`~kci_storage.config.settings.RELOADABLE`. Requests that have begun are not
  affected.
- If other sections have changed, new workers replace the old ones, which finish their requests (for up to gunicorn's
  ``graceful_timeout``).
- The settings in :data:`AT_START` only take effect at the next start, and the log says so.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import threading
from collections.abc import Callable, Iterator

from kci_storage import logfmt, services
from kci_storage.access.limits import Ledger
from kci_storage.config.settings import RELOADABLE, SECTIONS, Config, ConfigError
from kci_storage.monitoring.metrics_folder import MetricsFolder
from kci_storage.monitoring.numbering import Numbers
from kci_storage.server import preflight, rehearsal

log = logging.getLogger(__name__)

AT_START = frozenset({"server.bind", "server.workers", "server.threads", "server.connections", "server.send_timeout"})
LOOK_SECONDS = 0.5  # between a worker's checks for a new configuration


def changes(old: Config, new: Config) -> Iterator[str]:
    """The dotted keys whose values differ; a list of sections counts as one key."""
    for field in dataclasses.fields(Config):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name in SECTIONS:
            names = (item.name for item in dataclasses.fields(SECTIONS[field.name]))
            yield from (f"{field.name}.{name}" for name in names if getattr(before, name) != getattr(after, name))
        elif before != after:
            yield field.name


class Master:
    """The master process's state.

    :param config: the configuration with which the server starts.
    :param prepare: called with each configuration, in the master and in the workers, before connections use it.
    """

    def __init__(self, config: Config, prepare: Callable[[Config], None]):
        self.prepare = prepare
        prepare(config)
        self.config = config  # the last valid one
        self.numbers = Numbers()
        self.ledger = Ledger(rows=2 * config.server.worker_count + 8)  # after a reload, old workers overlap new ones
        self.metrics: MetricsFolder  # for the workers' counters; chosen when the server is about to listen
        self.version = 0  # of ``config``: how many reloads preceded it
        self._latest_version = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")  # shared by all processes

    def reload(self, new_workers: Callable[[], None]) -> None:
        """Read the configuration again (SIGHUP). An error is logged, and nothing changes.

        :param new_workers: gunicorn's function that replaces the workers by new ones.
        """
        try:
            config = preflight.usable(self.config.path)
            changed = set(changes(self.config, config))
            needs_workers = {name for name in changed - AT_START if not _is_reloadable(name)}
            if needs_workers:
                rehearsal.rehearse(config)
            self.prepare(config)
        except (ConfigError, OSError) as exc:  # OSError: a certificate that is being replaced just now
            log.error(logfmt.line(event="reload_refused", reason=exc))
            return
        except Exception:
            log.exception("event=reload_failed")
            return
        self.config = config
        self.version += 1
        self._latest_version[0] = self.version
        log.info(logfmt.line(event="reloaded", changed=_joined(changed), new_workers=_joined(needs_workers)))
        if changed & AT_START:
            log.warning(logfmt.line(event="restart_needed", changed=_joined(changed & AT_START)))
        if needs_workers:
            new_workers()

    def follower(self, apply: Callable[[Config], None]) -> Follower:
        """A worker's thread that calls ``apply`` with each new configuration."""
        return Follower(self, apply)

    @property
    def latest_version(self) -> int:
        """The latest configuration's version, in all processes."""
        return self._latest_version[0]


def _is_reloadable(name: str) -> bool:
    return name in RELOADABLE or name.partition(".")[0] in RELOADABLE


def _joined(names: set[str]) -> str:
    return ",".join(sorted(names)) or "nothing"


def begin(config: Config, prepare: Callable[[Config], None]) -> Master:
    """Called in the master before the first fork: its state, which the workers inherit."""
    master = Master(config, prepare)
    services.parent = master
    return master


class Follower:
    """A worker's thread that applies each new configuration.

    :param master: the master's state when the worker was forked.
    :param apply: called with each new configuration.
    """

    def __init__(self, master: Master, apply: Callable[[Config], None]):
        self._master = master
        self._apply = apply
        self._seen = master.version
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="configuration", daemon=True).start()

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            version = self._master.latest_version
            if version != self._seen:
                self._seen = version
                self._take_over()

    def _take_over(self) -> None:
        try:
            config = preflight.usable(self._master.config.path)
            self._master.prepare(config)
            self._apply(config)
        except (ConfigError, OSError) as exc:  # the file has changed again since the master read it
            log.error(logfmt.line(event="reload_refused", reason=exc))
        except Exception:  # the thread must survive for later configurations
            log.exception("event=reload_failed")
        else:
            log.info(logfmt.line(event="rules_renewed"))
