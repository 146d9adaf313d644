# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uploads: large and small ones to local disk, and large ones to Azurite."""

from __future__ import annotations

import filecmp
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks import load
from benchmarks.hits import Ours, Target, authorization, random_file
from benchmarks.measuring import OURS, RATE, TIME, BenchError, Sample, Workload, cpu_seconds
from benchmarks.scale import KIB, size_text
from benchmarks.stage import Stage
from tests.support.harness import Server

CONNECTIONS = 16
SMALL = 16 * KIB  # bytes
SDK_CONNECTIONS = 4
_numbers = itertools.count()


def workloads(stage: Stage) -> Iterator[Workload]:
    """Of this group."""
    local = _Local(stage)
    large, medium, small = size_text(stage.scale.large), size_text(stage.scale.medium), size_text(SMALL)
    yield Workload("uploads", f"form of {large}", (TIME,), local.large_turns(local.form))
    yield Workload("uploads", f"PUT of {large}", (TIME,), local.large_turns(local.put))
    yield Workload("uploads", f"forms of {small}", (RATE,), local.small_turns("POST"))
    yield Workload("uploads", f"PUTs of {small}", (RATE,), local.small_turns("PUT"))
    azure = _Azure(stage)
    yield Workload("uploads", f"form of {medium} to Azurite", (TIME,), {OURS: azure.form, "Azure SDK": azure.sdk})


class _Local:
    """Uploads into the folder of the local driver, nginx and gunicorn."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._server = stage.local_server
        self._source = stage.folder / "upload-large.bin"
        random_file(self._source, stage.scale.large)
        bare: dict[str, Target | None] = {"gunicorn": stage.gunicorn, "gunicorn, fsync": stage.durable_gunicorn}
        yardsticks = {**bare, "nginx": stage.nginx}
        self._yardsticks = {name: target for name, target in yardsticks.items() if target is not None}

    # Large files

    def large_turns(self, ours: Callable[[], float]) -> dict[str, Callable[[], Sample]]:
        """Our way to upload beside the yardsticks', which know only PUT."""
        turns: dict[str, Callable[[], Sample]] = {OURS: partial(self._large, Ours(self._server), ours)}
        for name, target in self._yardsticks.items():
            turns[name] = partial(self._large, target, partial(self._plain_put, target))
        return turns

    def form(self) -> float:
        """Seconds for a form as KernelCI's uploader sends it."""
        return send_form(self._server, "uploads", self._source)

    def put(self) -> float:
        """Seconds for a raw body."""
        url = f"{self._server.url}/uploads/{self._source.name}"
        return load.curl(url, "--upload-file", self._source, *authorization(self._server), status=201)

    def _plain_put(self, target: Target) -> float:
        url = f"http://127.0.0.1:{target.port}/uploads/{self._source.name}"
        return load.curl(url, "--upload-file", self._source, status=201)

    def _large(self, target: Target, upload: Callable[[], float]) -> Sample:
        self._stage.settle()
        before = cpu_seconds(target.pid)
        seconds = upload()
        sample = Sample((seconds,), cpu_seconds=cpu_seconds(target.pid) - before)
        stored = self._stage.files / "uploads" / self._source.name
        if not filecmp.cmp(stored, self._source, shallow=False):
            raise BenchError(f"port {target.port} has stored something else than was sent")
        stored.unlink()
        return sample

    # Small files

    def small_turns(self, method: str) -> dict[str, Callable[[], Sample]]:
        """Many files on several connections."""
        turns: dict[str, Callable[[], Sample]] = {OURS: partial(self._small, Ours(self._server), method)}
        for name, target in self._yardsticks.items():
            turns[name] = partial(self._small, target, "PUT")
        return turns

    def _small(self, target: Target, method: str) -> Sample:
        self._stage.settle()
        prefix = f"uploads-{next(_numbers)}"
        before = cpu_seconds(target.pid)
        scale, folder = self._stage.scale, self._stage.folder
        arguments = (method, prefix, SMALL, self._server.headers()["Authorization"])
        rate = load.wrk(target.port, CONNECTIONS, scale.seconds, folder, "upload.lua", *arguments, body=0)
        sample = Sample((rate.per_second,), rate.requests, cpu_seconds(target.pid) - before)
        check_stored(self._stage.files / prefix, rate.requests)
        # wrk leaves in the middle of some requests, whose files may still come.
        shutil.rmtree(self._stage.files / prefix, ignore_errors=True)
        return sample


def check_stored(folder: Path, least: int) -> None:
    """Whether every upload that was answered is there. Others may be on their way, under other names.

    :raises BenchError: one is missing, or has another size.
    """
    sizes = [file.stat().st_size for file in os.scandir(folder) if file.name.endswith(".bin")]
    if len(sizes) < least or set(sizes) != {SMALL}:
        raise BenchError(f"{folder} has {len(sizes)} files of {set(sizes)} bytes, not {least} of {SMALL}")


def send_form(server: Server, folder: str, path: Path) -> float:
    """Seconds for a form with one file."""
    form = ["--form", f"path={folder}", "--form", f"file0=@{path}"]
    return load.curl(f"{server.url}/upload", *form, *authorization(server))


class _Azure:
    """Uploads to Azurite, through the server and by the SDK alone."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._server = stage.azure_server
        self._source = stage.folder / "upload-medium.bin"
        random_file(self._source, stage.scale.medium)
        self._container = stage.azurite.client(stage.container)

    def form(self) -> Sample:
        """Through the server."""
        self._stage.settle()
        pid = self._server.process.pid
        before = cpu_seconds(pid)
        seconds = send_form(self._server, "uploads", self._source)
        return self._checked(Sample((seconds,), cpu_seconds=cpu_seconds(pid) - before))

    def sdk(self) -> Sample:
        """The SDK's own way, from the file, in this process."""
        self._stage.settle()
        before, started = time.process_time(), time.monotonic()
        with self._source.open("rb") as file:
            self._container.upload_blob(self._key, file, overwrite=True, max_concurrency=SDK_CONNECTIONS)
        seconds = time.monotonic() - started
        return self._checked(Sample((seconds,), cpu_seconds=time.process_time() - before))

    @property
    def _key(self) -> str:
        return f"uploads/{self._source.name}"

    def _checked(self, sample: Sample) -> Sample:
        """What was stored is as large as it should be; it is deleted."""
        with self._container.get_blob_client(self._key) as blob:
            size = blob.get_blob_properties().size
        if size != self._stage.scale.medium:
            raise BenchError(f"Azurite has {size} bytes of {self._key}, not {self._stage.scale.medium}")
        headers = self._server.headers()
        if (status := load.ask(self._server.port, "DELETE", f"/{self._key}", headers).status) not in (200, 204):
            raise BenchError(f"{self._key} could not be deleted: {status}")
        return sample
