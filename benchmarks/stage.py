# SPDX-License-Identifier: LGPL-2.1-or-later
"""The servers of a bench: each is started when it is first needed, and ended with the bench."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import yardsticks
from benchmarks.measuring import BenchError
from benchmarks.scale import MIB, Scale
from benchmarks.yardsticks import MissingProgram, Program, find
from kci_storage.cache.directory import Cache
from tests.support.azurite import Azurite, running_azurite
from tests.support.harness import Server, unexpected


class Stage:
    """A scratch folder with servers.

    :param folder: empty; on the disk that is measured.
    :param stack: ends the servers.
    """

    def __init__(self, scale: Scale, folder: Path, stack: ExitStack):
        self.scale = scale
        self.folder = folder
        self.left_out: list[str] = []
        self._stack = stack
        self.files = self.new_folder("files")  # the local driver's, nginx's and gunicorn's

    def new_folder(self, name: str) -> Path:
        """Make a folder in the scratch folder."""
        path = self.folder / name
        path.mkdir()
        return path

    def progress(self, text: str) -> None:
        """Print the progress on standard error."""
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def settle(self) -> None:
        """Sync the disk, so that no system's figures include another one's files."""
        subprocess.run(["sync", "--file-system", self.folder], check=True)

    # Ours

    @cached_property
    def local_server(self) -> Server:
        """The server with the local driver, on :attr:`files`."""
        return self._server("local", {"driver": "local", "local": {"storage_path": self.files}})

    @cached_property
    def second_local_server(self) -> Server:
        """Another one, on the same files."""
        return self._server("local-too", {"driver": "local", "local": {"storage_path": self.files}})

    @cached_property
    def guarded_server(self) -> Server:
        """Another one with every rule of access control, none of which refuses a request here."""
        rules = {
            "useragent": {"ban": ["NastyBot"]},
            "block_subnets": [f"198.51.{number}.0/24" for number in range(100)] + ["2001:db8::/32"],
            "limits": {"downloads_per_client": 1_000_000, "requests_per_second": 1e6, "burst": 1_000_000},
            "download_challenge": {"user_agents": ["Mozilla"], "secret": "s" * 32},
        }
        return self._server("guarded", {"driver": "local", "local": {"storage_path": self.files}, **rules})

    @cached_property
    def azure_server(self) -> Server:
        """The server with Azurite as its backend."""
        azure = {"account": self.azurite.account, "key": self.azurite.key, "endpoint": self.azurite.endpoint}
        return self._server("azure", {"driver": "azure", "azure": {**azure, "container": self.container}})

    def _server(self, name: str, document: dict[str, object]) -> Server:
        self.progress(f"starting the server: {name}")
        # Nothing is evicted because the disk is nearly full.
        cache = {"low_disk_percent": 0, "recover_disk_percent": 0}
        document |= {"server": {"workers": yardsticks.WORKERS, "threads": yardsticks.THREADS}, "cache": cache}
        return self._stack.enter_context(_running(Server(self.new_folder(f"server-{name}"), document)))

    # The backend

    @cached_property
    def azurite(self) -> Azurite:
        """The backend of all caches."""
        self.progress("starting Azurite")
        return self._stack.enter_context(running_azurite(self.new_folder("azurite")))

    @cached_property
    def container(self) -> str:
        """A container with public blobs, since nginx and Varnish cannot sign requests."""
        name = self.azurite.new_container()
        with self.azurite.client(name) as container:
            container.set_container_access_policy(signed_identifiers={}, public_access="blob")
        return name

    @property
    def backend(self) -> tuple[str, str]:
        """Azurite's host and port, and the path prefix of the container."""
        url = urlsplit(self.azurite.endpoint)
        return url.netloc, f"{url.path}/{self.container}"

    # The yardsticks

    @cached_property
    def gunicorn(self) -> Program:
        """gunicorn's own threaded worker with the bare function."""
        return self._bare("gunicorn", "gthread")

    @cached_property
    def worker(self) -> Program:
        """Our worker with the bare function."""
        return self._bare("our worker", "kci_storage.server.worker.Worker")

    @cached_property
    def durable_gunicorn(self) -> Program:
        """gunicorn's own threaded worker with the bare function, which syncs files."""
        return self._bare("gunicorn, fsync", "gthread", fsync=True)

    def _bare(self, name: str, worker_class: str, fsync: bool = False) -> Program:
        folder = self.new_folder(name.replace(", ", "-").replace(" ", "-"))
        return self._stack.enter_context(yardsticks.bare_gunicorn(name, worker_class, folder, self.files, fsync))

    @cached_property
    def nginx(self) -> Program | None:
        """nginx with the same files; None: it is not installed."""
        return self._optional(lambda: yardsticks.nginx_files(self.new_folder("nginx"), self.files))

    def nginx_cache(self, folder: Path, buffers: str) -> Program | None:
        """nginx as a cache in front of Azurite."""
        return self._optional(lambda: yardsticks.nginx_cache(folder, *self.backend, buffers))

    def varnish(self) -> Program | None:
        """Varnish in front of Azurite."""
        size = 3 * self.scale.medium + 64 * MIB
        return self._optional(lambda: yardsticks.varnish(self.new_folder("varnish"), *self.backend, size))

    def _optional(self, start: Callable[[], AbstractContextManager[Program]]) -> Program | None:
        """Start a yardstick; None: it is not installed, which is reported once."""
        try:
            return self._stack.enter_context(start())
        except MissingProgram as exc:
            if str(exc) not in self.left_out:
                self.left_out.append(str(exc))
            return None


@contextlib.contextmanager
def _running(server: Server) -> Iterator[Server]:
    """A server that must be clean at its end, unless the bench has failed or was interrupted."""
    try:
        server.start()
        yield server
    except BaseException:
        with contextlib.suppress(AssertionError):  # it is killed if it does not end
            server.stop(yardsticks.STOP_SECONDS)
        raise
    _close(server)


def _close(server: Server) -> None:
    """Stop a server, whose figures are valid only if it is clean.

    :raises BenchError: it is not. The folder with the log will be removed, so the message has the important lines.
    """
    try:
        server.close()
    except AssertionError as exc:
        trouble = unexpected(server.log()) or Cache(server.cache_directory).check() or str(exc).splitlines()
        raise BenchError(f"the server was not clean at its end: {len(trouble)} times {trouble[:3]}") from None


@contextlib.contextmanager
def stage(scale: Scale) -> Iterator[Stage]:
    """A stage in a new folder, which is removed at the end of the block.

    :raises BenchError: a load generator is missing, or there is not enough room on the disk.
    """
    for program in ("wrk", "curl"):
        find(program, program)
    parent = Path(os.environ.get("BENCH_DIR", "/var/tmp"))  # /tmp may be memory
    if shutil.disk_usage(parent).free < scale.disk:
        raise BenchError(f"{parent} has no {scale.disk // MIB} MiB to spare; BENCH_DIR names another folder")
    with _scratch(parent) as folder, ExitStack() as stack:
        yield Stage(scale, folder, stack)


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    folder = parent / f"kci-storage-bench-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
