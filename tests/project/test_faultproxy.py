# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fault proxy: it does what a test asks of it and nothing else, on which all tests that use it rely."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.support.faultproxy import (
    CONTENT,
    OTHER,
    PROPERTIES,
    PUT,
    SECONDS,
    Cut,
    Delay,
    DropAnswer,
    Fault,
    FaultProxy,
    Flip,
    Hold,
    HoldAnswer,
    Late,
    Lie,
    LieOfAll,
    Refuse,
    Say,
    Shrink,
    Stall,
)
from tests.support.harness import wait_until

CONTENT_BYTES = random.Random(0).randbytes(200_000)  # the same in every process, as the tests' names show it


class Backend(BaseHTTPRequestHandler):
    """Sends the same content for every path, and accepts every upload."""

    protocol_version = "HTTP/1.1"
    stored = 0  # uploads that it has taken

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        body = CONTENT_BYTES[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT_BYTES) - 1}/{len(CONTENT_BYTES)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        same = self.rfile.read(size) == CONTENT_BYTES[:size]
        Backend.stored += 1
        self.send_response(201 if same else 400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """The backend's server."""

    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        pass  # the proxy has cut the connection


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """A proxy in front of a backend that never fails."""
    Backend.stored = 0
    backend = Server(("127.0.0.1", 0), Backend)
    threading.Thread(target=backend.serve_forever, args=(0.01,), daemon=True).start()
    proxy = FaultProxy(f"http://127.0.0.1:{backend.server_address[1]}/account")
    yield proxy
    proxy.close()
    backend.shutdown()
    backend.server_close()


def ask(proxy: FaultProxy, method: str = "GET", key: str = "a/b", **headers: str) -> http.client.HTTPResponse:
    """Send a request on a new connection; returns the response's head."""
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=SECONDS)
    body = CONTENT_BYTES[:70_000] if method == "PUT" else None
    connection.request(method, f"/account/container/{key}", body, headers)
    return connection.getresponse()


def received(answer: http.client.HTTPResponse) -> bytes:
    """The received part of a body, which may be incomplete."""
    try:
        return answer.read()
    except http.client.IncompleteRead as exc:
        return exc.partial


def test_without_faults_everything_passes_and_is_counted(proxy: FaultProxy) -> None:
    assert ask(proxy).read() == CONTENT_BYTES
    assert ask(proxy, key="k%C3%A4se", Range="bytes=100-", **{"If-Match": '"x"'}).read() == CONTENT_BYTES[100:]
    assert ask(proxy, "HEAD").read() == b""
    assert ask(proxy, "PUT").status == 201
    assert ask(proxy, key="?restype=container&comp=list").status == 200
    assert [each.kind for each in proxy.requests] == [CONTENT, CONTENT, PROPERTIES, PUT, OTHER]
    assert [(each.key, each.start) for each in proxy.requests][:3] == [("a/b", 0), ("käse", 100), ("a/b", 0)]
    assert [each.if_match for each in proxy.requests] == [None, '"x"', None, None, None]
    assert proxy.count(CONTENT) == 2
    assert proxy.body_bytes(CONTENT, "käse") == len(CONTENT_BYTES) - 100
    assert proxy.body_bytes(PROPERTIES) == 0


def test_a_connection_is_kept_for_the_next_request(proxy: FaultProxy) -> None:
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=SECONDS)
    for _ in range(2):
        connection.request("GET", "/account/container/a")
        assert connection.getresponse().read() == CONTENT_BYTES


@pytest.mark.parametrize(
    ("fault", "got"),
    [
        (Cut(1000), CONTENT_BYTES[:1000]),
        (Cut(0), b""),
        (Lie(10), CONTENT_BYTES),
        (Lie(-10), CONTENT_BYTES[:-10]),
        (Shrink(10), CONTENT_BYTES[:-10]),
        (Flip(100_000), CONTENT_BYTES[:100_000] + bytes([CONTENT_BYTES[100_000] ^ 0xFF]) + CONTENT_BYTES[100_001:]),
    ],
    ids=lambda value: repr(value) if isinstance(value, Fault) else str(len(value)),
)
def test_bodies_are_damaged(proxy: FaultProxy, fault: Fault, got: bytes) -> None:
    proxy.inject(fault, times=1)
    assert received(ask(proxy)) == got
    assert ask(proxy).read() == CONTENT_BYTES


@pytest.mark.parametrize(
    ("fault", "length"), [(Cut(1000), 0), (Lie(10), 10), (Lie(-10), -10), (Shrink(10), -10)], ids=repr
)
def test_lengths_are_falsified(proxy: FaultProxy, fault: Fault, length: int) -> None:
    proxy.inject(fault)
    assert int(ask(proxy).headers["Content-Length"]) == len(CONTENT_BYTES) + length


def test_the_length_of_the_object_is_falsified(proxy: FaultProxy) -> None:
    proxy.inject(LieOfAll(10))
    answer = ask(proxy, Range="bytes=100-")
    assert answer.headers["Content-Range"] == f"bytes 100-{len(CONTENT_BYTES) - 1}/{len(CONTENT_BYTES) + 10}"
    assert answer.read() == CONTENT_BYTES[100:]


def test_a_flipped_byte_is_counted_from_the_objects_beginning(proxy: FaultProxy) -> None:
    proxy.inject(Flip(500))
    assert ask(proxy, Range="bytes=400-").read()[100] == CONTENT_BYTES[500] ^ 0xFF
    assert ask(proxy, Range="bytes=501-").read() == CONTENT_BYTES[501:]


