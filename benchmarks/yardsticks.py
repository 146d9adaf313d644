# SPDX-License-Identifier: LGPL-2.1-or-later
"""The programs for comparison: each is started on a free port, in its own folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.measuring import BenchError, family
from tests.deploy.nginx import main_configuration
from tests.support.harness import reserve_port

START_SECONDS, STOP_SECONDS = 60, 10
WORKERS, THREADS, KEEPALIVE = 2, 64, 75  # processes, threads in each, seconds: the server's own
ROOT = Path(__file__).resolve().parent.parent


class MissingProgram(BenchError):
    """A program is not installed."""

    def __init__(self, program: str, package: str):
        super().__init__(f"{program} is missing; on Debian: apt-get install {package}")


def find(program: str, package: str) -> str:
    """The path of a program.

    :raises MissingProgram: it is not installed.
    """
    # Debian installs some programs in folders that are only in root's PATH.
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise MissingProgram(program, package)
    return path


class Program:
    """A running yardstick."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes]):
        self.name = name
        self.port = port
        self._process = process

    @property
    def pid(self) -> int:
        """The process ID of its first process."""
        return self._process.pid


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[object],
    port: int,
    log: Path,
    cwd: Path = ROOT,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Program]:
    """Start a program, wait until it listens, and end it and its descendants at the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env={**os.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_it_listens(name, process, port, log)
        yield Program(name, port, process)
    finally:
        _end(process)


def _wait_until_it_listens(name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise BenchError(f"{name} did not start: {log.read_text(errors='replace').strip()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM; after a while, SIGKILL to the processes that are left."""
    with contextlib.suppress(psutil.NoSuchProcess):
        members = family(process.pid)
        process.terminate()
        _, alive = psutil.wait_procs(members, STOP_SECONDS)
        for member in alive:
            member.kill()
    process.wait()


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A port that is reserved during the block, and which a program may bind."""
    with reserve_port() as reserved:
        yield reserved.getsockname()[1]


# gunicorn with the bare function


_GUNICORN = """
bind = "127.0.0.1:{port}"
workers, threads, keepalive = {workers}, {threads}, {keepalive}
worker_class = "{worker_class}"
worker_tmp_dir = {worker_tmp_dir!r}
http_parser = "python"
control_socket_disable = True
accesslog = "{folder}/access.log"
"""


@contextlib.contextmanager
def bare_gunicorn(name: str, worker_class: str, folder: Path, files: Path, fsync: bool = False) -> Iterator[Program]:
    """gunicorn with the server's settings, and with the bare function.

    :param fsync: whether files are synced before the answer is sent.
    """
    with _free_port() as port:
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        settings = folder / "settings.py"
        settings.write_text(
            _GUNICORN.format(
                port=port,
                workers=WORKERS,
                threads=THREADS,
                keepalive=KEEPALIVE,
                worker_class=worker_class,
                worker_tmp_dir=shared,
                folder=folder,
            )
        )
        command = [sys.executable, "-m", "gunicorn", "--config", settings, "benchmarks.bare:app"]
        environ = {"BENCH_FILES": str(files), "BENCH_FSYNC": "1" if fsync else ""}
        with running(name, command, port, folder / "log", environ=environ) as program:
            yield program


# nginx


_SITE = """
server {{
    listen 127.0.0.1:{port};
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    gzip off;
    keepalive_requests 1000000;
    client_max_body_size 0;
    {server}
}}
"""

_FILES = """
        root {files};
        location / {{
            dav_methods PUT;
            create_full_put_path on;
        }}
"""

_CACHE = """
    upstream backend {{
        server {host};
        keepalive 16;
    }}
    proxy_cache_path {folder}/cache levels=2 keys_zone=cache:10m inactive=1h use_temp_path=off;
    {buffers}
"""

# Without this, nginx reads 4 KiB at a time from the backend.
LARGE_BUFFERS = "proxy_buffer_size 64k; proxy_buffers 16 64k; proxy_busy_buffers_size 128k;"

_CACHED = """
        location / {{
            rewrite ^(.*)$ {prefix}$1 break;
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host {host};
            proxy_set_header Accept-Encoding "";
            proxy_pass_request_headers off;
            proxy_cache cache;
            proxy_cache_key $request_uri;
            proxy_cache_lock on;
            proxy_cache_lock_timeout 60s;
            proxy_cache_lock_age 60s;
            proxy_cache_valid 200 1h;
            add_header X-Cache $upstream_cache_status;
        }}
"""


@contextlib.contextmanager
def _nginx(name: str, folder: Path, http: str, server: str) -> Iterator[Program]:
    with _free_port() as port:
        config = folder / "nginx.conf"
        config.write_text(main_configuration(folder, "site.conf", beside=http))
        (folder / "site.conf").write_text(_SITE.format(port=port, server=server))
        command = [find("nginx", "nginx"), "-p", folder, "-c", config, "-e", folder / "error.log"]
        with running(name, command, port, folder / "log", folder) as program:
            yield program


@contextlib.contextmanager
def nginx_files(folder: Path, files: Path) -> Iterator[Program]:
    """nginx with a folder: plain files, and PUT by WebDAV."""
    with _nginx("nginx", folder, "", _FILES.format(files=files)) as program:
        yield program


@contextlib.contextmanager
def nginx_cache(folder: Path, host: str, prefix: str, buffers: str = "") -> Iterator[Program]:
    """nginx as a cache in front of a host.

    :param prefix: of each path at the host.
    :param buffers: settings in addition to nginx's defaults.
    """
    http = _CACHE.format(folder=folder, host=host, buffers=buffers)
    with _nginx("nginx", folder, http, _CACHED.format(prefix=prefix, host=host)) as program:
        yield program


# Varnish


_VCL = """
vcl 4.1;

backend default {{
    .host = "{address}";
    .port = "{port}";
}}

sub vcl_recv {{
    if (req.method == "PURGE") {{
        return (purge);
    }}
}}

sub vcl_backend_fetch {{
    set bereq.url = "{prefix}" + regsub(bereq.url, "\\?.*$", "");
    set bereq.http.Host = "{host}";
    unset bereq.http.Accept-Encoding;
}}

sub vcl_backend_response {{
    set beresp.do_stream = true;
    set beresp.ttl = 1h;
}}
"""


@contextlib.contextmanager
def varnish(folder: Path, host: str, prefix: str, size: int) -> Iterator[Program]:
    """Varnish in front of a host.

    :param size: bytes that it may store, in a file in ``folder``.
    """
    with _free_port() as port:
        address, _, backend_port = host.partition(":")
        vcl = folder / "cache.vcl"
        vcl.write_text(_VCL.format(address=address, port=backend_port, host=host, prefix=prefix))
        listening = ["-F", "-a", f"127.0.0.1:{port}", "-T", "none", "-j", "none"]
        storage = ["-f", vcl, "-n", folder / "work", "-s", f"file,{folder}/storage,{size}"]
        with running("Varnish", [find("varnishd", "varnish"), *listening, *storage], port, folder / "log") as program:
            yield program
