# SPDX-License-Identifier: LGPL-2.1-or-later
"""The beginning and the end of a worker. For its work see test_hostile_clients.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kci_storage.drivers.azure.driver import BLOCK_SIZE
from tests.support.cold import Bench
from tests.support.faultproxy import PUT, Hold
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, wait_until
from tests.support.wire import SECONDS, Wire, new_folder, request, wait_until_tidy

# The server's settings, but a worker that is forked later waits at first.
SETTINGS = """
import pathlib, time
from kci_storage.server.hooks import *

folder = pathlib.Path({folder!r})

def post_fork(server, worker):
    if (folder / "hold").exists():
        (folder / "held").touch()
        while (folder / "hold").exists():
            time.sleep(0.01)
"""


@pytest.mark.expected_errors("was sent SIGKILL")
def test_a_worker_that_is_being_forked_stops(start_server: Callable[..., Server], tmp_path: Path):
    settings, hold = tmp_path / "settings.py", tmp_path / "hold"
    settings.write_text(SETTINGS.format(folder=str(tmp_path)))
    server = start_server(server={"workers": 1}, arguments=["--config", str(settings)])
    hold.touch()
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    wait_until((tmp_path / "held").exists, START_SECONDS, "the next worker")
    server.process.terminate()
    wait_until(lambda: "Handling signal: term" in server.log(), SECONDS, "the stop")
    [forked] = server.worker_pids()
    wait_until(lambda: awaits_sigterm(forked), SECONDS, "the worker's SIGTERM")
    hold.unlink()
    server.stop()  # in far less than graceful_timeout


def test_a_silent_backend_does_not_hold_up_a_stop(new_bench: Callable[..., Bench]):
    """A block of an abandoned upload is still being sent to it."""
    patience = 10 * STOP_SECONDS
    bench = new_bench(server={"workers": 1}, azure={"connect_timeout": patience, "read_timeout": patience})
    key = f"{new_folder()}/a"
    rule = bench.proxy.inject(Hold(), kind=PUT, key=key)
    with Wire(bench.server) as wire:
        head = {**bench.server.headers(), "Content-Length": 3 * BLOCK_SIZE}
        wire.send(request("PUT", f"/{key}", head), bytes(BLOCK_SIZE + 1))
        rule.wait_until_reached()
    wait_until_tidy(bench.server)
    bench.server.stop()
    rule.end()


def awaits_sigterm(pid: int) -> bool:
    """Whether SIGTERM is pending for a process that has blocked it (proc_pid_status(5))."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return bool(pending >> (signal.SIGTERM - 1) & 1)
