# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checker, by hand-made histories of one key: those that are possible, and those that are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.linearizability.checker import violations
from tests.linearizability.contents import LARGE, MIDDLE, SMALL, content_of, number_of, size_of
from tests.linearizability.operations import Kind, Operation, Outcome

UNKNOWN, FAILED, UNMET, ABSENT, STALE = (
    Outcome.UNKNOWN,
    Outcome.FAILED,
    Outcome.UNMET,
    Outcome.ABSENT,
    Outcome.STALE,
)


def op(kind: Kind, begin: float, end: float, outcome: Outcome = Outcome.DONE, **fields: Any) -> Operation:
    return Operation(kind, "key", begin, end, outcome, **fields)


def up(content: int, begin: float, end: float, outcome: Outcome = Outcome.DONE, **fields: Any) -> Operation:
    return op(Kind.PUT, begin, end, outcome, content=content, **fields)


def cas(
    expected: int, content: int, begin: float, end: float, outcome: Outcome = Outcome.DONE, **fields: Any
) -> Operation:
    return op(Kind.REPLACE, begin, end, outcome, content=content, expected=expected, **fields)


def new(content: int, begin: float, end: float, outcome: Outcome = Outcome.DONE, **fields: Any) -> Operation:
    return op(Kind.CREATE, begin, end, outcome, content=content, **fields)


def rm(begin: float, end: float, outcome: Outcome = Outcome.DONE, **fields: Any) -> Operation:
    return op(Kind.DELETE, begin, end, outcome, **fields)


def rm_if(expected: int, begin: float, end: float, outcome: Outcome = Outcome.DONE) -> Operation:
    return op(Kind.DELETE_IF, begin, end, outcome, expected=expected)


def get(content: int | None, begin: float, end: float, outcome: Outcome = Outcome.DONE, **fields: Any) -> Operation:
    return op(Kind.READ, begin, end, outcome, content=content, **fields)


def ls(content: int | None, begin: float, end: float) -> Operation:
    return op(Kind.LIST, begin, end, content=content)


CUT = {"answered": False}

