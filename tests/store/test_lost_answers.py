# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changes whose answer was lost, one by one: the backend carries them out late, or did so unnoticed.

docs/consistency.md says what has to hold. A proxy between the server and Azurite holds requests and answers; the
container, reached without it, is another program's or another machine's view.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest
import requests
from azure.core.exceptions import ResourceNotFoundError

from tests.support.azurite import Azurite
from tests.support.cold import MIB, Bench, cold_bench, from_each_worker, in_background
from tests.support.faultproxy import PROPERTIES, DropAnswer, Late, Rule, Say
from tests.support.harness import Server, wait_until
from tests.support.wire import SECONDS, get, new_folder, put, wait_until_tidy

READ_TIMEOUT = 3.0  # seconds after which the server gives up a request to the backend

PUT_BLOB, PUT_BLOCK_LIST, DELETE, SET_METADATA = "PUT", "PUT blocklist", "DELETE", "PUT metadata"


class Overtaken(DropAnswer):
    """The request is carried out, and its answer is lost.

    :param meanwhile: called in between.
    """

    def __init__(self, meanwhile: Callable[[], object]):
        self._meanwhile = meanwhile

    def answered(self, rule: Rule) -> None:
        self._meanwhile()
        super().answered(rule)


@pytest.fixture(scope="module")
def shared_impatient(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The one behind ``impatient``."""
    options = {"azure": {"read_timeout": READ_TIMEOUT}, "server": {"workers": 2}}
    with cold_bench(azurite, tmp_path_factory.mktemp("impatient"), options) as bench:
        yield bench


@pytest.fixture
def impatient(shared_impatient: Bench) -> Iterator[Bench]:
    """A server that soon gives up on its backend, shared by the tests: each uses a key of its own."""
    yield shared_impatient
    shared_impatient.proxy.end_all()


@pytest.fixture
def key() -> str:
    """Of an object that is not there yet."""
    return f"{new_folder()}/file.bin"


def delete(server: Server, key: str, **headers: str) -> requests.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"{server.url}/{key}"
    return requests.delete(url, headers={**server.headers(), **names}, timeout=SECONDS)


def stored(bench: Bench, key: str) -> bytes | None:
    """What the backend has."""
    with suppress(ResourceNotFoundError):
        return bench.container.download_blob(key).readall()
    return None


def read_by_each(bench: Bench, key: str) -> list[bytes | None]:
    """What a reader of each worker gets; None: 404."""

    def read() -> bytes | None:
        answer = get(bench.server, key)
        assert answer.status_code in (200, 404), answer.text
        wait_until_tidy(bench.server)  # before another worker is the only one that runs
        return answer.content if answer.ok else None

    return from_each_worker(bench.server, read)


def listed(bench: Bench, key: str) -> list[dict[str, object]]:
    answer = requests.get(f"{bench.server.url}/v1/list", {"prefix": key, "format": "json"}, timeout=SECONDS)
    return [entry for line in answer.text.splitlines() if (entry := json.loads(line))["path"] == key]


def assert_all_agree(bench: Bench, key: str) -> bytes | None:
    """Every worker, the listing and the backend have the same, and can go on from there."""
    content = stored(bench, key)
    assert read_by_each(bench, key) == [content, content]
    answer = get(bench.server, key)
    entries = listed(bench, key)
    assert [entry["etag"] for entry in entries] == ([answer.headers["ETag"]] if content is not None else [])
    condition = {"If_Match": answer.headers["ETag"]} if content is not None else {"If_None_Match": "*"}
    headers = {name.replace("_", "-"): value for name, value in condition.items()}
    assert put(bench.server, key, b"compared and set", **headers).ok
    assert read_by_each(bench, key) == [b"compared and set"] * 2
    return content


def hold(bench: Bench, key: str, operation: str) -> Rule:
    return bench.proxy.inject(Late(), None, key, times=1, operation=operation)


def let_go(rule: Rule) -> None:
    """Let a held request reach the backend, and wait for the answer that nobody wants any more."""
    rule.release()
    rule.wait_until_finished()


SIZES = {PUT_BLOB: 1000, PUT_BLOCK_LIST: 9 * MIB}


@pytest.fixture(params=SIZES)
def operation(request: pytest.FixtureRequest) -> str:
    """How an upload is committed."""
    name: str = request.param
    return name


def content(operation: str) -> bytes:
    return os.urandom(SIZES[operation])


# A change lands late


@pytest.mark.parametrize("there", [True, False], ids=["overwritten", "new"])
def test_a_late_upload_never_lands_over_a_later_one(impatient: Bench, key: str, operation: str, there: bool) -> None:
    if there:
        assert put(impatient.server, key, b"first").ok
    rule = hold(impatient, key, operation)
    assert put(impatient.server, key, content(operation)).status_code == 504
    assert put(impatient.server, key, b"third").ok
    let_go(rule)
    assert assert_all_agree(impatient, key) == b"third"


def test_a_late_deletion_never_deletes_a_later_upload(impatient: Bench, key: str) -> None:
    assert put(impatient.server, key, b"first").ok
    rule = hold(impatient, key, DELETE)
    assert delete(impatient.server, key).status_code == 504
    assert put(impatient.server, key, b"second").ok
    let_go(rule)
    assert assert_all_agree(impatient, key) == b"second"


def late_change(bench: Bench, key: str, operation: str) -> Rule:
    """A change that is held, and that the client was told is unknown."""
    rule = hold(bench, key, operation)
    if operation == DELETE:
        assert delete(bench.server, key).status_code == 504
    else:
        assert put(bench.server, key, content(operation)).status_code == 504
    return rule


@pytest.mark.parametrize("change", [PUT_BLOB, PUT_BLOCK_LIST, DELETE])
def test_a_reader_between_fences_the_late_change(impatient: Bench, key: str, change: str) -> None:
    assert put(impatient.server, key, b"first").ok
    before = get(impatient.server, key)
    rule = late_change(impatient, key, change)

    def fenced() -> requests.Response | None:
        answer = get(impatient.server, key)
        assert answer.content == b"first"
        return answer if answer.headers["ETag"] != before.headers["ETag"] else None

    after = wait_until(fenced, SECONDS, "a reader to get the backend's answers in time")
    assert after.headers["X-Cache"] == "hit"
    for name in ("Content-Type", "Repr-Digest", "Content-Length"):
        assert after.headers[name] == before.headers[name]
    asked = len(impatient.proxy.requests)
    assert read_by_each(impatient, key) == [b"first"] * 2
    assert len(impatient.proxy.requests) == asked, "the doubt is over"
    let_go(rule)
    assert assert_all_agree(impatient, key) == b"first"


@pytest.mark.parametrize("change", [PUT_BLOB, PUT_BLOCK_LIST, DELETE])
def test_without_a_fence_every_reader_asks(impatient: Bench, key: str, change: str) -> None:
    """The backend does not take the write that would be a fence: the change lands after some have read."""
    assert put(impatient.server, key, b"first").ok
    impatient.proxy.inject(Say(403, "AuthorizationFailure"), None, key, operation=SET_METADATA)
    rule = late_change(impatient, key, change)
    for _ in range(2):
        asked = impatient.proxy.count(PROPERTIES, key)
        assert read_by_each(impatient, key) == [b"first"] * 2
        assert impatient.proxy.count(PROPERTIES, key) >= asked + 2
    let_go(rule)
    assert assert_all_agree(impatient, key) != b"first"


def test_each_doubt_is_a_new_one(impatient: Bench, key: str) -> None:
    """A worker that has asked after the first one asks after the second one, too."""
    assert put(impatient.server, key, b"first").ok
    rules = []
    for _ in range(2):
        rules.append(late_change(impatient, key, PUT_BLOB))
        asked = impatient.proxy.count(PROPERTIES, key)
        assert read_by_each(impatient, key) == [b"first"] * 2
        assert impatient.proxy.count(PROPERTIES, key) > asked
    for rule in rules:
        let_go(rule)
    assert assert_all_agree(impatient, key) == b"first"


def test_a_late_upload_of_a_new_key_is_seen_at_once(impatient: Bench, key: str) -> None:
    """No worker remembers that there was nothing, although each was asked a moment before."""
    rule = late_change(impatient, key, PUT_BLOB)
    assert read_by_each(impatient, key) == [None] * 2
    let_go(rule)
    assert assert_all_agree(impatient, key) is not None


@pytest.mark.expected_errors("was sent SIGKILL")
@pytest.mark.parametrize("there", [True, False], ids=["overwritten", "new"])
def test_a_writer_dies_while_its_commit_is_on_the_way(new_bench: Callable[..., Bench], key: str, there: bool) -> None:
    bench = new_bench(server={"workers": 2})
    if there:
        assert put(bench.server, key, b"first").ok
    rule = hold(bench, key, PUT_BLOB)
    workers = bench.server.worker_pids()
    threading.Thread(target=_put_quietly, args=(bench, key), daemon=True).start()
    rule.wait_until_reached()
    [writer] = [pid for pid in workers if holds(bench.server, key, pid)]
    os.kill(writer, signal.SIGKILL)
    wait_until(lambda: set(bench.server.worker_pids()) - set(workers), SECONDS, "the next worker")
    lock = bench.server.cache_directory / "locks" / _digest(key)
    wait_until(lambda: not lock.exists(), SECONDS, "the dead writer's lock to be taken over")
    assert read_by_each(bench, key) == [b"first" if there else None] * 2
    let_go(rule)
    assert_all_agree(bench, key)


def _put_quietly(bench: Bench, key: str) -> None:
    with suppress(requests.RequestException):
        put(bench.server, key, b"second")


def holds(server: Server, key: str, pid: int) -> bool:
    """Whether a worker holds the key's lock."""
    return pid in server.holders(server.cache_directory / "locks" / _digest(key))


# A change was carried out, and its answer was lost


@pytest.mark.parametrize("condition", [{}, {"If-None-Match": "*"}], ids=["blind", "create"])
def test_an_upload_whose_answer_was_lost_is_stored(
    impatient: Bench, key: str, operation: str, condition: dict[str, str]
) -> None:
    impatient.proxy.inject(DropAnswer(), None, key, times=1, operation=operation)
    expected = content(operation)
    assert put(impatient.server, key, expected, **condition).status_code == 201
    assert assert_all_agree(impatient, key) == expected


def test_a_retry_never_replaces_another_machines_upload(impatient: Bench, key: str) -> None:
    """The first try was stored and replaced since; whether it was is not known here."""
    assert put(impatient.server, key, b"first").ok
    replace = partial(impatient.store, b"another machine's", key)
    impatient.proxy.inject(Overtaken(replace), None, key, times=1, operation=PUT_BLOB)
    assert put(impatient.server, key, b"second").status_code == 502
    assert assert_all_agree(impatient, key) == b"another machine's"


def test_a_conditional_upload_that_was_stored_and_replaced_is_no_412(impatient: Bench, key: str) -> None:
    assert put(impatient.server, key, b"first").ok
    etag = get(impatient.server, key).headers["ETag"]
    replace = partial(impatient.store, b"another", key)
    impatient.proxy.inject(Overtaken(replace), None, key, times=1, operation=PUT_BLOB)
    assert put(impatient.server, key, b"second", **{"If-Match": etag}).status_code == 502
    assert assert_all_agree(impatient, key) == b"another"


def test_a_deletion_whose_answer_was_lost_is_none_that_found_nothing(impatient: Bench, key: str) -> None:
    assert put(impatient.server, key, b"first").ok
    impatient.proxy.inject(DropAnswer(), None, key, times=1, operation=DELETE)
    assert delete(impatient.server, key).status_code == 204
    assert assert_all_agree(impatient, key) is None


def test_a_conditional_deletion_whose_answer_was_lost_is_unknown(impatient: Bench, key: str) -> None:
    """Another machine may have replaced the version, and a third one deleted that."""
    assert put(impatient.server, key, b"first").ok
    etag = get(impatient.server, key).headers["ETag"]
    impatient.proxy.inject(DropAnswer(), None, key, times=1, operation=DELETE)
    assert delete(impatient.server, key, If_Match=etag).status_code == 502
    assert assert_all_agree(impatient, key) is None


# Other machines


@pytest.mark.parametrize("conditional", [True, False])
def test_a_deletion_deletes_only_what_it_has_seen(bench: Bench, key: str, conditional: bool) -> None:
    """Another machine's compare-and-set comes between the look and the deletion."""
    assert put(bench.server, key, b"first").ok
    headers = {"If_Match": get(bench.server, key).headers["ETag"]} if conditional else {}
    rule = hold(bench, key, DELETE)
    deletion = in_background(lambda: delete(bench.server, key, **headers))
    rule.wait_until_reached()
    bench.store(b"another machine's", key)
    let_go(rule)
    assert deletion.result().status_code == (412 if conditional else 204)
    assert stored(bench, key) == (b"another machine's" if conditional else None)


def test_an_overwrite_replaces_what_another_machine_has_stored(bench: Bench, key: str) -> None:
    """The copy's version is out of date: that is found out, and costs more requests."""
    assert put(bench.server, key, b"first").ok
    bench.store(b"another machine's", key)
    assert put(bench.server, key, b"second").status_code == 200
    assert stored(bench, key) == b"second"


# Records removed by hand


@pytest.mark.parametrize("change", ["DELETE", "PUT"])
def test_a_record_removed_by_hand_is_not_remembered_after_a_change(bench: Bench, key: str, change: str) -> None:
    assert put(bench.server, key, b"first").ok
    assert from_each_worker(bench.server, lambda: get(bench.server, key).content) == [b"first"] * 3
    [record] = bench.server.cache_directory.glob(f"??/{_digest(key)}.json")
    record.unlink()
    if change == "DELETE":
        assert delete(bench.server, key).status_code == 204
        assert from_each_worker(bench.server, lambda: get(bench.server, key).status_code) == [404] * 3
    else:
        assert put(bench.server, key, b"second").ok
        assert from_each_worker(bench.server, lambda: get(bench.server, key).content) == [b"second"] * 3


def _digest(key: str) -> str:
    return hashlib.sha512(key.encode()).hexdigest()
