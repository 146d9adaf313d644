# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backend that fails as it is told: an HTTP proxy in front of Azurite, with a script.

The server's ``[azure] endpoint`` is the proxy's (a shared key does not sign the host). What goes wrong is said by
:meth:`FaultProxy.inject`: which requests, how often, and what happens to them. Everything that passes is counted.

    proxy.inject(Cut(after=1000), kind="content", times=1)
"""

from __future__ import annotations

import contextlib
import math
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.azurite import Azurite

PIECE = 32 * 1024  # bytes that are passed on at a time
SECONDS = 60  # for which the proxy waits for either side
HOLD_SECONDS = 300  # for which it holds a request that is not let go: longer than any test runs

PROPERTIES, CONTENT, PUT, OTHER = "properties", "content", "put", "other"


@dataclass
class Request:
    """A request that came, and what was sent in return."""

    kind: str
    key: str
    start: int  # bytes; of a range
    stop: int | None  # bytes; None: the end
    if_match: str | None = None  # the version that alone is wanted
    operation: str = ""  # the method and, for Azure's further operations, what the query calls them
    started: float = field(default_factory=time.monotonic)
    body_bytes: int = 0  # of the answer, so far


class Reset(Exception):
    """The connection is to be reset now."""


class Fault:
    """What happens to a request. This one lets it pass."""

    interim = b""  # what is sent before the answer
    takes_whole = False  # whether the request's body is received before anything else happens

    def concerns(self, request: Request) -> bool:
        """Whether it can happen to this request at all."""
        return True

    def before(self, rule: Rule) -> bytes | None:
        """Called before the request is passed on; an answer that is given keeps it from that."""
        return None

    def answered(self, rule: Rule) -> None:
        """Called when the answer's head has come, whatever it says: the request has been carried out."""

    def head(self, lines: list[bytes]) -> list[bytes]:
        """A successful answer's status line and headers."""
        return lines

    def body(self, request: Request, pieces: Iterator[bytes], rule: Rule) -> Iterator[bytes]:
        """The answer's body."""
        return pieces


@dataclass
class Refuse(Fault):
    """The connection is reset before anything is answered."""

    def before(self, rule: Rule) -> bytes | None:
        raise Reset


@dataclass
class Delay(Fault):
    """The request is passed on only after so many seconds."""

    seconds: float

    def before(self, rule: Rule) -> bytes | None:
        time.sleep(self.seconds)
        return None


class Hold(Fault):
    """The request is passed on only when the rule is released."""

    def before(self, rule: Rule) -> bytes | None:
        rule.wait()
        return None


@dataclass
class Late(Fault):
    """The whole request is received, and is passed on later: also if the client has given it up meanwhile.

    :param seconds: until then; the rule's release ends it earlier.
    :param silence: seconds for which the answer is kept back then.
    """

    seconds: float = HOLD_SECONDS
    silence: float = 0.0
    takes_whole = True

    def before(self, rule: Rule) -> bytes | None:
        rule.wait(self.seconds)
        return None

    def answered(self, rule: Rule) -> None:
        time.sleep(self.silence)


@dataclass
class HoldAnswer(Fault):
    """The request is passed on, the answer only so many seconds later, or when the rule is released."""

    seconds: float = HOLD_SECONDS

    def answered(self, rule: Rule) -> None:
        rule.wait(self.seconds)


class DropAnswer(Fault):
    """The request is passed on; instead of an answer, the connection is reset."""

    def answered(self, rule: Rule) -> None:
        raise Reset


class Hint(Fault):
    """Interim answers come before the final one (RFC 9110, 15.2; RFC 8297)."""

    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"


@dataclass
class Say(Fault):
    """An answer of our own, such as ``Say(503, "ServerBusy")``."""

    status: int
    code: str
    retry_after: int | None = None  # seconds

    def before(self, rule: Rule) -> bytes | None:
        error = f"<Error><Code>{self.code}</Code><Message>As told.</Message></Error>"
        body = f'<?xml version="1.0" encoding="utf-8"?>{error}'.encode()
        head = f"HTTP/1.1 {self.status} Fault\r\nx-ms-error-code: {self.code}\r\nContent-Type: application/xml\r\n"
        if self.retry_after is not None:
            head += f"Retry-After: {self.retry_after}\r\n"
        return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