def test_a_cut_may_be_a_reset(proxy: FaultProxy) -> None:
    proxy.inject(Cut(0, reset=True))
    with pytest.raises(ConnectionResetError):
        ask(proxy).read()


def test_refused(proxy: FaultProxy) -> None:
    proxy.inject(Refuse(), kind=None, times=2)
    for method in ("GET", "PUT"):
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            ask(proxy, method)
    assert ask(proxy).read() == CONTENT_BYTES


def test_the_proxys_own_answer(proxy: FaultProxy) -> None:
    proxy.inject(Say(503, "ServerBusy"), kind=PUT)
    answer = ask(proxy, "PUT")
    assert (answer.status, answer.headers["x-ms-error-code"]) == (503, "ServerBusy")
    assert b"<Code>ServerBusy</Code>" in answer.read()
    assert ask(proxy).status == 200


def test_which_requests_get_a_fault(proxy: FaultProxy) -> None:
    rule = proxy.inject(Say(404, "BlobNotFound"), key="a", skip=1, times=2)
    statuses = [ask(proxy, key=key).status for key in ("a", "b", "a", "a", "a")]
    assert statuses == [200, 200, 404, 404, 200]
    assert rule.hits == 2


def test_a_stalled_body_goes_on_when_it_is_released(proxy: FaultProxy) -> None:
    rule = proxy.inject(Stall(50_001))
    answer = ask(proxy)
    rule.wait_until_reached()
    assert answer.read(50_001) == CONTENT_BYTES[:50_001]
    assert proxy.body_bytes(CONTENT) <= 50_001
    rule.release()
    assert answer.read() == CONTENT_BYTES[50_001:]


def test_a_stall_is_at_an_offset_in_the_object(proxy: FaultProxy) -> None:
    rule = proxy.inject(Stall(500), times=1)
    assert ask(proxy, Range="bytes=501-").read() == CONTENT_BYTES[501:]
    answer = ask(proxy, Range="bytes=400-")
    rule.wait_until_reached()
    assert answer.read(100) == CONTENT_BYTES[400:500]
    rule.release()
    assert answer.read() == CONTENT_BYTES[500:]


def test_a_held_request_has_not_reached_the_backend(proxy: FaultProxy) -> None:
    rule = proxy.inject(Hold())
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(ask(proxy).read()))
    asking.start()
    rule.wait_until_reached()
    assert answers == [] and proxy.body_bytes(CONTENT) == 0
    rule.release()
    asking.join()
    assert answers == [CONTENT_BYTES]


def test_a_late_request_is_carried_out_though_its_client_has_left(proxy: FaultProxy) -> None:
    rule = proxy.inject(Late(), kind=PUT)
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=SECONDS)
    connection.request("PUT", "/account/container/a", CONTENT_BYTES)
    rule.wait_until_reached()
    connection.close()
    assert (Backend.stored, proxy.running) == (0, 1)
    rule.release()
    wait_until(lambda: proxy.running == 0, SECONDS, "the request's end")
    assert Backend.stored == 1


def test_a_late_request_goes_on_by_itself(proxy: FaultProxy) -> None:
    proxy.inject(Late(0.1), kind=PUT)
    assert ask(proxy, "PUT").status == 201


def test_the_answer_to_a_late_request_may_be_kept_back(proxy: FaultProxy) -> None:
    proxy.inject(Late(0, silence=0.2), kind=PUT)
    started = time.monotonic()
    assert ask(proxy, "PUT").status == 201
    assert time.monotonic() - started >= 0.2


def test_an_answer_that_is_held_or_lost_is_to_a_request_that_was_carried_out(proxy: FaultProxy) -> None:
    rule = proxy.inject(HoldAnswer(), kind=PUT, times=1)
    proxy.inject(DropAnswer(), kind=PUT, times=1)
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(ask(proxy, "PUT").status))
    asking.start()
    rule.wait_until_reached()
    assert (Backend.stored, answers) == (1, [])
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask(proxy, "PUT")
    assert Backend.stored == 2
    rule.release()
    asking.join()
    assert answers == [201]


def test_an_operation_is_the_method_and_what_the_query_calls_it(proxy: FaultProxy) -> None:
    proxy.inject(Say(503, "ServerBusy"), kind=None, operation="PUT blocklist")
    assert [ask(proxy, "PUT", key=key).status for key in ("a", "a?comp=block", "a?comp=blocklist")] == [201, 201, 503]


def test_a_rule_that_has_ceased_holds_on_to_what_it_holds(proxy: FaultProxy) -> None:
    rule = proxy.inject(Late(), kind=PUT)
    asking = threading.Thread(target=ask, args=(proxy, "PUT"))
    asking.start()
    rule.wait_until_reached()
    rule.cease()
    assert ask(proxy, "PUT").status == 201
    assert Backend.stored == 1
    rule.end()
    asking.join()
    assert Backend.stored == 2


def test_delay_and_bandwidth(proxy: FaultProxy) -> None:
    proxy.inject(Delay(0.2), times=1)
    proxy.bandwidth = 500_000
    started = time.monotonic()
    assert ask(proxy).read() == CONTENT_BYTES
    assert time.monotonic() - started >= 0.2 + 0.9 * len(CONTENT_BYTES) / 500_000


def test_away_and_back(proxy: FaultProxy) -> None:
    rule = proxy.inject(Stall(1000), times=1)
    answer = ask(proxy)
    rule.wait_until_reached()
    proxy.go_away()
    rule.release()
    assert len(received(answer)) < len(CONTENT_BYTES)
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        ask(proxy)
    proxy.come_back()
    assert ask(proxy).read() == CONTENT_BYTES
