# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests over HTTP: connections without an HTTP library, forms byte by byte, and the server's log."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self

import requests
from requests.structures import CaseInsensitiveDict

from tests.support.harness import Server, wait_until

SECONDS = 60  # for which a test waits for an answer, a line of the log, or a connection's end, on a busy machine
BOUNDARY = "----kci-storage-test"

_PAIR = re.compile(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]*)')


def new_folder() -> str:
    """A folder's name that no other test has."""
    return f"t{secrets.token_hex(6)}"


# Connections


@dataclass
class Answer:
    """A response as it came over the wire."""

    status: int
    headers: CaseInsensitiveDict[str]
    body: bytes = b""


class Wire:
    """A connection to a server, on which a test sends and receives bytes as they are.

    :param receive_buffer: bytes that the kernel may receive while the test does not read; None: its default.
    """

    def __init__(self, server: Server, receive_buffer: int | None = None):
        self._socket = socket.socket()
        self._socket.settimeout(SECONDS)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.connect(("127.0.0.1", server.port))
        self._received = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, *data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(b"".join(data))

    def end(self) -> None:
        """Announce that no more will be sent (FIN)."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Reset the connection (RST)."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def wait_until_taken(self) -> None:
        """Wait until the server has read all that was sent. Its next step may still be some microseconds away."""
        wait_until(lambda: self._waiting_at_server() == 0, SECONDS, "the server to read what was sent")

    def _waiting_at_server(self) -> int:
        """How many sent bytes the server has not read: those in both ends' queues (/proc/net/tcp)."""
        ours, theirs = (f":{address[1]:04X}" for address in (self._socket.getsockname(), self._socket.getpeername()))
        queues = {}  # by the addresses of both ends: the bytes to send, and to read
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, sizes, *_ = line.split()
            queues[local[-5:], remote[-5:]] = [int(size, 16) for size in sizes.split(":")]
        if not {(ours, theirs), (theirs, ours)} <= queues.keys():
            return 1  # not accepted yet
        return queues[ours, theirs][0] + queues[theirs, ours][1]

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 16)
        self._received += data
        return data

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only if the connection ends."""
        while len(self._received) < size and self._receive():
            pass
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def head(self) -> Answer:
        """The next status line and headers, of an interim (1xx) or a final response."""
        while b"\r\n\r\n" not in self._received:
            if not self._receive():
                raise AssertionError(f"the connection ended in a response's head: {self._received!r}")
        head = self._take(self._received.index(b"\r\n\r\n") + 4)
        status, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        assert status.startswith("HTTP/1.1 "), status
        pairs = (line.partition(":") for line in lines)
        return Answer(int(status.split()[1]), CaseInsensitiveDict((name, text.strip()) for name, _, text in pairs))

    def answer(self, method: str = "GET") -> Answer:
        """The next response.

        :param method: of the request.
        """
        answer = self.head()
        if method == "HEAD" or answer.status in (204, 304):
            return answer
        if "chunked" in answer.headers.get("Transfer-Encoding", ""):
            answer.body = b"".join(self._chunks())
        else:
            size = int(answer.headers["Content-Length"])
            answer.body = self.read(size)
            assert len(answer.body) == size, "the connection ended in a response's body"
        return answer

    def line(self) -> bytes:
        """The next line, without its end."""
        while b"\n" not in self._received:
            if not self._receive():
                raise AssertionError(f"the connection ended in a line: {self._received!r}")
        return self._take(self._received.index(b"\n") + 1).rstrip(b"\r\n")

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.line(), 16):
            yield self.read(size)
            assert self.line() == b""
        assert self.line() == b""

    def rest_of_chunks(self) -> bytes:
        """The rest of a chunked response, still encoded, from anywhere within a chunk."""
        while not self._received.endswith(b"\r\n0\r\n\r\n"):
            assert self._receive(), "the connection ended between chunks"
        return self._take(len(self._received))

    def rest(self) -> bytes:
        """All bytes until the connection is closed or reset."""
        with contextlib.suppress(ConnectionResetError):
            while self._receive():
                pass
        return self._take(len(self._received))

    def close(self) -> None:
        """Close."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def request(
    method: str, target: str | bytes, headers: Mapping[str, Any] | None = None, body: bytes | None = None
) -> bytes:
    """A request's bytes, with ``Content-Length`` if there is a body and the headers do not frame it themselves."""
    fields = {"Host": "storage", **(headers or {})}
    if body is not None and not {"Content-Length", "Transfer-Encoding"} & set(fields):
        fields["Content-Length"] = len(body)
    line = method.encode() + b" " + (target.encode() if isinstance(target, str) else target) + b" HTTP/1.1\r\n"
    return line + "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode() + b"\r\n" + (body or b"")


def exchange(server: Server, data: bytes) -> Answer:
    """Send one request, given as bytes; returns the answer."""
    with Wire(server) as wire:
        wire.send(data)
        return wire.answer(data.partition(b" ")[0].decode("latin-1"))


