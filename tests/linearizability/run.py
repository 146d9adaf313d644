# SPDX-License-Identifier: LGPL-2.1-or-later
"""One history: clients and the nemesis at work for some seconds, the ending, and the checker's verdict."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from tests.linearizability.checker import violations
from tests.linearizability.clients import SECONDS, Client, History, Version
from tests.linearizability.ending import Ending, close, left_behind, settle
from tests.linearizability.nemesis import Nemesis
from tests.linearizability.staleness import widened
from tests.linearizability.system import Mode, System, running_system
from tests.support.azurite import Azurite

CLIENTS = 7


@dataclass
class Report:
    """What came of a history."""

    mode: str
    seed: int
    operations: int = 0
    results: Counter[str] = field(default_factory=Counter)  # of requests, by kind and result
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What went wrong."""
        return "\n".join([f"mode {self.mode}, seed {self.seed}:", *self.problems])


def run_history(
    mode: Mode,
    seed: int,
    seconds: float,
    folder: Path,
    azurite: Azurite | None,
    faults: Collection[str] | None = None,
) -> Report:
    """Make one history and examine it.

    :param seed: decides what clients and nemesis do; when they do it is the machine's affair.
    :param seconds: for which they work.
    :param folder: empty, for the servers.
    :param faults: the only ones that the nemesis chooses from; None: all.
    """
    report, history, killed = Report(mode.name, seed), History(), inf
    try:
        with running_system(mode, folder, azurite) as system:
            history.zero = time.monotonic()
            nemesis = Nemesis(system, f"{seed} nemesis", faults)
            _work(system, history, nemesis, seed, seconds)
            report.faults, killed = nemesis.faults, nemesis.killed
            settle(system)
            client = Client(system, history, {}, f"{seed} ending")
            report.problems += Ending(system, history, client, nemesis.left_blocks).problems()
            report.problems += [text for server in system.servers for text in left_behind(server)]
            report.problems += [text for server in system.servers for text in close(server)]
    except Exception:  # noqa: BLE001  (it is one more thing that went wrong)
        report.problems.append(traceback.format_exc())
    found = violations(widened(history.operations, mode.revalidate_after), killed)
    report.problems += history.wrong + [wrong.text(history.zero) for wrong in found]
    report.operations, report.results = len(history.operations), history.results
    return report


def _work(system: System, history: History, nemesis: Nemesis, seed: int, seconds: float) -> None:
    """Have clients and nemesis work for some time, and heal what is broken then."""
    end_of_faults, end = threading.Event(), threading.Event()
    known: dict[str, Version] = {}
    clients = [Client(system, history, known, f"{seed} client {number}") for number in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(end,), daemon=True) for client in clients]
    harm = threading.Thread(target=nemesis.run, args=(end_of_faults,), daemon=True)
    for thread in (*threads, harm):
        thread.start()
    time.sleep(seconds)
    end_of_faults.set()
    harm.join()
    end.set()
    nemesis.heal()
    for thread in threads:
        thread.join(10 * SECONDS)
        assert not thread.is_alive(), "a client does not end"