@dataclass
class Cut(Fault):
    """The connection ends after so many bytes of the body: by FIN, or by RST."""

    after: int
    reset: bool = False

    def body(self, request: Request, pieces: Iterator[bytes], rule: Rule) -> Iterator[bytes]:
        yield from _first(pieces, self.after)
        if self.reset:
            raise Reset
        raise EOFError


@dataclass
class Stall(Fault):
    """After so many bytes of the object, in whichever body they come, nothing comes until the rule is released."""

    after: int = 0

    def concerns(self, request: Request) -> bool:
        return request.start <= self.after and (request.stop is None or self.after < request.stop)

    def body(self, request: Request, pieces: Iterator[bytes], rule: Rule) -> Iterator[bytes]:
        position = request.start
        for piece in pieces:
            before = self.after - position
            position += len(piece)
            if 0 <= before < len(piece):
                yield piece[:before]
                rule.wait()
                piece = piece[before:]
            yield piece


@dataclass
class Flip(Fault):
    """One byte of the object is another, wherever it is read."""

    offset: int

    def body(self, request: Request, pieces: Iterator[bytes], rule: Rule) -> Iterator[bytes]:
        position = request.start
        for piece in pieces:
            there = self.offset - position
            if 0 <= there < len(piece):
                piece = piece[:there] + bytes([piece[there] ^ 0xFF]) + piece[there + 1 :]
            position += len(piece)
            yield piece


@dataclass
class Lie(Fault):
    """The Content-Length is another: so many bytes more, or fewer. The connection ends with the body."""

    by: int

    def head(self, lines: list[bytes]) -> list[bytes]:
        return [self._lied(line) for line in lines]

    def _lied(self, line: bytes) -> bytes:
        name, _, value = line.partition(b":")
        return b"%b: %d" % (name, int(value) + self.by) if name.lower() == b"content-length" else line

    def body(self, request: Request, pieces: Iterator[bytes], rule: Rule) -> Iterator[bytes]:
        yield from pieces
        raise EOFError


@dataclass
class LieOfAll(Fault):
    """The object is said to be so many bytes longer, or shorter, than it is; the body is right."""

    by: int

    def head(self, lines: list[bytes]) -> list[bytes]:
        return [self._lied(line) for line in lines]

    def _lied(self, line: bytes) -> bytes:
        head, _, size = line.rpartition(b"/")
        return b"%b/%d" % (head, int(size) + self.by) if line.lower().startswith(b"content-range:") else line


@dataclass
class Shrink(Fault):
    """Bytes are missing at the end of the body, and Content-Length agrees with that."""

    by: int

    def head(self, lines: list[bytes]) -> list[bytes]:
        self._length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")) - self.by
        return Lie(-self.by).head(lines)

    def body(self, request: Request, pieces: Iterator[bytes], rule: Rule) -> Iterator[bytes]:
        yield from _first(pieces, self._length)
        for _ in pieces:
            pass


