# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nemesis: what goes wrong while clients use the servers. One random number generator decides all of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from math import inf
from pathlib import Path
from typing import Any

from azure.core.exceptions import HttpResponseError

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import last_use
from tests.linearizability.clients import KEYS
from tests.linearizability.system import System, upgrade
from tests.support.disks import fill_up
from tests.support.faultproxy import (
    CONTENT,
    OTHER,
    PROPERTIES,
    PUT,
    Cut,
    Delay,
    DropAnswer,
    Fault,
    HoldAnswer,
    Late,
    Refuse,
    Rule,
    Say,
)
from tests.support.harness import START_SECONDS, Server, wait_until

PAUSE = (0.05, 0.7)  # seconds between two faults
RULE_SECONDS = 3.0  # after which a fault that has met no request is withdrawn
# Which requests of a server to Azurite meet a fault, and how often.
TARGETS: list[tuple[dict[str, str], int]] = [
    ({"kind": PUT, "operation": "PUT"}, 8),
    ({"kind": PUT, "operation": "PUT blocklist"}, 2),
    ({"kind": PUT, "operation": "PUT block"}, 1),
    ({"kind": OTHER, "operation": "DELETE"}, 4),
    ({"kind": CONTENT}, 2),
    ({"kind": PROPERTIES}, 3),
    ({"kind": OTHER, "operation": "GET list"}, 1),
]


