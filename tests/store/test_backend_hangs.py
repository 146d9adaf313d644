# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backend that hangs, and four times as many requests that ask it as there are slots: cached objects are served.

What is compared is the order: the hits are answered while all others still wait. So a slow machine changes nothing.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from kci_storage.net import slots
from tests.archives.test_archive import tar
from tests.support.azurite import Azurite
from tests.support.cold import MIB, Bench, cold_bench
from tests.support.faultproxy import CONTENT, OTHER, PROPERTIES, PUT, Fault, Hold, Refuse, Stall
from tests.support.harness import wait_until
from tests.support.wire import (
    FORM_TYPE,
    SECONDS,
    Answer,
    Wire,
    assert_error,
    exchange,
    form,
    new_folder,
    part,
    put,
    request,
)

THREADS = 2
MANY = 4 * THREADS
HITS = 10
BEYOND = 4
ATTEMPTS = 4  # of what the server itself does not wait for as long as a machine may stand still
CONTENT_SIZE = 2 * MIB


@pytest.fixture(scope="module")
def bench(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server with few threads."""
    options = {"server": {"workers": 1, "threads": THREADS}, "cache": {"max_fills": MANY}}
    with cold_bench(azurite, tmp_path_factory.mktemp("hangs"), options, ["event=request_failed.* 50[234]"]) as bench:
        yield bench


Ask = Callable[[Bench, str], bytes]  # a request's bytes


@dataclass
class Kind:
    """A kind of request that asks the backend.

    :param holds: which of the backend's answers it waits for.
    :param prepare: what has to be there before, for a key.
    :param statuses: of the answers when the backend has answered after all.
    """

    ask: Ask
    holds: str
    statuses: set[int]
    prepare: Callable[[Bench, str], object] = lambda bench, key: None
    fault: Fault = field(default_factory=Hold)
    method: str = "GET"
    begins: bool = False  # whether the answers have begun by then
    asked: int = THREADS  # times that the backend is asked at least, before any of them is answered


def stored(bench: Bench, key: str) -> None:
    bench.store(b"c" * CONTENT_SIZE, key)


def doubted(bench: Bench, key: str) -> None:
    """A doubtful copy: the outcome of a later upload is unknown."""
    assert put(bench.server, key, b"content").status_code == 201
    rule = bench.proxy.inject(Refuse(), PUT, key)
    assert put(bench.server, key, b"changed").status_code >= 500
    rule.end()


def headers(bench: Bench, **others: str) -> dict[str, str]:
    return {**bench.server.headers(), **{name.replace("_", "-"): value for name, value in others.items()}}


def as_form(bench: Bench, key: str) -> bytes:
    body = form(part("path"), part("file0", b"content", key))
    return request("POST", "/upload", headers(bench, **FORM_TYPE), body)


def as_archive(bench: Bench, key: str) -> bytes:
    body = form(part("path"), part("archive", tar({key: b"content"}), "a.tar"))
    return request("POST", "/v1/archive", headers(bench, **FORM_TYPE), body)


def as_conditional_put(bench: Bench, key: str) -> bytes:
    return request("PUT", f"/{key}", headers(bench, If_None_Match="*"), b"content")


KINDS = {
    "head of an absent key": Kind(lambda _, key: request("HEAD", f"/{key}"), PROPERTIES, {404}, method="HEAD"),
    "head of one key": Kind(
        lambda _, key: request("HEAD", f"/{key.split('/')[0]}/same"), PROPERTIES, {404}, method="HEAD", asked=1
    ),
    "range of a cold key": Kind(
        lambda _, key: request("GET", f"/{key}", {"Range": "bytes=0-9"}), CONTENT, {206}, prepare=stored
    ),
    "middle of a range": Kind(
        lambda _, key: request("GET", f"/{key}", {"Range": "bytes=0-99999"}),
        CONTENT,
        {206},
        prepare=stored,
        fault=Stall(50_000),
        begins=True,
    ),
    "download": Kind(lambda _, key: request("GET", f"/{key}"), CONTENT, {200}, prepare=stored),
    "list": Kind(lambda _, key: request("GET", f"/v1/list?prefix={key}"), OTHER, {200}),
    "directory": Kind(lambda _, key: request("GET", f"/{key.split('/')[0]}/"), OTHER, {200}, prepare=stored),
    "readiness": Kind(lambda *_: request("GET", "/v1/ready"), PROPERTIES, {200}),
    "put": Kind(lambda bench, key: request("PUT", f"/{key}", headers(bench), b"content"), PUT, {201}),
    "conditional put": Kind(as_conditional_put, PROPERTIES, {201}),
    "form": Kind(as_form, PUT, {200}),
    "archive": Kind(as_archive, PUT, {200}),
    "delete": Kind(
        lambda bench, key: request("DELETE", f"/{key}", headers(bench)), OTHER, {204}, stored, method="DELETE"
    ),
    "revalidation": Kind(lambda _, key: request("GET", f"/{key}"), PROPERTIES, {200}, prepare=doubted, asked=1),
}


ALONE = {name: [kind] for name, kind in KINDS.items()}


@pytest.mark.parametrize("kinds", [*ALONE.values(), [*KINDS.values()]], ids=[*ALONE, "all at once"])
def test_a_hit_waits_for_no_backend(bench: Bench, kinds: list[Kind]) -> None:
    hit = f"{new_folder()}/hit"
    assert put(bench.server, hit, b"hit").status_code == 201
    attempts = (answered_before_the_hits(bench, kinds, hit) for _ in range(ATTEMPTS))
    assert 0 in attempts, "another request was answered before the hits"


def answered_before_the_hits(bench: Bench, kinds: list[Kind], hit: str) -> int:
    """Let the backend hang while many requests of each kind wait; how many are answered before some hits."""
    asking = [(kind, key) for kind in kinds for key in prepared(bench, kind)]
    rules = [bench.proxy.inject(kind.fault, kind.holds) for kind in kinds]
    with contextlib.ExitStack() as stack:
        for rule in rules:
            stack.callback(rule.end)
        wires = [(kind, stack.enter_context(Wire(bench.server))) for kind, _ in asking]
        for (kind, key), (_, wire) in zip(asking, wires, strict=True):
            wire.send(kind.ask(bench, key))
        least = max(kind.asked for kind in kinds)
        wait_until(lambda: sum(rule.hits for rule in rules) >= least, SECONDS, "the backend to be asked")
        for _ in range(HITS):
            answer = exchange(bench.server, request("GET", f"/{hit}"))
            assert (answer.body, answer.headers["X-Cache"]) == (b"hit", "hit")
        before = len(answered([wire for kind, wire in wires if not kind.begins]))
        for rule in rules:
            rule.end()
        for kind, wire in wires:
            assert wire.answer(kind.method).status in kind.statuses
    return before


def prepared(bench: Bench, kind: Kind) -> list[str]:
    """Keys that requests of a kind may ask for."""
    folder = new_folder()
    keys = [f"{folder}/{number}" for number in range(MANY)]
    for key in keys:
        kind.prepare(bench, key)
    return keys


def answered(wires: list[Wire]) -> set[Wire]:
    """The connections on which at least a part of the answer has arrived."""
    poll = select.poll()
    by_descriptor = {wire.fileno(): wire for wire in wires}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return {by_descriptor[descriptor] for descriptor, _ in poll.poll(0)}


def test_questions_that_are_too_many_are_refused_and_bodies_are_not(bench: Bench) -> None:
    folder = new_folder()
    hit = f"{folder}/hit"
    assert put(bench.server, hit, b"hit").status_code == 201
    rule = bench.proxy.inject(Hold(), PROPERTIES)
    with contextlib.ExitStack() as stack:
        stack.callback(rule.end)
        wires = [stack.enter_context(Wire(bench.server)) for _ in range(slots.MAX_WAITING + BEYOND)]
        for number, wire in enumerate(wires):
            wire.send(request("GET", f"/{folder}/{number}", {"Range": "bytes=0-9", "If-Match": '"x"'}))
        wait_until(lambda: len(answered(wires)) == BEYOND, SECONDS, "the requests beyond the bound to be refused")
        refused = answered(wires)
        for wire in refused:
            assert_refused(bench, wire.answer())
        assert_refused(bench, exchange(bench.server, request("GET", f"/{folder}/a", {"If-Match": '"x"'})))
        for ask in (as_form, as_archive, lambda *args: request("PUT", f"/{args[1]}", headers(bench), b"content")):
            assert exchange(bench.server, ask(bench, f"{folder}/uploaded")).status in (200, 201)
        assert exchange(bench.server, request("GET", f"/{hit}")).body == b"hit"
        assert len(answered([wire for wire in wires if wire not in refused])) == 0
        rule.end()
        assert {wire.answer().status for wire in wires if wire not in refused} == {404}


def assert_refused(bench: Bench, answer: Answer) -> None:
    assert_error(answer, 503, bench.server, says=["too many requests wait"])
    assert answer.headers["Retry-After"] == "5"
