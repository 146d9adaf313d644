# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the server sends for an application's response (RFC 9112; kci_storage/server/response.py)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from kci_storage.server.response import PIECE_SIZE, Response, WrappedFile

LENGTH = ("Content-Length", "5")


class Client:
    """A client's socket that accepts all data."""

    def __init__(self) -> None:
        self.taken = b""

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.taken += bytes(data)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        with Path(file.name).open("rb") as content:
            content.seek(offset)
            data = content.read(-1 if count is None else count)
        self.sendall(data)
        return len(data)

    @property
    def head(self) -> dict[str, str]:
        lines = self.taken.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        return dict(line.split(": ", 1) for line in lines)

    @property
    def body(self) -> bytes:
        return self.taken.partition(b"\r\n\r\n")[2]


def respond(
    headers: list[tuple[str, str]],
    body: Any = (b"", b"hello", b""),
    method: str = "GET",
    version: tuple[int, int] = (1, 1),
    status: str = "200 OK",
) -> tuple[Response, Client]:
    client = Client()
    response = Response(client, method, version, keep=True)
    response.start_response(status, headers)
    response.send(body)
    return response, client


def test_a_body_with_a_length_is_sent_as_it_is():
    response, client = respond([LENGTH, ("X-A", "b")])
    assert client.taken.startswith(b"HTTP/1.1 200 OK\r\nServer: ")
    assert (client.head["Connection"], client.head["X-A"], client.body, response.keep) == (
        "keep-alive", "b", b"hello", True,
    )  # fmt: skip


def test_a_body_without_a_length_is_sent_in_chunks():
    response, client = respond([])
    assert (client.head["Transfer-Encoding"], response.keep) == ("chunked", True)
    assert client.body == b"5\r\nhello\r\n0\r\n\r\n"


def test_for_an_old_client_it_ends_with_the_connection():
    response, client = respond([], version=(1, 0))
    assert client.taken.startswith(b"HTTP/1.0 200 OK\r\n")
    assert "Transfer-Encoding" not in client.head
    assert (client.head["Connection"], client.body, response.keep) == ("close", b"hello", False)


@pytest.mark.parametrize(
    ("method", "status", "has_length"),
    [("HEAD", "200 OK", True), ("GET", "204 No Content", False), ("GET", "304 Not Modified", True)],
)
def test_some_responses_have_no_body(method: str, status: str, has_length: bool):
    response, client = respond([LENGTH], method=method, status=status)
    assert (client.body, response.keep, "Content-Length" in client.head) == (b"", True, has_length)


def test_no_more_is_sent_than_was_announced():
    response, client = respond([LENGTH], [b"hel", b"lo, world", b"!"])
    assert (client.body, response.keep) == (b"hello", True)


def test_the_connection_is_closed_after_a_body_that_is_too_short():
    response, client = respond([LENGTH], [b"hel"])
    assert (client.body, response.keep) == (b"hel", False)


def test_an_applications_connection_headers_are_dropped():
    own = [("Connection", "upgrade"), ("Date", "never"), ("server", "x"), ("Transfer-Encoding", "gzip"), ("TE", "x")]
    _, client = respond([*own, LENGTH])
    assert client.taken.lower().count(b"\r\ndate: ") == 1
    assert (client.head["Connection"], client.head["Server"]) == ("keep-alive", "gunicorn")
    assert not {"TE", "Transfer-Encoding", "server"} & client.head.keys()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (("X-A", "secret\r\nX-B: c"), "X-A"),
        (("X-A", "secret\x00"), "X-A"),
        (("X-A", "secret\u20ac"), "X-A"),
        (("X A", "b"), "X A"),
        (("X-A\n", "b"), "X-A"),
        (("", "b"), "name"),
    ],
)
def test_a_header_that_would_break_the_response_is_refused(header: tuple[str, str], says: str):
    for _ in range(2):  # the second time the result is cached
        with pytest.raises(ValueError, match=says) as failure:
            respond([header])
        assert "secret" not in str(failure.value)


@pytest.mark.parametrize("status", ["200\r\nX-A: b", "OK", "99 Few", "2000 Many"])
def test_a_status_that_would_break_the_response_is_refused(status: str):
    with pytest.raises(ValueError, match="status"):
        respond([], status=status)


def test_a_response_begins_once():
    response = Response(Client(), "GET", (1, 1), keep=True)
    with pytest.raises(AssertionError):
        response.send([b"early"])
    response = Response(Client(), "GET", (1, 1), keep=True)
    response.start_response("200 OK", [])
    with pytest.raises(AssertionError):
        response.start_response("200 OK", [])
    failure = ValueError("failed")
    response.start_response("500 Internal Server Error", [], (ValueError, failure, None))
    response.write(b"begun")
    with pytest.raises(ValueError, match="failed"):
        response.start_response("500 Internal Server Error", [], (ValueError, failure, None))


def test_a_file_is_sent_from_its_position(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"0123hello")
    with path.open("rb") as file:
        file.seek(4)
        response, client = respond([LENGTH], WrappedFile(file))
    assert (client.body, response.keep) == (b"hello", True)
    with path.open("rb") as file:
        response, client = respond([("Content-Length", "10")], WrappedFile(file))
    assert (client.body, response.keep) == (b"0123hello", False)
    with path.open("rb") as file:
        assert respond([LENGTH], WrappedFile(file), method="HEAD")[1].body == b""


def test_an_object_without_a_descriptor_is_read():
    content = bytes(PIECE_SIZE + 1)
    _, client = respond([("Content-Length", str(len(content)))], WrappedFile(io.BytesIO(content)))
    assert client.body == content