POSSIBLE = {
    "nothing yet": [get(None, 0, 1)],
    "what was uploaded": [up(1, 0, 1), get(1, 2, 3)],
    "what is being uploaded": [up(1, 0, 10), get(1, 2, 3), get(1, 4, 5)],
    "not yet what is being uploaded": [up(1, 0, 1), up(2, 2, 10), get(1, 3, 4), get(1, 9, 11)],
    "first not yet, then already": [up(1, 0, 1), up(2, 2, 10), get(1, 3, 4), get(2, 5, 6)],
    "either of two at once": [up(1, 0, 10), up(2, 0, 10), get(1, 11, 12), get(1, 13, 14)],
    "one of two at once, then the other": [up(1, 0, 10), up(2, 0, 10), get(1, 1, 2), get(2, 11, 12)],
    "a failure that had no effect": [up(1, 0, 1), up(2, 2, 3, UNKNOWN), get(1, 3, 4), get(1, 100, 101)],
    "a failure that had an effect": [up(1, 0, 1), up(2, 2, 3, UNKNOWN), get(2, 3, 4), get(2, 100, 101)],
    "a failure that has a late effect": [up(1, 0, 1), up(2, 2, 3, UNKNOWN), get(1, 50, 51), get(2, 100, 101)],
    "a late effect while another upload runs": [
        up(1, 0, 5, UNKNOWN), up(2, 2, 20), get(2, 6, 7), get(1, 8, 9), get(1, 30, 31),
    ],
    "a late effect of a client that left": [up(1, 0, 1, UNKNOWN, **CUT), up(2, 2, 3), get(2, 4, 5), get(1, 6, 7)],
    "a late effect before the next upload": [up(1, 0, 1, UNKNOWN), get(None, 2, 3), up(2, 2, 9), get(1, 4, 5)],
    "a late effect after a deletion": [up(1, 0, 1, UNKNOWN), up(2, 2, 3), rm(4, 5), get(None, 6, 7), get(1, 8, 9)],
    "a reader that began before the change": [up(1, 0, 1), get(1, 2, 10), up(2, 3, 4)],
    "nothing after a deletion": [up(1, 0, 1), rm(2, 3), get(None, 4, 5)],
    "nothing during a deletion": [up(1, 0, 1), rm(2, 10), get(None, 3, 4), get(None, 5, 6)],
    "not yet nothing": [up(1, 0, 1), rm(2, 10), get(1, 3, 4)],
    "nothing after a deletion that failed": [up(1, 0, 1), rm(2, 3, UNKNOWN), get(1, 3, 4), get(None, 50, 51)],
    "a deletion and an upload at once": [up(1, 0, 1), rm(2, 10), up(2, 3, 9), get(None, 11, 12)],
    "deleted and uploaded again": [up(1, 0, 1), rm(2, 3), get(None, 4, 5), up(2, 6, 7), get(2, 8, 9)],
    "nothing while the first upload runs": [up(1, 0, 10), get(None, 1, 2), get(1, 3, 4)],
    "a deletion of nothing": [rm(0, 1, ABSENT), up(1, 2, 3), rm(4, 5), rm(6, 7, ABSENT)],
    "one of two deletions": [up(1, 0, 1), rm(2, 9), rm(2, 9, ABSENT)],
    "replaced by its ETag": [up(1, 0, 1), cas(1, 2, 2, 3), get(2, 4, 5)],
    "one of two replacements": [up(1, 0, 1), cas(1, 2, 2, 9), cas(1, 3, 2, 9, UNMET), get(2, 10, 11)],
    "an ETag of before": [up(1, 0, 1), up(2, 2, 3), cas(1, 3, 4, 5, UNMET), rm_if(1, 6, 7, UNMET)],
    "a new ETag after a failure": [up(1, 0, 1), cas(1, 2, 2, 3, UNKNOWN), get(1, 4, 5), cas(1, 3, 6, 7, UNMET)],
    "an ETag of nothing": [up(1, 0, 1), rm(2, 3), cas(1, 2, 4, 5, UNMET), rm_if(1, 6, 7, ABSENT)],
    "created": [new(1, 0, 1), new(2, 2, 3, UNMET), rm_if(1, 4, 5), new(3, 6, 7), get(3, 8, 9)],
    "created by a failure": [up(1, 0, 1, UNKNOWN), new(2, 2, 3, UNMET), get(1, 4, 5)],
    "an unseen failure is in the way": [up(1, 0, 1, UNKNOWN), new(2, 2, 3, UNMET), rm(4, 5), get(None, 6, 7)],
    "refused": [up(1, 0, 1, FAILED), get(None, 2, 3)],
    "stale, but once written": [up(1, 0, 1), up(2, 2, 3), get(1, 4, 5, STALE)],
    "stale, and it failed": [up(1, 0, 1, UNKNOWN), up(2, 2, 3), get(1, 4, 5, STALE)],
    "listed before it can be read": [up(1, 0, 1), up(2, 2, 9), ls(2, 3, 4), get(1, 5, 6)],
    "many failures": [*(up(number, number, number + 1, UNKNOWN) for number in range(60)), get(None, 99, 100)],
    "many failures that were seen": [
        *(up(number, number, number + 1, UNKNOWN) for number in range(60)),
        *(get(59 - number, 100 + 2 * number, 101 + 2 * number) for number in range(60)),
    ],
}  # fmt: skip
IMPOSSIBLE = {
    "stale after an overwrite": [up(1, 0, 1), up(2, 2, 3), get(1, 4, 5)],
    "stale after two overwrites at once": [up(1, 0, 1), up(2, 2, 5), up(3, 3, 6), get(1, 7, 8)],
    "stale after a deletion": [up(1, 0, 1), rm(2, 3), get(1, 4, 5)],
    "back to the old version": [up(1, 0, 1), up(2, 2, 10), get(2, 3, 4), get(1, 5, 6)],
    "back to the old one, both failed": [
        up(1, 0, 1, UNKNOWN), up(2, 0, 1, UNKNOWN), get(1, 1, 2), get(2, 3, 4), get(1, 5, 6),
    ],
    "back to the old one after a failure was seen": [up(1, 0, 1), up(2, 2, 3, UNKNOWN), get(2, 3, 4), get(1, 5, 6)],
    "a late effect over what was acknowledged": [up(1, 0, 1, UNKNOWN), up(2, 2, 3), get(1, 4, 5)],
    "a late deletion of what was acknowledged": [
        up(1, 0, 1), rm(2, 3, UNKNOWN), up(2, 4, 5), get(2, 6, 7), get(None, 8, 9),
    ],
    "a retry over what was acknowledged": [up(1, 0, 9), get(1, 1, 2), up(2, 3, 4), get(1, 10, 11)],
    "to and fro": [up(1, 0, 9), up(2, 0, 9), get(1, 10, 11), get(2, 12, 13)],
    "from the future": [get(1, 0, 1), up(1, 2, 3)],
    "from nowhere": [get(1, 0, 1)],
    "refused, and yet there": [up(1, 0, 1, FAILED), get(1, 2, 3)],
    "412, and yet there": [up(1, 0, 1), cas(1, 2, 2, 3, UNMET), get(2, 4, 5)],
    "nothing after an upload": [up(1, 0, 1), get(None, 2, 3)],
    "nothing after an upload that was seen": [up(1, 0, 1, UNKNOWN), get(1, 1, 2), get(None, 3, 4)],
    "nothing after an upload after a deletion": [rm(0, 1, ABSENT), up(1, 2, 3), get(None, 4, 5)],
    "nothing, and then the same again": [up(1, 0, 1), rm(2, 10), get(None, 3, 4), get(1, 5, 6)],
    "a deletion that did nothing": [up(1, 0, 1), get(1, 2, 3), rm(4, 5), get(1, 6, 7)],
    "a deletion of nothing that did something": [rm(0, 1)],
    "404, but it deleted": [up(1, 0, 1), rm(2, 3, ABSENT), get(None, 4, 5)],
    "both of two deletions": [up(1, 0, 1), rm(2, 9), rm(2, 9)],
    "both of two replacements": [up(1, 0, 1), cas(1, 2, 2, 9), cas(1, 3, 2, 9)],
    "a replacement and a deletion of one version": [up(1, 0, 1), cas(1, 2, 2, 9), rm_if(1, 2, 9)],
    "412 for the present ETag": [up(1, 0, 1), get(1, 2, 3), cas(1, 2, 4, 5, UNMET)],
    "412 to a deletion by the present ETag": [up(1, 0, 1), get(1, 2, 3), rm_if(1, 4, 5, UNMET)],
    "created over something": [up(1, 0, 1), new(2, 2, 3)],
    "not created over nothing": [new(1, 0, 1, UNMET)],
    "both of two creations": [new(1, 0, 9), new(2, 0, 9)],
    "stale, and never written": [up(1, 0, 1, FAILED), get(1, 2, 3, STALE)],
    "an old listing": [up(1, 0, 1), up(2, 2, 3), ls(1, 4, 5)],
    "a listing of nothing": [up(1, 0, 1), ls(None, 2, 3)],
    "an ETag of two contents": [up(1, 0, 1, etag="a"), up(2, 2, 3, etag="a")],
}  # fmt: skip


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible_histories_pass(name: str) -> None:
    assert violations(POSSIBLE[name]) == []


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_histories_are_found(name: str) -> None:
    [wrong] = violations(IMPOSSIBLE[name])
    assert wrong.text(0.0).startswith("key: ")


