# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scenarios: a few operations and faults in an order that chance brings about too seldom, for the same checker.

Each is a function of a :class:`Stage`. What it does by itself asserts nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from kci_storage.cache.directory import Cache
from tests.linearizability.clients import FOLDER, Client, History, Version
from tests.linearizability.ending import Ending, left_behind, settle
from tests.linearizability.system import READ_TIMEOUT, WORKERS, System, upgrade
from tests.support.faultproxy import DropAnswer, Fault, Late, Refuse, Rule
from tests.support.harness import START_SECONDS, Server, wait_until
from tests.support.wire import BOUNDARY, SECONDS, part, temporary_files

COMMIT, COMMIT_BLOCKS, DELETION = "PUT", "PUT blocklist", "DELETE"  # operations of the backend
FORM = f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
FILE = part("file0", bytes(300_000), "file")
NEAR_END = 0.9  # of the read time-out: a request that is held for so long is not given up


class Stage:
    """A system, one key, and a client of each machine."""

    def __init__(self, system: System, name: str):
        self.system = system
        self.key = f"{FOLDER}/{name}"
        self.history = History((self.key,))
        self.known: dict[str, Version] = {}
        self.clients = [Client(system, self.history, self.known, name, machine) for machine in range(self.machines)]
        self.left_blocks: set[str] = set()
        self._threads = ThreadPoolExecutor()
        self._rules: list[Rule] = []

    @property
    def machines(self) -> int:
        """How many there are."""
        return len(self.system.servers)

    @property
    def server(self) -> Server:
        """The first machine's."""
        return self.system.servers[0]

    def fault(self, fault: Fault, operation: str, times: float = 1) -> Rule:
        """From now on, have a fault befall so many of these requests about the key."""
        assert self.system.proxy is not None
        self._rules.append(self.system.proxy.inject(fault, kind=None, key=self.key, times=times, operation=operation))
        return self._rules[-1]

    def put(self, machine: int = 0) -> None:
        """Store a new content."""
        self.clients[machine].put(self.key)

    def replace(self, machine: int = 0) -> None:
        """Compare and set, by the ETag that was seen last."""
        self.clients[machine].replace(self.key)

    def delete(self, machine: int = 0) -> None:
        """Delete what is there."""
        self.clients[machine].delete(self.key)

    def read(self, machine: int = 0) -> None:
        """Have every worker of a machine answer, most probably."""
        for _ in range(4 * WORKERS):
            self.clients[machine].get(self.key)

    def look(self, machine: int = 0) -> None:
        """See what the backend has."""
        self.clients[machine].list_keys(self.key)

    def background(self, act: Callable[..., None], *args: Any) -> Future[None]:
        """Do something while the scenario goes on."""
        return self._threads.submit(act, *args)

    def evict(self, machine: int = 0) -> None:
        """Remove the copy from a machine's cache, as eviction does."""
        cache = Cache(self.system.servers[machine].cache_directory)
        with cache.writing(self.key, SECONDS):
            cache.remove(self.key)

    def let_land(self, rule: Rule) -> None:
        """Let go of a request that is held, and wait until it has been carried out."""
        rule.release()
        self.wait_for_backend()

    def wait_for_backend(self) -> None:
        """Wait until no request to the backend is under way."""
        proxy = self.system.proxy
        assert proxy is not None
        wait_until(lambda: proxy.running == 0, SECONDS, "the end of all requests to the backend")

    def end(self) -> list[str]:
        """Let go of everything, and ask everybody; what is wrong."""
        for rule in self._rules:
            rule.end()
        self._threads.shutdown()
        settle(self.system)
        client = Client(self.system, self.history, {}, "ending")
        found = Ending(self.system, self.history, client, self.left_blocks).problems()
        return found + [text for server in self.system.servers for text in left_behind(server)]


# One machine


def a_commit_lands_over_a_later_one(stage: Stage) -> None:
    """An upload times out, the next one is acknowledged, then the first one lands."""
    stage.put()
    late = stage.fault(Late(), COMMIT)
    stage.put()
    stage.put()
    stage.read()
    stage.let_land(late)
    stage.look()
    stage.evict()
    stage.read()


def a_list_of_blocks_lands_over_a_later_upload(stage: Stage) -> None:
    """The same of a large upload, which is committed by a list of its blocks."""
    stage.put()
    late = stage.fault(Late(), COMMIT_BLOCKS)
    stage.clients[0].put_large(stage.key)
    stage.clients[0].put_large(stage.key)
    stage.read()
    stage.let_land(late)
    stage.look()
    stage.evict()
    stage.read()


def a_commit_lands_after_its_doubt(stage: Stage) -> None:
    """An upload times out, readers ask the backend and find the old version, then it lands."""
    _lands_after_its_doubt(stage, COMMIT, stage.put)


def a_deletion_lands_after_its_doubt(stage: Stage) -> None:
    """The same of a deletion."""
    _lands_after_its_doubt(stage, DELETION, stage.delete)


