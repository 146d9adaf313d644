# SPDX-License-Identifier: LGPL-2.1-or-later
"""Uploads: large and small files to the local disk, and large ones to Azurite."""

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
    """The workloads of this group."""
    local = _Local(stage)
    large, medium, small = size_text(stage.scale.large), size_text(stage.scale.medium), size_text(SMALL)
    yield Workload("uploads", f"form of {large}", (TIME,), local.large_turns(local.form))
    yield Workload("uploads", f"PUT of {large}", (TIME,), local.large_turns(local.put))
    yield Workload("uploads", f"forms of {small}", (RATE,), local.small_turns("POST"))
    yield Workload("uploads", f"PUTs of {small}", (RATE,), local.small_turns("PUT"))
    azure = _Azure(stage)
    yield Workload("uploads", f"form of {medium} to Azurite", (TIME,), {OURS: azure.form, "Azure SDK": azure.sdk})


class _Local:
    """Uploads to the local driver, nginx and gunicorn, in the same folder."""

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
        """Uploads of a large file, to our server by ``ours``, to the yardsticks by PUT."""
        turns: dict[str, Callable[[], Sample]] = {OURS: partial(self._large, Ours(self._server), ours)}
        for name, target in self._yardsticks.items():
            turns[name] = partial(self._large, target, partial(self._plain_put, target))
        return turns

    def form(self) -> float:
        """Upload a form as KernelCI's uploader does; returns the seconds."""
        return send_form(self._server, "uploads", self._source)

    def put(self) -> float:
        """Upload a raw body; returns the seconds."""
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
            raise BenchError(f"port {target.port} has stored another content than was sent")
        stored.unlink()
        return sample

    # Small files

    def small_turns(self, method: str) -> dict[str, Callable[[], Sample]]:
        """Uploads of many small files on several connections."""
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
        # wrk ends in the middle of some requests, whose files may still be written.
        shutil.rmtree(self._stage.files / prefix, ignore_errors=True)
        return sample


def check_stored(folder: Path, minimum: int) -> None:
    """Check that every acknowledged upload is stored. Others may still be running, under temporary names.

    :raises BenchError: one is missing, or has another size.
    """
    sizes = [file.stat().st_size for file in os.scandir(folder) if file.name.endswith(".bin")]
    if len(sizes) < minimum or set(sizes) != {SMALL}:
        raise BenchError(f"{folder} has {len(sizes)} files of {set(sizes)} bytes, not {minimum} of {SMALL}")


def send_form(server: Server, folder: str, path: Path) -> float:
    """Upload a form with one file; returns the seconds."""
    form = ["--form", f"path={folder}", "--form", f"file0=@{path}"]
    return load.curl(f"{server.url}/upload", *form, *authorization(server))


class _Azure:
    """Uploads to Azurite, through the server and by the SDK."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._server = stage.azure_server
        self._source = stage.folder / "upload-medium.bin"
        random_file(self._source, stage.scale.medium)
        self._container = stage.azurite.client(stage.container)

    def form(self) -> Sample:
        """Upload through the server."""
        self._stage.settle()
        pid = self._server.process.pid
        before = cpu_seconds(pid)
        seconds = send_form(self._server, "uploads", self._source)
        return self._checked(Sample((seconds,), cpu_seconds=cpu_seconds(pid) - before))

    def sdk(self) -> Sample:
        """Upload by the SDK, from the file, in this process."""
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
        """Check the size of the stored file, and delete it.

        :raises BenchError: it is another one.
        """
        with self._container.get_blob_client(self._key) as blob:
            size = blob.get_blob_properties().size
        if size != self._stage.scale.medium:
            raise BenchError(f"Azurite has {size} bytes of {self._key}, not {self._stage.scale.medium}")
        headers = self._server.headers()
        if (status := load.ask(self._server.port, "DELETE", f"/{self._key}", headers).status) not in (200, 204):
            raise BenchError(f"{self._key} could not be deleted: {status}")
        return sample