def test_keys_have_nothing_to_do_with_each_other() -> None:
    other = replace(up(2, 2, 3), key="other")
    assert violations([up(1, 0, 1), other, get(1, 4, 5)]) == []


def test_after_a_kill_an_etag_may_be_another_one() -> None:
    history = [up(1, 0, 1), get(1, 2, 3), cas(1, 2, 4, 5, UNMET)]
    assert violations(history, killed=4.5) == []
    assert len(violations(history, killed=6)) == 1


def test_the_context_is_short_and_has_the_writes_that_matter() -> None:
    history = [
        up(1, 0, 1),
        *(get(1, 2 + number, 2.5 + number) for number in range(50)),
        up(2, 60, 61),
        get(1, 62, 63),
    ]
    [wrong] = violations(history)
    lines = wrong.text(0.0).splitlines()
    assert "before it, 2 was stored" in lines[0]
    assert "PUT: 1 done" in lines[1]
    assert lines[-1].startswith("  !!")
    assert len(lines) < 20


@pytest.mark.parametrize("kind", [SMALL, MIDDLE, LARGE])
def test_a_content_is_known_by_its_size(kind: tuple[int, int]) -> None:
    number = next(number for number in range(1, 4096) if size_of(number, 0.1) == kind[0] + kind[1] * number)
    size = size_of(number, 0.1)
    assert number_of(size) == number
    content = content_of("folder/key", number, size)
    assert len(content) == size
    assert content.startswith(b"folder/key %d 0 " % number)
