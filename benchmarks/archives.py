# SPDX-License-Identifier: LGPL-2.1-or-later
"""Archives: many small files to Azurite in one request, beside the same files one by one."""

from __future__ import annotations

import itertools
import os
import random
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import requests
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import ContainerClient

from benchmarks import load
from benchmarks.hits import authorization
from benchmarks.measuring import OURS, TIME, BenchError, Sample, Workload, cpu_seconds
from benchmarks.scale import KIB
from benchmarks.stage import Stage

THREADS = 64  # that use the SDK; the server uploads as many files of an archive at a time
MADE_UP = 45 * KIB  # bytes of a random device tree: the average of real ones
TREES_VARIABLE = "BENCH_TREES"
DEMO = Path(__file__).resolve().parent.parent / ".tools/demo/unpacked"  # downloaded by `make demo`
_numbers = itertools.count()


def workloads(stage: Stage) -> Iterator[Workload]:
    """The workloads of this group."""
    archive = _Archive(stage)
    kind = "device trees" if archive.real else "made-up device trees"
    yield Workload(
        "archives", f"{len(archive.paths)} {kind} to Azurite", (TIME,), {OURS: archive.ours, "Azure SDK": archive.sdk}
    )


class _Archive:
    """Device trees, as files and packed."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._server = stage.azure_server
        found = sorted(Path(os.environ.get(TREES_VARIABLE) or DEMO).rglob("*.dtb"))
        self.real = bool(found)
        self.paths = self._repeated(found or self._made_up())

    def _made_up(self) -> list[Path]:
        """Random device trees, where no real ones exist; of the same size, and compressible to the same degree."""
        folder = self._stage.new_folder("trees")
        words = [random.randbytes(8) for _ in range(1000)]
        for number in range(min(self._stage.scale.trees, 100)):
            (folder / f"{number}.dtb").write_bytes(b"".join(random.choices(words, k=MADE_UP // 8)))
        return sorted(folder.iterdir())

    def _repeated(self, found: list[Path]) -> dict[str, Path]:
        """The wanted number of files, by name. A kernel has fewer, so they are repeated."""
        rounds = ((number, path) for number in itertools.count() for path in found)
        wanted = itertools.islice(rounds, self._stage.scale.trees)
        return {f"{number}/{path.parent.name}/{path.name}": path for number, path in wanted}

    @cached_property
    def _packed(self) -> Path:
        packed = self._stage.folder / "trees.tar.gz"
        with tarfile.open(packed, "w:gz") as tar:
            for name, path in self.paths.items():
                tar.add(path, name)
        return packed

    def ours(self) -> Sample:
        """Upload all of them as one archive."""
        form = ["--form", f"archive=@{self._packed}"]
        self._stage.settle()
        prefix, pid = self._prefix(), self._server.process.pid
        before = cpu_seconds(pid)
        url = f"{self._server.url}/v1/archive"
        seconds = load.curl(url, "--form", f"path={prefix}", *form, *authorization(self._server))
        return self._checked(prefix, Sample((seconds,), len(self.paths), cpu_seconds(pid) - before))

    def sdk(self) -> Sample:
        """Upload each of them by the SDK, in this process, with one connection per thread."""
        self._stage.settle()
        prefix = self._prefix()
        before, started = time.process_time(), time.monotonic()
        with self._container() as container, ThreadPoolExecutor(THREADS) as threads:

            def upload(name: str) -> None:
                container.upload_blob(f"{prefix}/{name}", self.paths[name].read_bytes(), overwrite=True)

            for _ in threads.map(upload, self.paths):
                pass
        seconds = time.monotonic() - started
        return self._checked(prefix, Sample((seconds,), len(self.paths), time.process_time() - before))

    def _container(self) -> ContainerClient:
        session = requests.Session()
        session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=THREADS))
        azurite = self._stage.azurite
        return ContainerClient(
            azurite.endpoint,
            self._stage.container,
            credential={"account_name": azurite.account, "account_key": azurite.key},
            transport=RequestsTransport(session=session),
        )

    @staticmethod
    def _prefix() -> str:
        return f"archives-{next(_numbers)}"

    def _checked(self, prefix: str, sample: Sample) -> Sample:
        """Check that all files are stored, with their sizes.

        :raises BenchError: they are not.
        """
        with self._stage.azurite.client(self._stage.container) as container:
            found = {blob.name: blob.size for blob in container.list_blobs(f"{prefix}/")}
        if found != {f"{prefix}/{name}": path.stat().st_size for name, path in self.paths.items()}:
            raise BenchError(f"Azurite has {len(found)} files of {prefix}, not the {len(self.paths)} that were sent")
        return sample