def _first(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """So many bytes of the pieces; what is left of the last one is lost."""
    while size > 0 and (piece := next(pieces, b"")):
        yield piece[:size]
        size -= len(piece)


class Rule:
    """A fault, and whom it befalls. A test may wait for that, and end what holds or stalls."""

    def __init__(
        self, fault: Fault, kind: str | None, key: str | None, skip: int, times: float, operation: str | None = None
    ):
        self.fault = fault
        self.hits = 0
        self._kind = kind
        self._key = key
        self._skip = skip
        self._times = times
        self._operation = operation
        self._reached = threading.Event()
        self._released = threading.Event()
        self._finished = threading.Event()

    def befalls(self, request: Request) -> bool:
        """Whether it is this request's turn. The caller holds the proxy's lock."""
        if self._kind not in (None, request.kind) or self._key not in (None, request.key) or self._times <= 0:
            return False
        if self._operation not in (None, request.operation) or not self.fault.concerns(request):
            return False
        if self._skip > 0:
            self._skip -= 1
            return False
        self._times -= 1
        self.hits += 1
        return True

    def wait(self, seconds: float = HOLD_SECONDS) -> None:
        """Hold the request until the test lets it go, but no longer than this."""
        self._reached.set()
        self._released.wait(seconds)

    def wait_until_reached(self, seconds: float = SECONDS) -> None:
        """Wait for a request to be held or stalled."""
        assert self._reached.wait(seconds), "no request was held"

    def finish(self) -> None:
        """A request that it befell is over."""
        self._finished.set()

    def wait_until_finished(self, seconds: float = SECONDS) -> None:
        """Wait until a request that it befell is over: answered, or cut."""
        assert self._finished.wait(seconds), "no request was finished"

    def release(self) -> None:
        """Let go of what is held or stalled, now and in future."""
        self._released.set()

    def cease(self) -> None:
        """Nothing more befalls anybody; what is held is held on."""
        self._times = 0

    def end(self) -> None:
        """Nothing more befalls anybody, and nothing is held."""
        self.cease()
        self.release()


class FaultProxy:
    """The proxy: it listens from its making until :meth:`close`."""

    def __init__(self, backend: str):
        parts = urlsplit(backend)
        self._backend = parts.hostname, parts.port
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._next_byte = 0.0  # when the line is free again, on the monotonic clock
        self.bandwidth: float | None = None  # bytes per second of all answers together
        self.away = False  # whether nobody is answered
        self.requests: list[Request] = []
        self.running = 0  # requests that have come and are not over, be their clients still there or not
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}{parts.path}"
        threading.Thread(target=self._accept, daemon=True).start()

    # What tests say and ask

    def inject(
        self,
        fault: Fault,
        kind: str | None = CONTENT,
        key: str | None = None,
        skip: int = 0,
        times: float = math.inf,
        operation: str | None = None,
    ) -> Rule:
        """From now on, have a fault befall requests of this kind, key and operation; ``skip`` of them pass before."""
        rule = Rule(fault, kind, key, skip, times, operation)
        with self._lock:
            self._rules.append(rule)
        return rule

    def count(self, kind: str, key: str | None = None) -> int:
        """How many requests of this kind there were."""
        return len(self._seen(kind, key))

    def body_bytes(self, kind: str, key: str | None = None) -> int:
        """How many bytes of bodies were sent in return."""
        return sum(request.body_bytes for request in self._seen(kind, key))

    def _seen(self, kind: str, key: str | None) -> list[Request]:
        with self._lock:
            return [each for each in self.requests if each.kind == kind and key in (None, each.key)]

    def go_away(self) -> None:
        """Be a backend that is down: all connections are cut, and new ones get no answer."""
        self.away = True
        for sock in list(self._open):
            _shut(sock)

    def come_back(self) -> None:
        """Be up again."""
        self.away = False

    def end_all(self) -> None:
        """Nothing more befalls anybody, and nothing is held."""
        for rule in self._rules:
            rule.end()

    def close(self) -> None:
        """Stop; everything that is held is let go, and cut."""
        self.end_all()
        _shut(self._listener)
        self.go_away()

    # Passing on

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(SECONDS)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.add(client)
        try:
            with client.makefile("rb") as requests:
                while self._pass_request(client, requests):
                    pass
        except Reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        except (OSError, EOFError, ValueError):
            pass
        finally:
            self._open.discard(client)
            _shut(client)
            client.close()

    def _pass_request(self, client: socket.socket, requests: BufferedReader) -> bool:
        lines = _read_head(requests)
        if not lines:
            return False
        request = _request(lines)
        with self._lock:
            self.requests.append(request)
            rule = next((rule for rule in self._rules if rule.befalls(request)), PASS)
            self.running += 1
        try:
            self._pass_on(client, _body(requests, lines), lines, request, rule)
        finally:
            rule.finish()
            with self._lock:
                self.running -= 1
        return True

    def _pass_on(
        self, client: socket.socket, body: Iterator[bytes], lines: list[bytes], request: Request, rule: Rule
    ) -> None:
        if self.away:
            raise Reset
        if rule.fault.takes_whole:
            body = iter(list(body))
        answer = rule.fault.before(rule)
        if self.away and not rule.fault.takes_whole:
            raise Reset
        if answer is not None:
            for _ in body:
                pass
            client.sendall(answer)
            return
        # One connection for each request: Azurite closes idle ones, which would be one fault more than asked for.
        with socket.create_connection(self._backend, timeout=SECONDS) as backend, backend.makefile("rb") as answers:
            backend.sendall(_encode(lines))
            for piece in body:
                backend.sendall(piece)
            self._pass_answer(client, answers, request, rule)

    def _pass_answer(self, client: socket.socket, answers: BufferedReader, request: Request, rule: Rule) -> None:
        lines = _read_head(answers)
        if not lines:
            raise EOFError
        rule.fault.answered(rule)
        pieces = iter(()) if request.kind == PROPERTIES else _body(answers, lines)
        if b" 20" in lines[0]:
            lines = rule.fault.head(lines)
            pieces = rule.fault.body(request, pieces, rule)
        client.sendall(rule.fault.interim + _encode(lines))
        for piece in pieces:
            self._throttle(len(piece))
            request.body_bytes += len(piece)
            client.sendall(piece)

    def _throttle(self, size: int) -> None:
        if self.bandwidth is None:
            return
        with self._lock:
            self._next_byte = max(self._next_byte, time.monotonic()) + size / self.bandwidth
            wait = self._next_byte - time.monotonic()
        time.sleep(max(wait, 0))