class Nemesis:
    """It lets faults befall a system until it is told to stop, and heals them then.

    :param only: the names of the faults to choose from; None: all that the system knows.
    """

    def __init__(self, system: System, seed: object, only: Collection[str] | None = None):
        self._system = system
        self._only = only
        self._random = random.Random(f"{seed}")
        self._later: list[tuple[threading.Timer, Callable[[], object]]] = []
        self._rules: list[Rule] = []
        self.faults: Counter[str] = Counter()
        self.left_blocks: set[str] = set()  # keys on which another program has left uncommitted blocks
        self.killed = inf  # when the first process was killed, on the monotonic clock
        self.error: BaseException | None = None

    def run(self, end: threading.Event) -> None:
        """Do harm until the end."""
        faults, weights = zip(*self._faults(), strict=True)
        try:
            while not end.wait(self._random.uniform(*PAUSE)):
                [fault] = self._random.choices(faults, weights)
                fault()
                self.faults[fault.__name__.replace("_", " ")] += 1
        except BaseException as exc:  # noqa: BLE001  (it is raised by heal)
            self.error = exc

    def _faults(self) -> list[tuple[Callable[[], None], int]]:
        faults = [
            (self.kill_worker, 3), (self.pause_worker, 3), (self.kill_server, 1), (self.reload, 1), (self.upgrade, 1),
        ]  # fmt: skip
        if self._system.proxy is not None:
            faults += [
                (self.late_request, 10), (self.held_answer, 6), (self.dropped_answer, 8), (self.refused_request, 3),
                (self.delayed_request, 4), (self.server_error, 4), (self.backend_away, 1), (self.cut_content, 1),
                (self.empty_cache, 2), (self.remove_record, 3), (self.evict, 5), (self.leave_short_blocks, 1),
            ]  # fmt: skip
        if self._system.disk is not None:
            faults.append((self.fill_disk, 4))
        return [fault for fault in faults if self._only is None or fault[0].__name__ in self._only]

    def heal(self) -> None:
        """End all faults: what is held is let go, what is paused goes on, and every server runs.

        :raises BaseException: what a fault has raised.
        """
        for timer, action in self._later:
            timer.cancel()
            action()
        for rule in self._rules:
            rule.end()
        if self.error is not None:
            raise self.error

    def _after(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something later, at the latest when all is healed. It may be done twice."""
        timer = threading.Timer(seconds, action)
        timer.daemon = True
        self._later.append((timer, action))
        timer.start()

    def _server(self) -> Server:
        return self._random.choice(self._system.servers)

    # Requests to the backend

    def _inject(self, fault: Fault, **target: Any) -> None:
        """Let a fault befall the next request, or the next few, of a kind that the generator chooses."""
        assert self._system.proxy is not None
        if not target:
            [target] = self._random.choices([kind for kind, _ in TARGETS], [weight for _, weight in TARGETS])
        rule = self._system.proxy.inject(fault, times=self._random.choice((1, 1, 1, 2, 3)), **target)
        self._rules.append(rule)
        self._after(RULE_SECONDS, rule.cease)

    def late_request(self) -> None:
        """A request is carried out only after the server has given it up, or nearly so."""
        self._inject(Late(self._random.uniform(0.5, 6.0)))

    def held_answer(self) -> None:
        """A request is carried out, but the answer does not come in time."""
        self._inject(HoldAnswer(self._random.uniform(0.5, 4.0)))

    def dropped_answer(self) -> None:
        """A request is carried out, and the connection ends without an answer."""
        self._inject(DropAnswer())

    def refused_request(self) -> None:
        """The connection ends without anything."""
        self._inject(Refuse())

    def delayed_request(self) -> None:
        """A request takes longer."""
        self._inject(Delay(self._random.uniform(0.05, 1.0)))

    def server_error(self) -> None:
        """The backend says that it cannot."""
        self._inject(self._random.choice((Say(503, "ServerBusy"), Say(500, "InternalError"))))

    def cut_content(self) -> None:
        """A content ends early."""
        self._inject(Cut(self._random.randrange(200)), kind=CONTENT)

    def backend_away(self) -> None:
        """The backend is down for a while."""
        assert self._system.proxy is not None
        self._system.proxy.go_away()
        self._after(self._random.uniform(0.3, 2.5), self._system.proxy.come_back)

    def leave_short_blocks(self) -> None:
        """Another program begins an upload with ids that are short, and never commits it."""
        assert self._system.container is not None
        key = self._random.choice(KEYS)
        with contextlib.suppress(HttpResponseError):  # an upload's own blocks are there at this moment
            self._system.container.get_blob_client(key).stage_block("1", b"abandoned")
            self.left_blocks.add(key)

    # Processes

    def kill_worker(self) -> None:
        """SIGKILL to a worker."""
        self._note_kill()
        self._signal_worker(self._server(), signal.SIGKILL)

    def pause_worker(self) -> None:
        """SIGSTOP to a worker, and SIGCONT after a while."""
        pid = self._signal_worker(self._server(), signal.SIGSTOP)
        self._after(self._random.uniform(0.3, 3.0), lambda: _signal(pid, signal.SIGCONT))

    def _signal_worker(self, server: Server, number: signal.Signals) -> int | None:
        pids = sorted(server.worker_pids())
        pid = self._random.choice(pids) if pids else None
        _signal(pid, number)
        return pid

    def _note_kill(self) -> None:
        self.killed = min(self.killed, time.monotonic())

    def kill_server(self) -> None:
        """SIGKILL to a whole server, and a new start."""
        self._note_kill()
        server = self._server()
        server.kill()
        server.start()

    def reload(self) -> None:
        """SIGHUP, after a change for which there must be new workers."""
        self._reload(self._server())

    def _reload(self, server: Server) -> None:
        server.document["server"]["cache_control"] = f"public, max-age={self._random.randrange(10**6)}"
        server.reload()

    def upgrade(self) -> None:
        """SIGUSR2, and the end of the old master; before that a reload, or not."""
        self._note_kill()  # SIGQUIT waits for nothing
        server = self._server()
        if self._random.random() < 0.5:
            old = set(server.worker_pids())
            self._reload(server)
            wait_until(lambda: not old & set(server.worker_pids()), START_SECONDS, "new workers")
        upgrade(server, self._random.choice((signal.SIGQUIT, signal.SIGTERM)))

    # The cache directory

    def _cached(self, suffix: str) -> tuple[Path, list[Path]]:
        directory = self._server().cache_directory
        return directory, sorted(directory.glob(f"??/*{suffix}"))

    def empty_cache(self) -> None:
        """An operator removes all copies while the server runs."""
        _, files = self._cached(".*[an]")  # contents and records
        for file in self._random.sample(files, len(files)):
            file.unlink(missing_ok=True)

    def remove_record(self) -> None:
        """An operator removes one record, but not its content."""
        _, records = self._cached(".json")
        if records:
            self._random.choice(records).unlink(missing_ok=True)

    def evict(self) -> None:
        """A copy is evicted, young as it is."""
        directory, contents = self._cached(".data")
        if contents:
            content = self._random.choice(contents)
            with contextlib.suppress(FileNotFoundError):
                Cache(directory).evict(content, last_use(content.stat()))

    # The disk

    def fill_disk(self) -> None:
        """There is no room for a while."""
        assert self._system.disk is not None
        ballast = fill_up(self._system.disk)
        self._after(self._random.uniform(0.3, 2.0), lambda: ballast.unlink(missing_ok=True))


def _signal(pid: int | None, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone, or not be there at all."""
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, number)
