# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backend that hangs, and four times as many requests for it as there are slots: cached objects are served.

The tests compare the order: the hits are answered while all others still wait. So they do not depend on the machine's
speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from kci_storage.net import slots
from tests.store.crowds import (
    BEYOND,
    MANY,
    THREADS,
    answered,
    as_archive,
    as_delete,
    as_form,
    as_put,
    assert_refused,
)
from tests.support.azurite import Azurite
from tests.support.cold import MIB, Bench, cold_bench
from tests.support.faultproxy import CONTENT, OTHER, PROPERTIES, PUT, Fault, Hold, Refuse, Stall
from tests.support.harness import Server, wait_until
from tests.support.wire import (
    SECONDS,
    Wire,
    exchange,
    new_folder,
    put,
    request,
)

HITS = 10
ATTEMPTS = 4  # since the server gives up some waits before a busy machine goes on
CONTENT_SIZE = 2 * MIB


@pytest.fixture(scope="module")
def bench(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server with few threads."""
    options = {"server": {"workers": 1, "threads": THREADS}, "cache": {"max_fills": MANY}}
    with cold_bench(azurite, tmp_path_factory.mktemp("hangs"), options, ["event=request_failed.* 50[234]"]) as bench:
        yield bench


Ask = Callable[[Server, str], bytes]  # a request's bytes


@dataclass
class Kind:
    """A kind of request that needs the backend.

    :param ask: makes the request.
    :param holds: the kind of backend request that hangs.
    :param statuses: the possible ones once the backend has answered.
    :param prepare: stores what the request needs.
    """

    ask: Ask
    holds: str
    statuses: set[int]
    prepare: Callable[[Bench, str], object] = lambda bench, key: None
    fault: Fault = field(default_factory=Hold)
    method: str = "GET"
    begins: bool = False  # whether the answers begin before the backend hangs
    asked: int = THREADS  # the minimum number of backend requests before any of them is answered


def stored(bench: Bench, key: str) -> None:
    bench.store(b"c" * CONTENT_SIZE, key)


def doubted(bench: Bench, key: str) -> None:
    """A doubtful copy: the outcome of a later upload is unknown."""
    assert put(bench.server, key, b"content").status_code == 201
    rule = bench.proxy.inject(Refuse(), PUT, key)
    assert put(bench.server, key, b"changed").status_code >= 500
    rule.end()


def as_conditional_put(server: Server, key: str) -> bytes:
    return request("PUT", f"/{key}", {**server.headers(), "If-None-Match": "*"}, b"content")


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
    "put": Kind(as_put, PUT, {201}),
    "conditional put": Kind(as_conditional_put, PROPERTIES, {201}),
    "form": Kind(as_form, PUT, {200}),
    "archive": Kind(as_archive, PUT, {200}),
    "delete": Kind(as_delete, OTHER, {204}, stored, method="DELETE"),
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
    """Let the backend hang while many requests of each kind wait; returns how many are answered before some hits."""
    asking = [(kind, key) for kind in kinds for key in prepared(bench, kind)]
    rules = [bench.proxy.inject(kind.fault, kind.holds) for kind in kinds]
    with contextlib.ExitStack() as stack:
        for rule in rules:
            stack.callback(rule.end)
        wires = [(kind, stack.enter_context(Wire(bench.server))) for kind, _ in asking]
        for (kind, key), (_, wire) in zip(asking, wires, strict=True):
            wire.send(kind.ask(bench.server, key))
        minimum = max(kind.asked for kind in kinds)
        wait_until(lambda: sum(rule.hits for rule in rules) >= minimum, SECONDS, "the backend to be asked")
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
    """New keys, prepared for requests of a kind."""
    folder = new_folder()
    keys = [f"{folder}/{number}" for number in range(MANY)]
    for key in keys:
        kind.prepare(bench, key)
    return keys


def test_too_many_requests_are_refused_except_those_with_a_body(bench: Bench) -> None:
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
            assert_refused(bench.server, wire.answer())
        assert_refused(bench.server, exchange(bench.server, request("GET", f"/{folder}/a", {"If-Match": '"x"'})))
        for ask in (as_form, as_archive, as_put):
            assert exchange(bench.server, ask(bench.server, f"{folder}/uploaded")).status in (200, 201)
        assert exchange(bench.server, request("GET", f"/{hit}")).body == b"hit"
        assert len(answered([wire for wire in wires if wire not in refused])) == 0
        rule.end()
        assert {wire.answer().status for wire in wires if wire not in refused} == {404}
