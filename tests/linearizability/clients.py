# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that use the servers over HTTP, at random, and write down what they did and saw."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import random
import re
import socket
import struct
import tarfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from email.message import Message
from typing import Any
from urllib.parse import quote

from tests.linearizability.contents import LARGE, NUMBERS, SMALLEST, content_of, number_of, size_of
from tests.linearizability.operations import CONDITIONAL, Kind, Operation, Outcome
from tests.linearizability.system import System
from tests.support.wire import FORM_TYPE, form, part

SECONDS = 12  # after which a client gives up
PAUSE = 0.06  # seconds between two requests of a client, at most
FOLDER = "jepsen"
NAMES = ("a.txt", "b.bin", "folder/c.log", "folder/d")
KEYS = tuple(f"{FOLDER}/{name}" for name in NAMES)
# Statuses of a write that did not happen and will not. 503 may be the backend's, after a try without an answer.
REFUSALS = frozenset({400, 401, 403, 404, 405, 408, 409, 411, 412, 413, 507})


class NotSent(Exception):
    """No connection was made."""


class NoAnswer(Exception):
    """The connection ended before the whole answer was here, or the client did not wait longer."""


@dataclass
class Answer:
    """A whole answer."""

    status: int
    headers: Message
    body: bytes

    @property
    def etag(self) -> str:
        """Its ETag, bare."""
        return self.headers.get("ETag", "").strip('"')


@dataclass
class Version:
    """What some client knows of a key."""

    content: int
    etag: str


@dataclass
class History:
    """What all clients did and saw."""

    keys: tuple[str, ...] = KEYS
    operations: list[Operation] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # bodies and headers that contradict themselves
    results: Counter[str] = field(default_factory=Counter)  # by request and result
    zero: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: int = 0

    def add(self, *operations: Operation) -> None:
        """Write down."""
        with self._lock:
            for operation in operations:
                self.operations.append(replace(operation, number=len(self.operations)))

    def count(self, request: str, result: object) -> None:
        """Count a request."""
        with self._lock:
            self.results[f"{request} {result}"] += 1

    def new_number(self) -> int:
        """The number of a new content."""
        with self._lock:
            self._numbers += 1
            assert self._numbers < NUMBERS, "there are more contents than numbers"
            return self._numbers