def _lands_after_its_doubt(stage: Stage, operation: str, change: Callable[[], object]) -> None:
    stage.put()
    late = stage.fault(Late(), operation)
    change()
    stage.read()
    stage.let_land(late)
    stage.read()


def a_deletion_lands_over_a_later_upload(stage: Stage) -> None:
    """A deletion times out, an upload is acknowledged, then the deletion lands."""
    stage.put()
    late = stage.fault(Late(), DELETION)
    stage.delete()
    stage.put()
    stage.read()
    stage.let_land(late)
    stage.look()
    stage.read()


def a_new_file_lands_after_its_doubt(stage: Stage) -> None:
    """The first upload of a key times out, readers are told that there is none, then it lands."""
    late = stage.fault(Late(), COMMIT)
    stage.put()
    stage.read()
    stage.let_land(late)
    stage.look()
    stage.read()


def a_commit_lands_after_a_kill(stage: Stage) -> None:
    """The server is killed while a commit is on its way; the next one's readers find the old version; it lands."""
    stage.put()
    late = stage.fault(Late(), COMMIT)
    upload = stage.background(stage.put)
    late.wait_until_reached()
    stage.server.kill()
    upload.result()
    stage.server.start()
    stage.read()
    stage.let_land(late)
    stage.read()


def a_new_file_lands_after_a_later_one_was_deleted(stage: Stage) -> None:
    """The first upload of a key times out, the next one is acknowledged and deleted, then the first one lands."""
    late = stage.fault(Late(), COMMIT)
    stage.put()
    stage.put()
    stage.delete()
    stage.read()
    stage.let_land(late)
    stage.look()
    stage.read()


def a_deletion_lands_after_the_same_was_acknowledged(stage: Stage) -> None:
    """A deletion times out, the next one is acknowledged, a new file is stored, then the first deletion lands."""
    stage.put()
    late = stage.fault(Late(), DELETION)
    stage.delete()
    stage.delete()
    stage.put()
    stage.read()
    stage.let_land(late)
    stage.look()
    stage.read()


def a_second_doubt(stage: Stage) -> None:
    """A copy is in doubt, and asked about while another commit is on its way, whose answer is then lost."""
    stage.put()
    stage.read()
    refused = stage.fault(Refuse(), COMMIT, times=inf)
    stage.put()
    refused.cease()
    held = stage.fault(Late(NEAR_END * READ_TIMEOUT, silence=READ_TIMEOUT), COMMIT)
    upload = stage.background(stage.put)
    held.wait_until_reached()
    stage.read()
    upload.result()
    stage.wait_for_backend()
    stage.read()


def a_deletion_whose_answer_is_lost(stage: Stage) -> None:
    """It has deleted; the next try finds nothing."""
    stage.put()
    stage.fault(DropAnswer(), DELETION)
    stage.delete()


def a_record_that_is_removed_by_hand(stage: Stage) -> None:
    """Workers remember a copy, an operator removes its record but not its content, and the object is deleted."""
    stage.put()
    stage.read()
    Cache(stage.server.cache_directory).location(stage.key).record.unlink()
    stage.delete()
    stage.read()


def a_record_that_is_removed_by_hand_before_an_upload(stage: Stage) -> None:
    """The same before an upload."""
    stage.put()
    stage.read()
    Cache(stage.server.cache_directory).location(stage.key).record.unlink()
    stage.put()
    stage.read()


def blocks_of_another_program(stage: Stage) -> None:
    """It has left uncommitted blocks with short ids on the key. The large upload comes at the end."""
    assert stage.system.container is not None
    stage.system.container.get_blob_client(stage.key).stage_block("1", b"abandoned")
    stage.left_blocks.add(stage.key)


def a_worker_dies_with_files(stage: Stage) -> None:
    """One worker after the other is killed with uploads in it, some of them forms whose path has not come yet."""
    for pid in stage.server.worker_pids():
        with contextlib.ExitStack() as stack:
            for number in range(2 * WORKERS):
                stack.enter_context(_unfinished(stage, f"POST /upload HTTP/1.1\r\n{FORM}", FILE))
                stack.enter_context(_unfinished(stage, f"PUT /{stage.key}{number} HTTP/1.1\r\n", FILE))
            wait_until(lambda: len(_files(stage.server)) == 4 * WORKERS, SECONDS, "the files of uploads")
            os.kill(pid, signal.SIGKILL)
            wait_until(partial(_is_replaced, stage.server, pid), START_SECONDS, "a new worker")


def _is_replaced(server: Server, pid: int) -> bool:
    pids = server.worker_pids()
    return pid not in pids and len(pids) == WORKERS


