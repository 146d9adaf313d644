# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests over HTTP share: connections without a library in between, forms byte by byte, and the server's log."""

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

SECONDS = 60  # for which a test waits for an answer, a line of the log, or the end of a connection: a busy machine's
BOUNDARY = "----kci-storage-test"

_PAIR = re.compile(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^\s"=\\]*)')


def new_folder() -> str:
    """A key's first segment that no other test has."""
    return f"t{secrets.token_hex(6)}"


# Connections


@dataclass
class Answer:
    """A response as it came over the wire."""

    status: int
    headers: CaseInsensitiveDict[str]
    body: bytes = b""


class Wire:
    """A connection to a server on which a test says each byte.

    :param receive_buffer: bytes that the kernel may take in while the test does not read; None: its own choice.
    """

    def __init__(self, server: Server, receive_buffer: int | None = None):
        self._socket = socket.socket()
        self._socket.settimeout(SECONDS)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.connect(("127.0.0.1", server.port))
        self._received = bytearray()

    def fileno(self) -> int:
        """The socket's descriptor, to wait for."""
        return self._socket.fileno()

    def send(self, *data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(b"".join(data))

    def end(self) -> None:
        """Say that nothing more will be sent (FIN)."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Be gone at once (RST)."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def wait_until_taken(self) -> None:
        """Wait until the server has read all that was sent; what it does next is a matter of microseconds."""
        wait_until(lambda: self._waiting_at_server() == 0, SECONDS, "the server to read what was sent")

    def _waiting_at_server(self) -> int:
        """Bytes that our end still has, or the receive queue of the other one (proc_net_tcp)."""
        ours, theirs = (f":{address[1]:04X}" for address in (self._socket.getsockname(), self._socket.getpeername()))
        queues = {}  # of bytes to send and bytes to read
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
        """The next bytes; fewer only when the connection ended."""
        while len(self._received) < size and self._receive():
            pass
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    def head(self) -> Answer:
        """The next status line and headers, be they final or not."""
        while b"\r\n\r\n" not in self._received:
            if not self._receive():
                raise AssertionError(f"the connection ended in a response's head: {self._received!r}")
        head = self._take(self._received.index(b"\r\n\r\n") + 4)
        status, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        assert status.startswith("HTTP/1.1 "), status
        pairs = (line.partition(":") for line in lines)
        return Answer(int(status.split()[1]), CaseInsensitiveDict((name, text.strip()) for name, _, text in pairs))

    def answer(self, method: str = "GET") -> Answer:
        """The next response, to a request with this method."""
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
        """The rest of a response that comes in chunks, from within one of them, encoding and all."""
        while not self._received.endswith(b"\r\n0\r\n\r\n"):
            assert self._receive(), "the connection ended between chunks"
        return self._take(len(self._received))

    def rest(self) -> bytes:
        """Everything until the connection ends, be it closed or reset."""
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
    """A request's bytes. A body brings its Content-Length along, unless the headers say something of their own."""
    fields = {"Host": "storage", **(headers or {})}
    if body is not None and not {"Content-Length", "Transfer-Encoding"} & set(fields):
        fields["Content-Length"] = len(body)
    line = method.encode() + b" " + (target.encode() if isinstance(target, str) else target) + b" HTTP/1.1\r\n"
    return line + "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode() + b"\r\n" + (body or b"")


def exchange(server: Server, data: bytes) -> Answer:
    """The answer to one request, given as bytes."""
    with Wire(server) as wire:
        wire.send(data)
        return wire.answer(data.partition(b" ")[0].decode("latin-1"))


def chunked(*pieces: bytes) -> bytes:
    """A body in chunked encoding (RFC 9112, 7.1)."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


# Forms


def part(name: str, content: bytes = b"", filename: str | bytes | None = None, *headers: str) -> bytes:
    """One part of a form, with the delimiter before it. The file name is taken as it stands, escapes and all."""
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
    """Send a form, with a token that may write everywhere."""
    return post_body(server, form(*parts), headers)


def post_body(server: Server, body: Any, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Send what may be a form."""
    return requests.post(
        f"{server.url}/upload", body, headers={**server.headers(), **FORM_TYPE, **(headers or {})}, timeout=SECONDS
    )


# Objects


def put(server: Server, key: str, body: Any, **headers: str) -> requests.Response:
    """Store a body under a key, which must be fit for a URL as it stands; ``If_Match="x"`` gives a header."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.put(f"{server.url}/{key}", body, headers={**server.headers(), **fields}, timeout=SECONDS)


def get(server: Server, key: str, headers: Mapping[str, str] | None = None) -> requests.Response:
    """Download, on a connection of its own: whichever worker is free answers. Nothing is decoded on the way."""
    return requests.get(f"{server.url}/{key}", headers={"Accept-Encoding": "identity", **(headers or {})}, timeout=60)


def keys(server: Server, prefix: str) -> list[str]:
    """The keys that the list shows under a prefix."""
    response = requests.get(f"{server.url}/v1/list", params={"prefix": prefix}, timeout=SECONDS)
    assert response.status_code == 200
    return response.text.splitlines()


def stored_by_another_program(server: Server, key: str, content: bytes) -> Path:
    """Put a file at its key, as an operator may, below the local driver's folder; its path."""
    path = server.storage_path / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def temporary_files(server: Server) -> list[Path]:
    """What uploads and fills that are running, or were not cleared away, have on the server's disk."""
    cache, storage = server.cache_directory, server.storage_path
    parts = [path for pattern in ("??/*.part", "??/*.fill*", "spool/*", "locks/*") for path in cache.glob(pattern)]
    return parts + list((storage / ".kci" / "tmp").glob("*"))


def wait_until_tidy(server: Server) -> None:
    """Wait for the end of everything that the server has in hand."""
    wait_until(lambda: not temporary_files(server), SECONDS, f"temporary files: {temporary_files(server)}")


# The log


def logfmt(line: str) -> dict[str, str]:
    """The fields of a line in logfmt.

    >>> logfmt('event=access path="/a b" ua=""')
    {'event': 'access', 'path': '/a b', 'ua': ''}

    :raises ValueError: it is no such line, or has a field twice.
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
    """The lines about one request so far, without one that is just being written."""
    whole = server.log().split("\n")[:-1]
    lines = (line for line in whole if request_id in line and line.startswith("ts="))
    return [fields for line in lines if (fields := logfmt(line))["event"] == event]


def access(server: Server, answer: Answer | requests.Response | str) -> dict[str, str]:
    """The access line of the request that was answered so, or had this X-Request-ID; it comes after the answer."""
    request_id = answer if isinstance(answer, str) else answer.headers["X-Request-ID"]
    (line,) = wait_until(lambda: logged(server, request_id, "access"), SECONDS, f"the access line of {request_id}")
    return line


# Errors


def assert_common_headers(answer: Answer | requests.Response) -> None:
    """The answer has what every answer has, whoever makes it."""
    assert parsedate_to_datetime(answer.headers["Date"]).tzinfo is not None
    assert re.fullmatch(r"[A-Za-z0-9._:+/=-]{1,128}", answer.headers["X-Request-ID"])
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert {"X-Request-ID", "Retry-After"} <= set(answer.headers["Access-Control-Expose-Headers"].split(", "))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def assert_error(answer: Answer | requests.Response, status: int, server: Server, says: Iterable[str] = ()) -> str:
    """The answer is this error: one line of text that tells what is wrong and nothing of the server's inside.

    :param says: what must be in the line.
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
