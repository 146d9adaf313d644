# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clients: wrk for many requests, curl for large ones, and a crowd of readers. All check the responses."""

from __future__ import annotations

import http.client
import json
import selectors
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import BenchError

SCRIPTS = Path(__file__).parent / "wrk"
HEAD_ROOM = 2048  # bytes that a response's head may have
TIMEOUT = 120  # seconds without a byte after which a client gives up


# wrk


@dataclass(frozen=True)
class Rate:
    """wrk's results."""

    requests: int
    seconds: float
    p99: float  # seconds within which 99 of a hundred requests were answered to the last byte

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def wrk(port: int, connections: int, seconds: int, folder: Path, script: str, *args: object, body: int) -> Rate:
    """Load a server on this machine.

    :param folder: for the script that wrk gets.
    :param script: the name of one in :data:`SCRIPTS`.
    :param seconds: for how long; longer if no response came in that time, as with a very slow disk.
    :param body: the size of each response's body, in bytes; 0: small.
    :raises BenchError: a response is an error, or has another size.
    """
    path = folder / script
    path.write_text((SCRIPTS / "summary.lua").read_text() + (SCRIPTS / script).read_text())
    target = ["--timeout", 30, "--script", path, f"http://127.0.0.1:{port}", "--", *args]
    summary: dict[str, Any] = {}
    for duration in (seconds, 5 * seconds, 30 * seconds):
        summary = _summary("--threads", 2, "--connections", connections, "--duration", duration, *target)
        if summary["requests"] or _errors(summary):
            break
    return _checked_rate(summary, connections, body)


def _summary(*options: object) -> dict[str, Any]:
    """wrk's summary."""
    output = _output(["wrk", *options])
    found = [line.removeprefix("SUMMARY ") for line in output.splitlines() if line.startswith("SUMMARY ")]
    if not found:
        raise BenchError(f"wrk printed no summary: {output.strip()}")
    summary: dict[str, Any] = json.loads(found[0])
    return summary


def _errors(summary: Mapping[str, Any]) -> bool:
    return any(summary[name] for name in ("connect", "read", "write", "status", "timeout"))


def _checked_rate(summary: Mapping[str, Any], connections: int, body: int) -> Rate:
    requests = summary["requests"]
    # Responses that were incomplete at the end are counted in bytes, but not in requests.
    limit = (requests + connections) * (body + HEAD_ROOM)
    if _errors(summary) or not requests or not requests * body <= summary["bytes"] <= limit:
        raise BenchError(f"wrk did not get {body} bytes each time: {dict(summary)}")
    return Rate(requests, summary["seconds"], summary["p99"])


def _output(command: Sequence[object]) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise BenchError(f"{command[0]} failed with {result.returncode}: {result.stderr.strip()}")
    return result.stdout


# curl


def curl(url: str, *options: object, status: int = 200, downloaded: int | None = None) -> float:
    """Send one request; returns how many seconds it took.

    :param downloaded: how many bytes its body must have.
    :raises BenchError: the status or the size is another one.
    """
    report = "%{http_code} %{size_download} %{time_total}"
    output = _output(["curl", "-sS", "-o", "/dev/null", "-w", report, *options, url])
    found_status, found_size, seconds = output.split()
    if int(found_status) != status or downloaded not in (None, int(found_size)):
        raise BenchError(f"{url}: {found_status} with {found_size} bytes, not {status} with {downloaded}")
    return float(seconds)


# One request


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


def ask(port: int, method: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Send one request on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


# Crowds


@dataclass
class Download:
    """One reader's download."""

    started: float  # seconds, on the monotonic clock
    status: int = 0
    length: int = 0  # bytes, by Content-Length
    received: int = 0  # bytes of the body
    cache: str = ""  # the value of X-Cache
    first_byte: float = 0  # seconds from the request to the body's first byte
    seconds: float = 0  # from the request to the body's last byte

    @property
    def complete(self) -> bool:
        """Whether the whole body has been received."""
        return bool(self.status) and self.received >= self.length


class Reader:
    """A connection that asks for one path after the other, as long as there are any.

    A body is thrown away in the kernel (``MSG_TRUNC``, tcp(7)): so one process can be a crowd of clients, without
    being what limits them.
    """

    _buffer = bytearray(1 << 20)  # never written to; only its length matters

    def __init__(self, port: int, paths: Iterator[str]):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self.downloads: list[Download] = []
        self._paths = paths
        self._head = b""

    def ask(self) -> bool:
        """Send the next request; False: none is left."""
        path = next(self._paths, None)
        if path is None:
            return False
        self._head = b""
        self.downloads.append(Download(time.monotonic()))
        self.sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        return True

    def take(self) -> bool:
        """Receive what has come; whether that was the response's end.

        :raises BenchError: the connection was closed before.
        """
        download = self.downloads[-1]
        size = self._take_body(download) if download.status else self._take_head(download)
        download.seconds = time.monotonic() - download.started
        download.received += size
        if download.received and not download.first_byte:
            download.first_byte = download.seconds
        return download.complete

    def _take_body(self, download: Download) -> int:
        size = self.sock.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        if not size:
            raise BenchError(f"the connection was closed after {download.received} bytes of {download.length}")
        return size

    def _take_head(self, download: Download) -> int:
        """Receive a part of the head; returns how many bytes of the body came with it."""
        data = self.sock.recv(4096)
        if not data:
            raise BenchError("the connection was closed without an answer")
        self._head += data
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if end:
            status, _, lines = head.decode("latin-1").partition("\r\n")
            pairs = (line.partition(":") for line in lines.split("\r\n"))
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            download.status = int(status.split()[1])
            download.length = int(headers["content-length"])
            download.cache = headers.get("x-cache", "")
        return len(rest)


def crowd(port: int, paths: Sequence[str], connections: int, size: int) -> tuple[list[Download], float]:
    """Download paths on several connections, each of which takes the next path that is left.

    :param size: of each body, in bytes.
    :returns: the downloads, and how many seconds all of them took.
    :raises BenchError: a response is an error, or has another size.
    """
    waiting = iter(paths)
    readers = [Reader(port, waiting) for _ in range(connections)]
    started = time.monotonic()
    try:
        _read_all(readers)
    finally:
        for reader in readers:
            reader.sock.close()
    seconds = time.monotonic() - started
    downloads = [download for reader in readers for download in reader.downloads]
    wrong = [download for download in downloads if (download.status, download.received) != (200, size)]
    if wrong or len(downloads) != len(paths):
        raise BenchError(f"{len(downloads)} of {len(paths)} downloads, not all of {size} bytes: {wrong[:3]}")
    return downloads, seconds


def _read_all(readers: Sequence[Reader]) -> None:
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            if reader.ask():
                selector.register(reader.sock, selectors.EVENT_READ, reader)
        while selector.get_map():
            found = selector.select(TIMEOUT)
            if not found:
                raise BenchError(f"nothing came for {TIMEOUT} seconds")
            for key, _ in found:
                if key.data.take() and not key.data.ask():
                    selector.unregister(key.fileobj)