@contextlib.contextmanager
def _unfinished(stage: Stage, head: str, body: bytes) -> Iterator[None]:
    """A request whose body does not end, during the block."""
    headers = {"Host": "storage", "Content-Length": 10**6, **stage.server.headers()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", stage.server.port), SECONDS) as connection:
        connection.sendall((head + lines + "\r\n").encode() + body)
        yield


def _files(server: Server) -> list[Path]:
    return [path for path in temporary_files(server) if path.parent.name != "locks"]


def an_upgrade_after_a_reload(stage: Stage) -> None:
    """New workers by a reload, the next master by SIGUSR2, the end of the old one; then a worker dies."""
    old = set(stage.server.worker_pids())
    stage.server.document["server"]["cache_control"] = "no-store"
    stage.server.reload()
    wait_until(lambda: not old & set(stage.server.worker_pids()), START_SECONDS, "new workers")
    upgrade(stage.server, signal.SIGQUIT)
    os.kill(stage.server.worker_pids()[0], signal.SIGKILL)
    wait_until(lambda: len(stage.server.worker_pids()) == WORKERS, START_SECONDS, "a new worker")
    stage.put()


# Two machines


def a_retry_lands_over_another_machines_upload(stage: Stage) -> None:
    """An upload is stored, but the answer is lost; another machine replaces it; then the first one tries again."""
    stage.put()
    stage.fault(DropAnswer(), COMMIT)
    retry = stage.fault(Late(NEAR_END * READ_TIMEOUT), COMMIT)
    upload = stage.background(stage.put, 0)
    retry.wait_until_reached()
    stage.look(1)
    stage.put(1)
    stage.let_land(retry)
    upload.result()
    stage.look(1)


def a_retry_of_what_another_machine_has_replaced(stage: Stage) -> None:
    """A compare-and-set is stored, but the answer is lost; it is read and replaced; its next try is not met."""
    stage.put()
    stage.fault(DropAnswer(), COMMIT)
    retry = stage.fault(Late(NEAR_END * READ_TIMEOUT), COMMIT)
    upload = stage.background(stage.replace, 0)
    retry.wait_until_reached()
    stage.look(1)
    stage.put(1)
    stage.let_land(retry)
    upload.result()


def a_deletion_by_etag_meets_a_replacement(stage: Stage) -> None:
    """A deletion by ETag is on its way when another machine replaces that version, by its ETag too."""
    stage.put()
    held = stage.fault(Late(NEAR_END * READ_TIMEOUT), DELETION)
    deletion = stage.background(stage.clients[0].delete_if, stage.key)
    held.wait_until_reached()
    stage.replace(1)
    stage.let_land(held)
    deletion.result()
    stage.look(1)


def a_commit_lands_over_another_machines_upload(stage: Stage) -> None:
    """An upload times out, another machine's is acknowledged and read everywhere, then the first one lands."""
    stage.put(0)
    late = stage.fault(Late(), COMMIT)
    stage.put(0)
    stage.put(1)
    time.sleep(1.2 * stage.system.mode.revalidate_after)
    stage.read(0)
    stage.read(1)
    stage.let_land(late)
    stage.look(1)
    time.sleep(1.2 * stage.system.mode.revalidate_after)
    stage.read(0)
    stage.read(1)


def a_commit_lands_after_its_doubt_on_another_machine(stage: Stage) -> None:
    """An upload times out, readers of both machines find the old version, then it lands."""
    stage.put(0)
    late = stage.fault(Late(), COMMIT)
    stage.put(0)
    stage.read(0)
    stage.read(1)
    stage.let_land(late)
    stage.look(1)
    time.sleep(1.2 * stage.system.mode.revalidate_after)
    stage.read(0)
    stage.read(1)


def another_machines_new_file(stage: Stage) -> None:
    """A machine is asked in vain for a file that another one then stores."""
    for _ in range(3):
        stage.read(0)
        stage.put(1)
        time.sleep(1.2 * stage.system.mode.revalidate_after)
        stage.read(0)
        stage.delete(1)
        time.sleep(1.2 * stage.system.mode.revalidate_after)


ONE_MACHINE = (
    a_commit_lands_over_a_later_one,
    a_list_of_blocks_lands_over_a_later_upload,
    a_commit_lands_after_its_doubt,
    a_deletion_lands_after_its_doubt,
    a_deletion_lands_over_a_later_upload,
    a_new_file_lands_after_its_doubt,
    a_commit_lands_after_a_kill,
    a_deletion_lands_after_the_same_was_acknowledged,
    a_second_doubt,
    a_deletion_whose_answer_is_lost,
    a_record_that_is_removed_by_hand,
    a_record_that_is_removed_by_hand_before_an_upload,
    blocks_of_another_program,
    a_worker_dies_with_files,
    an_upgrade_after_a_reload,
    a_new_file_lands_after_a_later_one_was_deleted,
)
TWO_MACHINES = (
    a_retry_lands_over_another_machines_upload,
    a_retry_of_what_another_machine_has_replaced,
    a_deletion_by_etag_meets_a_replacement,
    a_commit_lands_over_another_machines_upload,
    a_commit_lands_after_its_doubt_on_another_machine,
    another_machines_new_file,
)
LOCAL = (a_worker_dies_with_files, an_upgrade_after_a_reload)
