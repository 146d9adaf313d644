# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of a history: nothing is wrong any more, and everybody must tell the same of every key."""

from __future__ import annotations

import contextlib
import time
from functools import partial

import requests

from tests.linearizability.checker import last_lines
from tests.linearizability.clients import Client, History
from tests.linearizability.contents import LARGE, content_of
from tests.linearizability.operations import Outcome
from tests.linearizability.system import WORKERS, System
from tests.support.harness import Server, wait_until
from tests.support.wire import temporary_files

SETTLE_SECONDS = 90  # for which requests may still be under way
STALE_SECONDS = 90  # after which the servers must have noticed that the backend is back
LEFTOVER_SECONDS = 120  # after which nothing of a dead worker may be there
POLL_SECONDS = 0.2
ROUNDS = 3  # a first question may settle a doubt, which gives the version a new ETag on all machines


def settle(system: System) -> None:
    """Wait until every server runs, nothing is under way, and no machine may be behind another one."""
    for server in system.servers:
        wait_until(partial(_is_up, server), SETTLE_SECONDS, "all workers")
    wait_until(lambda: not system.is_busy(), SETTLE_SECONDS, "the end of all requests")
    wait_until_known(system)


def wait_until_known(system: System) -> None:
    """Wait until every machine has noticed what another one has done."""
    time.sleep(2 * system.mode.revalidate_after)


def _is_up(server: Server) -> bool:
    with contextlib.suppress(requests.RequestException):
        return len(server.worker_pids()) == WORKERS and requests.get(f"{server.url}/v1/health", timeout=5).ok
    return False


class Ending:
    """The questions at the end.

    :param left_blocks: keys on which another program has left uncommitted blocks.
    """

    def __init__(self, system: System, history: History, client: Client, left_blocks: set[str]):
        self._system = system
        self._history = history
        self._client = client
        self._left_blocks = left_blocks
        self._began = time.monotonic()

    def problems(self) -> list[str]:
        """What is wrong, each with the last operations of its key."""
        keys = self._history.keys
        found = [(key, self._disagreement(key)) for key in keys] + [(key, self._refusal(key)) for key in keys]
        if not any(problem for _, problem in found):
            wait_until_known(self._system)
            found = [(key, self._disagreement(key)) for key in keys]
        return [f"{problem}\n{self._context(key)}" for key, problem in found if problem]

    def _context(self, key: str) -> str:
        """What has happened to a key before these questions."""
        before = [each for each in self._history.operations if each.key == key and each.end < self._began]
        return "\n".join(last_lines(before, self._history.zero))

    def _disagreement(self, key: str) -> str | None:
        """How the servers, the listing and the backend differ; None: they do not."""
        told = self._told(key)
        for _ in range(ROUNDS):
            if len({content for content, _ in told.values()}) > 1:
                break
            if len({etag for _, etag in told.values() if etag}) <= 1:
                return None
            wait_until_known(self._system)
            told = self._told(key)
        return f"{key}: " + ", ".join(f"{name}: {content} {etag}" for name, (content, etag) in told.items())

    def _told(self, key: str) -> dict[str, tuple[int | None, str]]:
        told = {}
        for machine in range(len(self._system.servers)):
            for number in range(3 * WORKERS):
                told[f"GET {machine}.{number}"] = self._read(key, "GET", machine)
            told[f"HEAD {machine}"] = self._read(key, "HEAD", machine)
            told[f"list {machine}"] = self._listed(key, machine)
        told["backend"] = self._system.stored(key) or (None, "")
        return told

    def _read(self, key: str, method: str, machine: int) -> tuple[int | None, str]:
        deadline = time.monotonic() + STALE_SECONDS
        while True:
            operation = self._client.read(key, method, {}, machine)
            if operation is not None and operation.outcome is Outcome.DONE:
                return operation.content, operation.etag
            last = next(each for each in reversed(self._history.operations) if each.key == key)
            assert time.monotonic() < deadline, f"still no answer that is not stale: {last.line(self._history.zero)}"
            time.sleep(POLL_SECONDS)

    def _listed(self, key: str, machine: int) -> tuple[int | None, str]:
        operation = self._client.list_keys(key, machine)
        assert operation is not None, "no listing"
        return operation.content, operation.etag

    def _refusal(self, key: str) -> str | None:
        """Replace what GET says is there, or create it; None: it was possible."""
        deadline = time.monotonic() + STALE_SECONDS
        unknown = False  # whether a write may still land between the next read and the next write
        while True:
            known = self._client.read(key, "GET", {})
            number = self._history.new_number()
            size = LARGE[0] + LARGE[1] * number if key in self._left_blocks else 256 + number
            answer = self._client.store(key, number, content_of(key, number, size), known)
            if answer is not None and answer.status in (200, 201):
                return None
            slow = answer is None or answer.status >= 500  # a busy machine, in comparison with the short time-outs
            if not (slow or unknown) or time.monotonic() > deadline:
                break
            unknown = True
            time.sleep(POLL_SECONDS)
        condition = f"If-Match {known.etag} of {known.content}" if known and known.etag else "If-None-Match: *"
        result = f"{answer.status} {answer.body[:120]!r}" if answer else "no answer"
        return f"{key}: PUT {condition} of what GET says is there, {size} bytes: {result}"


def left_behind(server: Server) -> list[str]:
    """Temporary files that are there though nothing is under way and every worker is new enough to have swept."""
    deadline = time.monotonic() + LEFTOVER_SECONDS
    while (files := temporary_files(server)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [f"left behind: {path.relative_to(server.folder)}, locked by {server.holders(path)}" for path in files]


def close(server: Server) -> list[str]:
    """Stop, start and stop a server: its folders must be in order then, and its log without a traceback."""
    server.stop()
    server.start()
    server.wait_until_swept()
    server.stop()
    server.expected_errors.append("")  # errors of all kinds were to be expected, but none that nobody has foreseen
    problems = []
    try:
        server.assert_clean()
    except AssertionError as exc:
        problems.append(f"not clean: {exc}")
    return problems + _tracebacks(server.log())


def _tracebacks(log: str) -> list[str]:
    """The first one: the others often follow from it."""
    _, *found = log.split("Traceback (most recent call last):")
    return [f"a traceback in the log: {text[:1500]}" for text in found[:1]]
