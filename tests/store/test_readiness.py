# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readiness: the backend is asked at most once a second, however many ask the server."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kci_storage.errors import BackendError, NotReady
from kci_storage.store.readiness import INTERVAL, LastAnswer, Readiness
from tests.support.harness import Server
from tests.support.wire import SECONDS, get

QUESTIONS = re.compile(r'^kci_storage_backend_operations_total\{.*operation="probe".*\} ([0-9.]+)', re.MULTILINE)


def questions(server: Server) -> float:
    """How often the server has asked its backend whether it is there."""
    return sum(float(number) for number in QUESTIONS.findall(get(server, "metrics").text))


def test_the_backend_is_asked_once_a_second_for_all(start_server: Callable[..., Server]):
    """Over all workers: two questions are a second apart, so there are no more than seconds have passed, and one."""
    server = start_server(server={"workers": 3})
    begun = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        while time.monotonic() < begun + 2.5 * INTERVAL:
            assert {answer.status_code for answer in pool.map(lambda _: get(server, "v1/ready"), range(12))} == {200}
    assert 1 <= questions(server) <= (time.monotonic() - begun) / INTERVAL + 1


class Backend:
    """A backend that answers when it may."""

    def __init__(self) -> None:
        self.asked = 0
        self.error: BackendError | None = None
        self.may_answer = threading.Event()

    def probe(self) -> None:
        self.asked += 1
        assert self.may_answer.wait(SECONDS)
        if self.error is not None:
            raise self.error


def test_all_who_ask_meanwhile_get_the_same_answer():
    backend = Backend()
    readiness = Readiness(backend.probe, LastAnswer())
    for error in (None, BackendError("gone")):
        backend.asked, backend.error = 0, error
        backend.may_answer.clear()
        begun = time.monotonic()
        with ThreadPoolExecutor(10) as pool:
            answers = [pool.submit(readiness.check) for _ in range(10)]
            time.sleep(INTERVAL / 4)
            backend.may_answer.set()
            errors = [answer.exception() for answer in answers]
        assert backend.asked <= (time.monotonic() - begun) / INTERVAL + 1
        assert [type(error) for error in errors] == [type(None) if error is None else NotReady] * 10
        time.sleep(INTERVAL)  # after which the answer is too old


def test_a_question_whose_process_is_gone_is_asked_again():
    backend, last = Backend(), LastAnswer()
    backend.may_answer.set()
    assert last.claim()  # by a process that is killed then
    Readiness(backend.probe, last).check()
    assert backend.asked == 1


def test_a_reason_is_passed_on_whole_or_cut_at_a_character():
    last = LastAnswer()
    since = time.monotonic()
    for reason in ("", "the backend is gone", "ü" * 10_000):
        last.set(reason)
        found = last.get(since)
        assert found is not None and reason.startswith(found) and (found == reason or len(found) > 1000)
    assert last.get(time.monotonic() + 1) is None
    backend = Backend()
    with pytest.raises(NotReady):
        Readiness(backend.probe, last).check()
    assert backend.asked == 0
