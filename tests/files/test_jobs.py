# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs: their reports, and that they end with the process that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kci_storage.files import durable, jobs
from kci_storage.files.jobs import Job, JobFailed, JobStopped
from tests.support.harness import wait_until
from tests.support.peers import Peer, holders, peers

TIMEOUT = 60  # seconds; every wait here ends much sooner


# What the jobs do


def count(steps: int) -> Iterator[int | None]:
    for number in range(steps):
        yield None
        yield number


def fail() -> Iterator[int]:
    yield 1
    raise ValueError("what went wrong")


def die() -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def print_something() -> Iterator[str]:
    os.system("echo from a program")
    print("from a driver", flush=True)
    yield "a report"


def niceness() -> Iterator[int]:
    yield os.nice(0)


def go_on(file: Path) -> Iterator[str]:
    """Run until stopped; the file shows that the cleanup ran."""
    sys.modules["__main__"].GRACE = TIMEOUT  # type: ignore[attr-defined]  # a busy machine, or a slow disk, may need it
    try:
        yield "begun"
        while True:
            time.sleep(0.01)
            yield None  # type: ignore[misc]
    finally:
        file.write_text("cleared up")


def report_for_ever() -> Iterator[bytes]:
    while True:
        yield bytes(100_000)


def hang() -> Iterator[str]:
    yield "begun"
    time.sleep(10 * TIMEOUT)


# For a peer

_running: list[Iterator[object]] = []


def begin_job(file: Path, lock: Path) -> int:
    """Begin a job that runs until it is stopped, and hold a lock; returns its process ID."""
    fd = durable.open_lock_file(lock)
    assert durable.try_lock(fd)
    job = Job(go_on, file, inherited=(fd,))
    reports = iter(job)
    assert next(reports) == "begun"
    _running.append(reports)
    return job.pid


def begin_reports() -> int:
    """Begin a job whose reports fill the pipe; returns its process ID."""
    job = Job(report_for_ever)
    reports = iter(job)
    next(reports)
    _running.append(reports)
    return job.pid


def is_gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


class HeldUp:
    """An argument whose unpickling never ends, so that the job cannot begin."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return held_up, ("",)


def held_up(_: str) -> None:
    time.sleep(10 * TIMEOUT)


class TestReports:
    def test_they_come_in_order_and_none_is_none(self) -> None:
        with Job(count, 100) as job:
            assert list(job) == [*range(100)]
        assert is_gone(job.pid)

    def test_a_failure_is_told_with_its_place(self) -> None:
        with Job(fail) as job, pytest.raises(JobFailed, match=r"(?s)in fail\n.*ValueError: what went wrong"):
            list(job)

    def test_a_death_is_a_failure(self) -> None:
        with Job(die) as job, pytest.raises(JobFailed, match=f"-{signal.SIGKILL.value}"):
            list(job)

    def test_what_cannot_begin_is_a_failure(self) -> None:
        with Job(count, "not a number") as job, pytest.raises(JobFailed, match="TypeError"):
            list(job)

    def test_printed_output_is_not_a_report(self, capfd: pytest.CaptureFixture[str]) -> None:
        with Job(print_something) as job:
            assert list(job) == ["a report"]
        assert sorted(capfd.readouterr().err.splitlines()) == ["from a driver", "from a program"]

    def test_others_come_first(self) -> None:
        with Job(niceness) as job:
            assert list(job) == [min(os.nice(0) + jobs.NICENESS, 19)]  # there is no more


class TestItsEnd:
    def test_one_that_is_stopped_ends_between_two_steps(self, tmp_path: Path) -> None:
        with Job(go_on, tmp_path / "file") as job:
            reports = iter(job)
            assert next(reports) == "begun"
            job.stop()
            assert (tmp_path / "file").read_text() == "cleared up"
            with pytest.raises(JobStopped):
                next(reports)

    def test_one_whose_reports_are_not_read_ends(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Its pipe is full, since the parent does not read its reports any more."""
        with Job(report_for_ever) as job:
            next(iter(job))
        assert is_gone(job.pid)
        assert capfd.readouterr().err == ""

    def test_one_that_hangs_is_ended(self) -> None:
        with Job(hang) as job:
            reports = iter(job)
            assert next(reports) == "begun"
            threading.Thread(target=job.stop).start()
            with pytest.raises(JobStopped):
                next(reports)
        assert is_gone(job.pid)

    def test_one_that_has_not_begun_ends_at_once(self) -> None:
        """A busy machine may need long to import the job's modules."""
        with Job(count, HeldUp()) as job:
            stopping = threading.Thread(target=job.stop)
            stopping.start()
            stopping.join(TIMEOUT)
            ended = is_gone(job.pid)
            if not ended:
                os.kill(job.pid, signal.SIGKILL)
        assert ended

    @pytest.mark.parametrize("number", jobs.IGNORED)
    def test_a_signal_to_the_whole_group_is_for_its_parent(self, number: int, tmp_path: Path) -> None:
        with Job(go_on, tmp_path / "file") as job:
            reports = iter(job)
            assert next(reports) == "begun"
            os.kill(job.pid, number)
            job.stop()
            assert (tmp_path / "file").read_text() == "cleared up"

    def test_it_ends_with_a_parent_that_is_killed_and_holds_its_lock_until_then(self, tmp_path: Path) -> None:
        file, lock = tmp_path / "file", tmp_path / "lock"
        with peers(1) as [peer]:
            pid = peer.call(begin_job, file, lock)
            assert sorted(holders(lock)) == sorted([peer.pid, pid])
            kill_unnoticed(peer, pid, lock)
        wait_until(lambda: is_gone(pid), TIMEOUT, "the end of the job")
        assert file.read_text() == "cleared up"
        assert holders(lock) == []

    def test_it_says_nothing_of_a_parent_that_is_killed_while_it_reports(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with peers(1) as [peer]:
            pid = peer.call(begin_reports)
            peer.kill()
        wait_until(lambda: is_gone(pid), TIMEOUT, "the end of the job")
        assert capfd.readouterr().err == ""


def kill_unnoticed(peer: Peer, pid: int, lock: Path) -> None:
    """Kill the parent while the job cannot see it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        peer.kill()
        assert holders(lock) == [pid]
    finally:
        os.kill(pid, signal.SIGCONT)