def chunked(*pieces: bytes) -> bytes:
    """A body in chunked encoding (RFC 9112, 7.1)."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


# Forms


def part(name: str, content: bytes = b"", filename: str | bytes | None = None, *headers: str) -> bytes:
    """One part of a form, with the delimiter before it. The file name is inserted as it is, without escaping."""
    disposition = f'Content-Disposition: form-data; name="{name}"'.encode()
    if filename is not None:
        disposition += b'; filename="' + (filename.encode() if isinstance(filename, str) else filename) + b'"'
    head = b"\r\n".join([f"--{BOUNDARY}".encode(), disposition, *(header.encode() for header in headers)])
    return head + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    """A whole form."""
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


FORM_TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def post(server: Server, *parts: bytes, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Upload a form, with a valid token."""
    return post_body(server, form(*parts), headers)


def post_body(server: Server, body: Any, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Upload a body as a form, valid or not."""
    return requests.post(
        f"{server.url}/upload", body, headers={**server.headers(), **FORM_TYPE, **(headers or {})}, timeout=SECONDS
    )


# Objects


def put(server: Server, key: str, body: Any, **headers: str) -> requests.Response:
    """Store a body.

    :param key: one that needs no percent-encoding.
    :param headers: further ones, with an underscore for each hyphen: ``If_Match="x"``.
    """
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.put(f"{server.url}/{key}", body, headers={**server.headers(), **fields}, timeout=SECONDS)


def get(server: Server, key: str, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Download on a new connection, so any free worker answers. The client does not offer to decompress."""
    return requests.get(f"{server.url}/{key}", headers={"Accept-Encoding": "identity", **(headers or {})}, timeout=60)


def keys(server: Server, prefix: str) -> list[str]:
    """The listed keys with a prefix."""
    response = requests.get(f"{server.url}/v1/list", params={"prefix": prefix}, timeout=SECONDS)
    assert response.status_code == 200
    return response.text.splitlines()


def stored_by_another_program(server: Server, key: str, content: bytes) -> Path:
    """Store a file in the local driver's folder without the server, as an operator may; returns its path."""
    path = server.storage_path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def temporary_files(server: Server) -> list[Path]:
    """The temporary files of uploads and fills on the server's disk: of running ones, or left behind."""
    cache, storage = server.cache_directory, server.storage_path
    parts = [path for pattern in ("??/*.part", "??/*.fill*", "spool/*", "locks/*") for path in cache.glob(pattern)]
    return parts + list((storage / ".kci" / "tmp").glob("*"))


def wait_until_tidy(server: Server) -> None:
    """Wait until the server has no temporary files."""
    wait_until(lambda: not temporary_files(server), SECONDS, f"temporary files: {temporary_files(server)}")


# The log


def logfmt(line: str) -> dict[str, str]:
    """The fields of a line in logfmt.

    >>> logfmt('event=access path="/a b" ua=""')
    {'event': 'access', 'path': '/a b', 'ua': ''}

    :raises ValueError: the line is not logfmt, or has a field twice.
    """
    pairs, position = [], 0
    while position < len(line):
        match = _PAIR.match(line, position)
        if match is None or line[match.end() : match.end() + 1] not in ("", " "):
            raise ValueError(f"not logfmt at {position}: {line}")
        pairs.append((match[1], json.loads(match[2]) if match[2].startswith('"') else match[2]))
        position = match.end() + 1
    if len(dict(pairs)) != len(pairs) or line.endswith(" "):
        raise ValueError(f"a field twice, or a blank at the end: {line}")
    return dict(pairs)


def logged(server: Server, request_id: str, event: str) -> list[dict[str, str]]:
    """One request's lines in the log so far, without a line that is still being written."""
    whole = server.log().split("\n")[:-1]
    lines = (line for line in whole if request_id in line and line.startswith("ts="))
    return [fields for line in lines if (fields := logfmt(line))["event"] == event]


def access(server: Server, answer: Answer | requests.Response | str) -> dict[str, str]:
    """The access line of a request, given by its answer or its X-Request-ID; it comes after the answer."""
    request_id = answer if isinstance(answer, str) else answer.headers["X-Request-ID"]
    (line,) = wait_until(lambda: logged(server, request_id, "access"), SECONDS, f"the access line of {request_id}")
    return line


# Errors


def assert_common_headers(answer: Answer | requests.Response) -> None:
    """Check the headers that all answers have, from whichever part of the server."""
    assert parsedate_to_datetime(answer.headers["Date"]).tzinfo is not None
    assert re.fullmatch(r"[A-Za-z0-9._:+/=-]{1,128}", answer.headers["X-Request-ID"])
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert {"X-Request-ID", "Retry-After"} <= set(answer.headers["Access-Control-Expose-Headers"].split(", "))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def assert_error(answer: Answer | requests.Response, status: int, server: Server, says: Iterable[str] = ()) -> str:
    """Check that an answer is this error: one line of text, which says nothing about the server's internals.

    :param says: texts that must be in the line.
    :returns: the line.
    """
    body = answer.body if isinstance(answer, Answer) else answer.content
    assert (answer.status if isinstance(answer, Answer) else answer.status_code) == status, body
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert_common_headers(answer)
    line = body.decode()
    if status == 401:
        assert line == "Unauthorized"
    else:
        assert line.endswith("\n") and line.strip() and len(line.splitlines()) == 1
    for secret in ("Traceback", str(server.folder), server.secret, "site-packages"):
        assert secret not in line
    for text in says:
        assert text in line
    return line.rstrip("\n")
