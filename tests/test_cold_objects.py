"""Cold objects while nothing fails: everybody gets them at once, from one fetch, whoever else is slow or leaves.

The figures in docs/reliability.md are what ``pytest -s tests/test_cold_objects.py tests/test_cold_faults.py`` prints.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import requests

from tests.cold import MIB, Bench, crowd, figure, median_first_byte, some_bytes
from tests.faultproxy import CONTENT, PROPERTIES, Hold, Stall
from tests.harness import wait_until
from tests.wire import SECONDS, Wire, get, put, request, wait_until_tidy


def test_fifty_clients_get_a_cold_object_from_one_fetch(bench: Bench) -> None:
    content = some_bytes(32 * MIB)
    key = bench.store(content)
    bench.proxy.bandwidth = 32 * MIB
    visits = crowd(bench.server, key, 50, content)
    assert [visit for visit in visits if not visit.complete] == []
    assert bench.proxy.body_bytes(CONTENT, key) == len(content)
    assert {visit.headers["x-cache"] for visit in visits} == {"miss"}
    figure(
        "50 clients, one cold object of 32 MiB at 32 MiB/s, 3 workers",
        fetches=bench.fetches(key),
        median_first_byte=median_first_byte(visits),
        last_end=max(visit.seconds for visit in visits),
    )
    assert get(bench.server, key).headers["X-Cache"] == "hit"
    assert bench.proxy.body_bytes(CONTENT, key) == len(content)
