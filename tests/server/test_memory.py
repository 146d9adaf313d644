# SPDX-License-Identifier: LGPL-2.1-or-later
"""The workers' memory does not grow with a file of a GiB that they receive and send.

``KCI_STORAGE_LARGE_FILE`` is another size, in MiB; 5,000, for example, exceeds 32 bits.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from werkzeug.test import create_environ, run_wsgi_app

from kci_storage.cache.directory import Cache
from kci_storage.cache.entry import last_use
from kci_storage.wsgi.exchange import EXCHANGE, Exchange, Transport
from tests.support.azurite import running_azurite
from tests.support.harness import Server
from tests.support.wire import FORM_TYPE, form, part

MIB = 1024 * 1024
BLOCKS = int(os.environ.get("KCI_STORAGE_LARGE_FILE", "1024"))  # MiB
AFTERWARDS, MEANWHILE = 100 * MIB, 200 * MIB  # by which a worker may grow; Azure gets several blocks at once
KEY = "large.img"
SECONDS = 300  # for which a client waits, since a slow disk may have to write the whole file first
_FILLING = secrets.token_bytes(MIB)


def block(number: int) -> bytes:
    """A part of the file; all parts differ."""
    return number.to_bytes(8, "big") + _FILLING[8:]


@pytest.fixture
def local(start_server: Callable[..., Server]) -> Iterator[Server]:
    server = start_server("local", server={"workers": 1})
    yield server
    server.stop()
    shutil.rmtree(server.storage_path)


@pytest.fixture
def azure(start_server: Callable[..., Server], tmp_path: Path) -> Iterator[Server]:
    """A server with its own Azurite, whose files are removed afterwards."""
    with running_azurite(tmp_path) as service:
        settings = service.settings()
        server = start_server(
            "azure",
            azure={name: getattr(settings, name) for name in ("account", "key", "endpoint", "container")},
            server={"workers": 1},
        )
        yield server
        server.stop()
    for path in (tmp_path, server.cache_directory):
        shutil.rmtree(path)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("driver", ["local", "azure"])
def test_memory_does_not_grow_with_a_file(driver: str, request: pytest.FixtureRequest) -> None:
    server: Server = request.getfixturevalue(driver)
    [pid] = server.worker_pids()
    transfers = {"upload": upload, "download": download}
    if driver == "azure":
        transfers |= {"cold download": cold_download, "upload by form": upload_by_form}
    for transfer in transfers.values():  # so that what a worker allocates only once is not counted
        transfer(server, 20)
    before = psutil.Process(pid).memory_info().rss
    for name, transfer in transfers.items():
        forget_peak(pid)
        begin = time.monotonic()
        transfer(server, BLOCKS)
        seconds, grown = time.monotonic() - begin, peak(pid) - before
        print(f"\n{driver}: {name} of {BLOCKS} MiB: {seconds:.1f} s, {grown / MIB:+.1f} MiB at most")
        assert grown < MEANWHILE, name
        assert psutil.Process(pid).memory_info().rss - before < AFTERWARDS, name


def forget_peak(pid: int) -> None:
    """Reset the peak memory of a process (``proc(5)``, ``clear_refs``)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> int:
    """The peak memory of a process since then, in bytes."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def upload(server: Server, blocks: int) -> None:
    send(server, "PUT", f"/{KEY}", {}, blocks)


def upload_by_form(server: Server, blocks: int) -> None:
    head, tail = form(part("path", b"/"), part("file0", b"CONTENT", KEY)).split(b"CONTENT")
    send(server, "POST", "/upload", FORM_TYPE, blocks, head, tail)


def send(
    server: Server, method: str, path: str, headers: dict[str, str], blocks: int, head: bytes = b"", tail: bytes = b""
) -> None:
    """Send a request without having its whole body in memory."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        connection.putrequest(method, path)
        length = len(head) + blocks * MIB + len(tail)
        for name, value in {**server.headers(), **headers, "Content-Length": length}.items():
            connection.putheader(name, str(value))
        connection.endheaders(head or None)
        for number in range(blocks):
            connection.send(block(number))
        connection.send(tail)
        assert connection.getresponse().status in (200, 201)


def download(server: Server, blocks: int) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as connection:
        connection.request("GET", f"/{KEY}")
        answer = connection.getresponse()
        assert (answer.status, answer.length) == (200, blocks * MIB)
        for number in range(blocks):
            assert answer.read(MIB) == block(number)


def cold_download(server: Server, blocks: int) -> None:
    cache = Cache(server.cache_directory)
    for file, status in cache.contents():
        assert cache.evict(Path(file.path), last_use(status))
    download(server, blocks)


def test_a_request_leaves_no_reference_cycles() -> None:
    """Collecting cycles would take a twentieth of a hit's time."""
    seen: list[weakref.ref[Exchange]] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        seen.append(weakref.ref(environ[EXCHANGE]))
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    gc.disable()
    try:
        body, status, _ = run_wsgi_app(Transport(app, lambda exchange: None), create_environ("/"))
        assert (status, list(body)) == ("200 OK", [b"ok"])
        body.close()
        del body
        assert [exchange() for exchange in seen] == [None]
    finally:
        gc.enable()