PASS = Rule(Fault(), None, None, 0, math.inf)


@contextlib.contextmanager
def fault_proxy(azurite: Azurite) -> Iterator[FaultProxy]:
    """A proxy in front of an emulator, during the block."""
    proxy = FaultProxy(azurite.endpoint)
    try:
        yield proxy
    finally:
        proxy.close()


# HTTP, as far as it is spoken here


def _read_head(file: BufferedReader) -> list[bytes]:
    """The lines of a head; none at the end of the connection."""
    lines = []
    while (line := file.readline()) not in (b"\r\n", b""):
        lines.append(line.rstrip(b"\r\n"))
    return lines


def _encode(lines: list[bytes]) -> bytes:
    return b"\r\n".join([*lines, b"", b""])


def _header(lines: list[bytes], name: str) -> str | None:
    for line in lines[1:]:
        found, _, value = line.partition(b":")
        if found.strip().lower() == name.encode():
            return value.strip().decode()
    return None


def _body(file: BufferedReader, lines: list[bytes]) -> Iterator[bytes]:
    """A body as it comes; a chunked one with its framing."""
    if "chunked" in (_header(lines, "transfer-encoding") or ""):
        while True:
            size = file.readline()
            yield size + file.read(int(size, 16) + 2)
            if not int(size, 16):
                return
    missing = int(_header(lines, "content-length") or 0)
    while missing:
        piece = file.read1(min(PIECE, missing))
        if not piece:
            raise EOFError
        missing -= len(piece)
        yield piece


def _request(lines: list[bytes]) -> Request:
    method, target, _ = lines[0].decode().split(" ")
    url = urlsplit(target)
    key = unquote(url.path).split("/", 3)[3] if url.path.count("/") >= 3 else ""
    kinds = {"HEAD": PROPERTIES, "GET": CONTENT, "PUT": PUT}
    kind = kinds.get(method, OTHER) if key and "comp=" not in url.query.replace("comp=block", "") else OTHER
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", _header(lines, "x-ms-range") or _header(lines, "range") or "")
    start, stop = (int(asked[1]), int(asked[2]) + 1 if asked[2] else None) if asked else (0, None)
    operation = " ".join([method, *parse_qs(url.query).get("comp", [])])
    return Request(kind, key, start, stop, _header(lines, "if-match"), operation)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
