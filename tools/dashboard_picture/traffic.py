# SPDX-License-Identifier: LGPL-2.1-or-later
"""A day's traffic of a KernelCI server in half an hour, for the picture of the dashboard.

Most clients request files that others requested before; builds upload; some clients browse. Once a crawler reads old
files, once the backend fails, and once it is slow.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import requests

from tests.support.cold import Bench
from tests.support.faultproxy import CONTENT, PROPERTIES, PUT, Delay, Fault, FaultProxy, Say

KIB, MIB = 1 << 10, 1 << 20
CLIENTS = 24  # at a time; further requests wait for one of them
MEAN_RATE = 14.0  # requests per second
OLD_OBJECTS = 300  # in the backend at the beginning
CLIENT_SECONDS = 30  # for which a client waits
CACHE_BYTES = 96 * MIB  # less than all objects, so that the cache evicts
LARGE, LARGE_BYTES = "archive/rootfs.ext4", 100 * MIB  # more than the cache may hold
NAMES = ("Image.gz", "config", "build.log.gz", "modules.tar.xz", "System.map", "metadata.json", "lava.log.gz")

# Short times, so that copies are revalidated and uploads give up waiting within half an hour.
OPTIONS = {
    "server": {"workers": 2, "lock_timeout": 2},
    "cache": {"max_bytes": CACHE_BYTES, "interval": 30, "revalidate_after": 120},
}


class Phase(NamedTuple):
    """A part of the time, with something unusual."""

    share: float  # of the whole time
    faults: tuple[tuple[Fault, str], ...] = ()  # of the backend, each with the kind of request
    crawlers: float = 1.0  # the factor by which requests for old files are more frequent than usual

    @contextlib.contextmanager
    def trouble(self, proxy: FaultProxy) -> Iterator[None]:
        """Have the backend fail during the block."""
        rules = [proxy.inject(fault, kind) for fault, kind in self.faults]
        try:
            yield
        finally:
            for rule in rules:
                rule.end()


FAILURE = Say(500, "InternalError")
PHASES = (
    Phase(0.30),
    Phase(0.08, crawlers=15),
    Phase(0.18),
    Phase(0.04, faults=((FAILURE, CONTENT), (FAILURE, PROPERTIES), (FAILURE, PUT))),
    Phase(0.16),
    Phase(0.07, faults=((Delay(0.4), CONTENT), (Delay(0.2), PUT))),
    Phase(0.17),
)


class Traffic:
    """A server's clients; the kind of each request is random.

    :param bench: the server, configured with :data:`OPTIONS`.
    """

    def __init__(self, bench: Bench, seed: int = 1):
        self._bench = bench
        self._random = random.Random(seed)
        self._keys: list[str] = []
        self._etags: dict[str, str] = {}
        self._client = threading.local()
        self._kinds: dict[Callable[[], None], float] = {
            self._download: 70.0,
            self._revalidate: 9.0,
            self._resume: 3.0,
            self._request_missing: 2.5,
            self._browse: 2.0,
            self._head: 2.0,
            self._put: 4.0,
            self._send_form: 1.5,
            self._delete: 0.4,
            self._write_concurrently: 0.3,
            self._read_old: 5.0,
            self._read_too_large: 0.1,
            self._overwrite_elsewhere: 0.5,
        }

    def run(self, seconds: float) -> None:
        """Send the requests of all clients for this many seconds."""
        self._bench.store(bytes(LARGE_BYTES), LARGE)
        for _ in range(OLD_OBJECTS):
            self._keys.append(self._store_an_old_object())
        begun, end = time.monotonic(), 0.0
        with ThreadPoolExecutor(CLIENTS) as clients:
            for phase in PHASES:
                end += phase.share
                with phase.trouble(self._bench.proxy):
                    while (share := (time.monotonic() - begun) / seconds) < end:
                        clients.submit(self._one_request, phase.crawlers)
                        time.sleep(self._random.expovariate(_rate(share) * (1 + phase.crawlers / 20)))

    def _one_request(self, crawlers: float) -> None:
        kinds = {**self._kinds, self._read_old: crawlers * self._kinds[self._read_old]}
        [kind] = self._random.choices(list(kinds), list(kinds.values()))
        with contextlib.suppress(requests.RequestException):
            kind()

    # Objects

    def _store_an_old_object(self) -> str:
        """Store an object, as another machine's server would, or this one did long ago; returns its key."""
        name = self._random.choice(NAMES)
        return self._bench.store(self._content(), f"archive/{time.time_ns()}/{name}")

    def _content(self) -> bytes:
        """Random content: most files are small, and most bytes are in large files."""
        return self._random.randbytes(min(int(self._random.lognormvariate(math.log(60 * KIB), 1.8)), 16 * MIB))

    def _popular(self) -> str:
        """A key; recent ones are more frequent."""
        age = int(self._random.paretovariate(0.7)) - 1
        return self._keys[-1 - age % len(self._keys)]

    # Requests

    def _ask(self, method: str, key: str, **options: Any) -> requests.Response:
        if not hasattr(self._client, "session"):
            self._client.session = requests.Session()
        url = f"{self._bench.server.url}/{key}"
        answer: requests.Response = self._client.session.request(method, url, timeout=CLIENT_SECONDS, **options)
        return answer

    def _write(self, method: str, key: str, **options: Any) -> requests.Response:
        return self._ask(method, key, headers=self._bench.server.headers(), **options)

    def _download(self) -> None:
        key = self._popular()
        if etag := self._ask("GET", key).headers.get("ETag"):
            self._etags[key] = etag

    def _revalidate(self) -> None:
        known = list(self._etags.items())[-200:]
        if known:
            key, etag = self._random.choice(known)
            self._ask("GET", key, headers={"If-None-Match": etag})

    def _resume(self) -> None:
        self._ask("GET", self._popular(), headers={"Range": f"bytes={self._random.randrange(2 * KIB)}-"})

    def _request_missing(self) -> None:
        self._ask("GET", f"mainline/v6.99/{self._random.randrange(1000)}/Image")

    def _browse(self) -> None:
        self._ask("GET", f"{self._popular().rpartition('/')[0]}/")

    def _head(self) -> None:
        self._ask("HEAD", self._popular())

    def _put(self) -> None:
        key = f"next/{time.time_ns()}/{self._random.choice(NAMES)}"
        if self._write("PUT", key, data=self._content()).ok:
            self._keys.append(key)

    def _send_form(self) -> None:
        path, names = f"stable/{time.time_ns()}", self._random.sample(NAMES, 3)
        files = {f"file{number}": (name, self._content()) for number, name in enumerate(names)}
        if self._write("POST", "upload", data={"path": path}, files=files).ok:
            self._keys.extend(f"{path}/{name}" for name in names)

    def _delete(self) -> None:
        self._write("DELETE", self._keys.pop(self._random.randrange(OLD_OBJECTS // 2)))

    def _write_concurrently(self) -> None:
        """Two builds write one key; the first one may send so slowly that the second one gives up."""
        key, seconds = f"next/{time.time_ns()}/config", self._random.uniform(0.5, 4)
        with ThreadPoolExecutor(1) as other:
            other.submit(self._write, "PUT", key, data=_slowly(seconds))
            time.sleep(0.2)
            self._write("PUT", key, data=b"second")

    def _read_old(self) -> None:
        self._ask("GET", self._store_an_old_object())

    def _read_too_large(self) -> None:
        """Read an object that does not fit in the cache."""
        self._ask("GET", LARGE)

    def _overwrite_elsewhere(self) -> None:
        """Another machine's server overwrites a file of which this one has a copy."""
        self._bench.store(self._content(), self._popular())


def _slowly(seconds: float) -> Iterator[bytes]:
    """A body that is sent slowly."""
    yield b"first"
    time.sleep(seconds)
    yield b"-done"


def _rate(share: float) -> float:
    """Requests per second after a share of the day.

    >>> _rate(0.25) > 1.5 * _rate(0.75)
    True
    """
    return MEAN_RATE * (1 + 0.45 * math.sin(2 * math.pi * share) + 0.12 * math.sin(2 * math.pi * 7 * share))
