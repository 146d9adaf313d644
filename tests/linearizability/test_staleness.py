# SPDX-License-Identifier: LGPL-2.1-or-later
"""How old a read may be: hand-made histories of two machines, whose copies are good for a second."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.linearizability.checker import violations
from tests.linearizability.operations import Kind, Operation, Outcome
from tests.linearizability.staleness import widened

PERIOD = 1.0  # seconds


def up(content: int, machine: int, begin: float, end: float) -> Operation:
    return Operation(Kind.PUT, "key", begin, end, Outcome.DONE, content, machine=machine)


def get(content: int | None, machine: int, begin: float, end: float) -> Operation:
    return Operation(Kind.READ, "key", begin, end, Outcome.DONE, content, machine=machine)


POSSIBLE = {
    "old for a second": [up(1, 0, 0, 0.1), get(1, 1, 1, 1.1), up(2, 0, 2, 2.1), get(1, 1, 3, 3.1), get(2, 1, 4, 4.1)],
    "old for as long as it took to fetch": [
        up(1, 0, 0, 0.1), get(1, 1, 1.9, 3.9), up(2, 0, 2, 2.1), get(1, 1, 4.8, 4.9),
    ],
    "nothing for a second": [get(None, 1, 0, 0.1), up(1, 0, 0.2, 0.3), get(None, 1, 1.1, 1.2)],
    "its own upload, which another one has replaced already": [
        up(1, 1, 0, 0.6), up(2, 0, 0.4, 0.5), get(1, 1, 0.7, 0.8), get(2, 1, 0.7, 0.8), get(2, 0, 0.7, 0.8),
    ],
}  # fmt: skip
IMPOSSIBLE = {
    "old for two seconds": [up(1, 0, 0, 0.1), get(1, 1, 1, 1.1), up(2, 0, 2, 2.1), get(1, 1, 4, 4.1)],
    "nothing for two seconds": [get(None, 1, 0, 0.1), up(1, 0, 0.2, 0.3), get(None, 1, 2, 2.1)],
    "older than its own upload": [up(1, 0, 0, 0.1), up(2, 1, 0.2, 0.9), get(1, 1, 1.0, 1.1)],
    "older than its own upload, which is not the last": [
        up(1, 0, 0, 0.1), up(2, 1, 0.2, 0.9), up(3, 0, 0.95, 0.99), get(1, 1, 1.0, 1.1), get(3, 0, 1.2, 1.3),
    ],
}  # fmt: skip


def numbered(history: list[Operation]) -> list[Operation]:
    return [replace(each, number=number) for number, each in enumerate(history)]


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_read_may_be_old(name: str) -> None:
    assert violations(widened(numbered(POSSIBLE[name]), PERIOD)) == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_but_not_older(name: str) -> None:
    assert len(violations(widened(numbered(IMPOSSIBLE[name]), PERIOD))) == 1


def test_one_machine_is_never_behind() -> None:
    history = numbered([up(1, 0, 0, 0.1), up(2, 0, 0.2, 0.3), get(1, 0, 0.4, 0.5)])
    assert widened(history, 0) == history
    assert len(violations(history)) == 1