class Client:
    """A client, each request of which has a connection of its own.

    :param known: the versions that were seen last, shared with other clients.
    :param seed: decides what it does.
    :param machine: which server it asks; None: any of them.
    """

    def __init__(
        self, system: System, history: History, known: dict[str, Version], seed: object, machine: int | None = None
    ):
        self._system = system
        self._history = history
        self._known = known
        self._only_machine = machine
        self._random = random.Random(f"{seed}")
        self._headers = system.servers[0].headers()
        self._actions: list[tuple[Callable[[str], object], int]] = [
            (self.put, 14), (self.replace, 14), (self.create, 6), (self.delete, 6), (self.delete_if, 4),
            (self.get, 30), (self.head, 8), (self.get_range, 8), (self.get_if_changed, 4), (self.list_keys, 8),
            (self.post_form, 5), (self.post_archive, 3), (self.put_and_leave, 4),
        ]  # fmt: skip

    def run(self, end: threading.Event) -> None:
        """Send requests until the end."""
        try:
            while not end.is_set():
                self._act()
        except Exception:  # noqa: BLE001  (an answer that no client can read, or a mistake in this file)
            self._history.wrong.append(traceback.format_exc())

    def _act(self) -> None:
        actions, weights = zip(*self._actions, strict=True)
        [action] = self._random.choices(actions, weights)
        action(self._random.choice(KEYS))
        time.sleep(self._random.random() * PAUSE)

    # Requests

    def _machine(self) -> int:
        return self._random.randrange(len(self._system.servers)) if self._only_machine is None else self._only_machine

    def _send(
        self, machine: int, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Answer:
        """Send a request.

        :raises NotSent: no connection was made.
        :raises NoAnswer: there is no whole answer.
        """
        port = self._system.servers[machine].port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            connection.connect()
        except OSError as exc:
            time.sleep(0.05)  # no server is there
            raise NotSent from exc
        try:
            connection.request(method, path, body, {"Connection": "close", **headers})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        except (OSError, http.client.HTTPException) as exc:
            raise NoAnswer(type(exc).__name__) from exc
        finally:
            connection.close()

    # Writing

    def _content(self, key: str) -> tuple[int, bytes]:
        number = self._history.new_number()
        return number, content_of(key, number, size_of(number, self._system.mode.large_share))

    def put(self, key: str) -> None:
        """Store a content over whatever is there."""
        self._put(Kind.PUT, key, {})

    def put_large(self, key: str) -> None:
        """The same with one that is larger than Azure's limit for one request."""
        number = self._history.new_number()
        self._store(Kind.PUT, key, number, content_of(key, number, LARGE[0] + LARGE[1] * number), {}, None)

    def create(self, key: str) -> None:
        """Store a content if there is none."""
        self._put(Kind.CREATE, key, {"If-None-Match": "*"})

    def replace(self, key: str) -> None:
        """Store a content over the version that was seen last."""
        if version := self._known.get(key):
            self._put(Kind.REPLACE, key, {"If-Match": f'"{version.etag}"'}, version)

    def store(self, key: str, number: int, body: bytes, known: Operation | None) -> Answer | None:
        """Store a content over what a read has told, be it nothing; the answer."""
        version = Version(known.content, known.etag) if known and known.content is not None else None
        condition = {"If-Match": f'"{version.etag}"'} if version else {"If-None-Match": "*"}
        return self._store(Kind.REPLACE if version else Kind.CREATE, key, number, body, condition, version)

    def _put(self, kind: Kind, key: str, condition: Mapping[str, str], version: Version | None = None) -> None:
        number, body = self._content(key)
        self._store(kind, key, number, body, condition, version)

    def _store(
        self, kind: Kind, key: str, number: int, body: bytes, condition: Mapping[str, str], version: Version | None
    ) -> Answer | None:
        expected = version.content if version else None
        operation = Operation(kind, key, 0, 0, Outcome.UNKNOWN, number, expected, machine=self._machine())
        answer = self._write(operation, "PUT", f"/{quote(key)}", condition, body)
        if answer is not None and answer.status in (200, 201):
            self._learn(key, number, answer.etag)
        return answer

    def _write(
        self, operation: Operation, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> Answer | None:
        """Send a request that writes one key, and write it down; the answer, if there is one."""
        request = operation.kind.value
        begin = time.monotonic()
        answer, result = None, ""
        try:
            answer = self._send(operation.machine, method, path, {**self._headers, **headers}, body)
            outcome = outcome_of_write(answer, operation.kind)
            result = f"{answer.status} {answer.etag or answer.body[:90].decode(errors='replace').strip()}"
        except NotSent:
            outcome, result = Outcome.FAILED, "not sent"
        except NoAnswer as exc:
            outcome, result = Outcome.UNKNOWN, f"no answer: {exc}"
        etag = answer.etag if answer is not None and answer.status in (200, 201) else ""
        how = f"{len(body or b'')} bytes {' '.join(headers.values())} -> {result}"
        self._history.add(
            replace(
                operation, begin=begin, end=time.monotonic(), outcome=outcome, how=how, etag=etag,
                answered=answer is not None,
            )
        )  # fmt: skip
        self._history.count(request, answer.status if answer else result)
        return answer

    def delete(self, key: str) -> None:
        """Delete whatever is there."""
        self._write(
            Operation(Kind.DELETE, key, 0, 0, Outcome.UNKNOWN, machine=self._machine()), "DELETE", f"/{key}", {}
        )

    def delete_if(self, key: str) -> None:
        """Delete the version that was seen last."""
        if version := self._known.get(key):
            operation = Operation(
                Kind.DELETE_IF, key, 0, 0, Outcome.UNKNOWN, expected=version.content, machine=self._machine()
            )
            self._write(operation, "DELETE", f"/{quote(key)}", {"If-Match": f'"{version.etag}"'})

    def _several(self) -> dict[str, tuple[int, bytes]]:
        keys = self._random.sample(KEYS, self._random.randrange(2, len(KEYS) + 1))
        return {key: self._content(key) for key in sorted(keys)}

    def post_form(self, _key: str) -> None:
        """Store several files with one form."""
        files = self._several()
        parts = [part(f"file{number}", body, key) for number, (key, (_, body)) in enumerate(files.items())]
        path = part("path", b"")
        body = form(path, *parts) if self._random.random() < 0.7 else form(*parts, path)
        self._write_several("form", "/upload", body, files, self._machine())

    def post_archive(self, _key: str) -> None:
        """Store several files with one archive."""
        files = self._several()
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for key, (_, body) in files.items():
                member = tarfile.TarInfo(key.removeprefix(f"{FOLDER}/"))
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))
        body = form(part("path", FOLDER.encode()), part("archive", packed.getvalue(), "files.tar"))
        self._write_several("archive", "/v1/archive", body, files, self._machine())

    def _write_several(
        self, request: str, path: str, body: bytes, files: Mapping[str, tuple[int, bytes]], machine: int
    ) -> None:
        begin = time.monotonic()
        answer = None
        try:
            answer = self._send(machine, "POST", path, {**self._headers, **FORM_TYPE}, body)
            outcome, result = outcome_of_several(answer), f"{answer.status}"
        except NotSent:
            outcome, result = Outcome.FAILED, "not sent"
        except NoAnswer as exc:
            outcome, result = Outcome.UNKNOWN, f"no answer: {exc}"
        end = time.monotonic()
        for key, (number, content) in files.items():
            how = f"{request}, {len(content)} bytes -> {result}"
            self._history.add(
                Operation(
                    Kind.PUT, key, begin, end, outcome, number, how=how, machine=machine, answered=answer is not None
                )
            )
        self._history.count(request, result)

    def put_and_leave(self, key: str) -> None:
        """Break an upload off in its middle, or before the answer."""
        number, body = self._content(key)
        machine = self._machine()
        whole = self._random.random() < 0.3
        sent = len(body) if whole else int(len(body) * self._random.random())
        begin = time.monotonic()
        outcome = Outcome.UNKNOWN if whole else Outcome.FAILED
        with (
            contextlib.suppress(OSError),
            socket.create_connection(
                ("127.0.0.1", self._system.servers[machine].port), timeout=SECONDS
            ) as connection,
        ):
            lines = [f"PUT /{quote(key)} HTTP/1.1", "Host: storage", f"Content-Length: {len(body)}"]
            lines += [f"{name}: {value}" for name, value in self._headers.items()]
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:sent])
            time.sleep(self._random.choice((0, 0.01, 0.1)))
            if self._random.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        how = f"left after {sent} of {len(body)} bytes"
        self._history.add(
            Operation(
                Kind.PUT, key, begin, time.monotonic(), outcome, number, how=how, machine=machine, answered=False
            )
        )
        self._history.count("PUT", "left" if whole else "cut")

    # Reading

    def _learn(self, key: str, content: int, etag: str) -> None:
        if etag:
            self._known[key] = Version(content, etag)

    def get(self, key: str, machine: int | None = None) -> Operation | None:
        """Download."""
        return self.read(key, "GET", {}, machine)

    def head(self, key: str, machine: int | None = None) -> Operation | None:
        """Ask for the properties."""
        return self.read(key, "HEAD", {}, machine)

    def get_range(self, key: str) -> None:
        """Download a part."""
        start = self._random.randrange(SMALLEST)
        text = self._random.choice(
            (f"{start}-{start + self._random.randrange(300_000)}", f"{start}-", f"-{start + 1}")
        )
        self.read(key, "GET", {"Range": f"bytes={text}"})

    def get_if_changed(self, key: str) -> None:
        """Download another version than the one that was seen last."""
        if version := self._known.get(key):
            self.read(key, "GET", {"If-None-Match": f'"{version.etag}"'}, version=version)

    def read(
        self,
        key: str,
        method: str,
        headers: Mapping[str, str],
        machine: int | None = None,
        version: Version | None = None,
    ) -> Operation | None:
        """Read a key, and write it down; None: there was no answer that says anything about the key.

        :param version: what 304 means.
        """
        machine = self._machine() if machine is None else machine
        request = f"{method} {' '.join(headers)}".strip()
        begin = time.monotonic()
        try:
            answer = self._send(machine, method, f"/{quote(key)}", headers)
        except (NotSent, NoAnswer) as exc:
            self._history.count(request, type(exc).__name__)
            return None
        end = time.monotonic()
        self._history.count(request, answer.status)
        content = self._content_read(key, method, answer, version)
        if answer.status not in (200, 206, 304, 404) or content == _WRONG:
            return None
        outcome = Outcome.STALE if answer.headers.get("X-Cache") == "stale" else Outcome.DONE
        how = (
            f"{request} {' '.join(headers.values())} -> {answer.status} {answer.etag} {answer.headers.get('X-Cache')}"
        )
        etag = answer.etag if content is not None else ""
        operation = Operation(Kind.READ, key, begin, end, outcome, content, how=how, machine=machine, etag=etag)
        self._history.add(operation)
        if content is not None:
            self._learn(key, content, etag)
        return operation

    def _failed_read(self, key: str, begin: float, machine: int, request: str, result: object) -> None:
        """It says nothing of the key, but what it has fetched may be served to others."""
        how = f"{request} -> {result}"
        self._history.add(
            Operation(Kind.READ, key, begin, time.monotonic(), Outcome.UNKNOWN, how=how, machine=machine)
        )
        self._history.count(request, result)

    def _content_read(self, key: str, method: str, answer: Answer, version: Version | None) -> int | None:
        """The number of the content that was read, each byte of which is compared; None: nothing is there."""
        if answer.status == 304 and version is not None:
            return version.content
        if answer.status not in (200, 206):
            return None
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        start, size = (int(found[1]), int(found[3])) if found else (0, int(answer.headers["Content-Length"]))
        number = number_of(size)
        expected = content_of(key, number, size)
        if method == "GET" and answer.body != expected[start : start + len(answer.body)]:
            self._history.wrong.append(
                f"{key}: {len(answer.body)} bytes from {start} of {size} are not those of content {number}: "
                f"{answer.body[:60]!r}"
            )
            return _WRONG
        return number

    def list_keys(self, key: str, machine: int | None = None) -> Operation | None:
        """List all keys, and write down what is said of each; what is said of this one."""
        machine = self._machine() if machine is None else machine
        begin = time.monotonic()
        try:
            answer = self._send(machine, "GET", f"/v1/list?prefix={FOLDER}/&format=json", {})
        except (NotSent, NoAnswer) as exc:
            self._history.count("list", type(exc).__name__)
            return None
        end = time.monotonic()
        self._history.count("list", answer.status)
        if answer.status != 200:
            return None
        listed = {each.key: each for each in self._listed(answer.body.splitlines(), begin, end, machine)}
        self._history.add(*listed.values())
        return listed[key]

    def _listed(self, lines: Iterable[bytes], begin: float, end: float, machine: int) -> Iterable[Operation]:
        entries: dict[str, Any] = {entry["path"]: entry for entry in map(json.loads, lines)}
        for key in self._history.keys:
            entry = entries.get(key)
            content, etag = (number_of(entry["size"]), entry["etag"].strip('"')) if entry else (None, "")
            yield Operation(Kind.LIST, key, begin, end, Outcome.DONE, content, how=etag, machine=machine, etag=etag)


_WRONG = -2  # in place of a content's number


def outcome_of_write(answer: Answer, kind: Kind) -> Outcome:
    """What a client knows after an answer to a write of one key."""
    if answer.status in (200, 201, 204):
        return Outcome.DONE
    if answer.status == 404 and kind in (Kind.DELETE, Kind.DELETE_IF):
        return Outcome.ABSENT
    if answer.status == 412 and kind in (Kind.CREATE, *CONDITIONAL):
        return Outcome.UNMET
    return Outcome.FAILED if answer.status in REFUSALS else Outcome.UNKNOWN


def outcome_of_several(answer: Answer) -> Outcome:
    """The same of several files: some of them may be stored unless the whole request was refused."""
    if answer.status == 200:
        return Outcome.DONE
    return Outcome.FAILED if answer.status in (400, 401, 403, 408, 411, 413) else Outcome.UNKNOWN
