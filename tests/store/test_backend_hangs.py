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
    """A copy of which nobody knows whether it is still right: another upload came to an unknown end."""
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_hit_waits_for_no_backend(bench: Bench, kind: Kind) -> None:
    hit = f"{new_folder()}/hit"
    assert put(bench.server, hit, b"hit").status_code == 201
    attempts = (answered_before_the_hits(bench, kind, hit) for _ in range(ATTEMPTS))
    assert 0 in attempts, "somebody's answer came before those of the hits"


def answered_before_the_hits(bench: Bench, kind: Kind, hit: str) -> int:
    """Have the backend hang, and many ask it; how many of those are answered before some hits are."""
    folder = new_folder()
    keys = [f"{folder}/{number}" for number in range(MANY)]
    for key in keys:
        kind.prepare(bench, key)
    rule = bench.proxy.inject(kind.fault, kind.holds)
    with contextlib.ExitStack() as stack:
        stack.callback(rule.end)
        wires = [stack.enter_context(Wire(bench.server)) for _ in keys]
        for wire, key in zip(wires, keys, strict=True):
            wire.send(kind.ask(bench, key))
        wait_until(lambda: rule.hits >= kind.asked, SECONDS, "the backend to be asked")
        for _ in range(HITS):
            answer = exchange(bench.server, request("GET", f"/{hit}"))
            assert (answer.body, answer.headers["X-Cache"]) == (b"hit", "hit")
        before = 0 if kind.begins else len(answered(wires))
        rule.end()
        assert {wire.answer(kind.method).status for wire in wires} <= kind.statuses
    return before


def answered(wires: list[Wire]) -> set[Wire]:
    """Those that have been answered, at least in part."""
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
        wait_until(lambda: len(answered(wires)) == BEYOND, SECONDS, "those that are too many")
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
