# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real nginx in front of a server, with the site from ``deploy/``."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

import kci_storage
from tests.support.certificates import self_signed
from tests.support.harness import START_SECONDS, STOP_SECONDS, Server, reserve_port, wait_until

DEPLOYED = Path(kci_storage.__file__).parent.parent / "deploy/nginx"

# The main configuration, which includes the site. Debian's own compresses, too.
_MAIN = """
daemon off;
{user}
worker_processes 2;
worker_rlimit_nofile 20000;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 10000; }}
http {{
    access_log {folder}/common.log;
    gzip on;
    gzip_types *;
    gzip_min_length 1;
    gzip_proxied any;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/unused;
    uwsgi_temp_path {folder}/unused;
    scgi_temp_path {folder}/unused;
    include {folder}/{site};
    {beside}
}}
"""


def main_configuration(folder: Path, site: str, *, user: str = "root", beside: str = "") -> str:
    """nginx.conf for a site.

    :param folder: for all of nginx's files.
    :param site: the name of the site's file in the folder.
    :param user: of the workers, if this process is root's; another one than root may not write into the folder.
    :param beside: configuration to add at the http level.
    """
    as_user = f"user {user};" if os.getuid() == 0 else ""
    return _MAIN.format(folder=folder, site=site, user=as_user, beside=beside)


def site(server: Server, port: int, tls_port: int, redirected_port: int, certificate: Path, cache: Path) -> str:
    """The deployed site, adapted to this machine, with an additional port without TLS.

    :param redirected_port: the port that redirects every request to TLS.
    :param certificate: a file with certificate and key.
    :param cache: the folder that nginx takes for the server's cache.
    """
    text = (DEPLOYED / "kci-storage.conf").read_text()
    text = re.sub(r"^ +listen \[::\].*\n", "", text, flags=re.MULTILINE)
    for old, new in (
        ("server 127.0.0.1:3000;", f"server 127.0.0.1:{server.port};"),
        ("listen 80;", f"listen 127.0.0.1:{redirected_port};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{tls_port} ssl; listen 127.0.0.1:{port};"),
        ("/etc/ssl/certs/storage.example.org.pem", str(certificate)),
        ("/etc/ssl/private/storage.example.org.key", str(certificate)),
        ("/var/cache/kci-storage/;", f"{cache}/;"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


class Frontend(Server):
    """A server behind nginx: all HTTP requests go through nginx."""

    def __init__(self, server: Server, port: int, tls_port: int, redirected_port: int, certificate: Path):
        self.__dict__.update(server.__dict__)
        self.direct = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.tls_url = f"https://127.0.0.1:{tls_port}"
        self.redirected_url = f"http://127.0.0.1:{redirected_port}"
        self.certificate = certificate


@contextlib.contextmanager
def nginx(folder: Path, server: Server, cache: Path | None = None, user: str = "root") -> Iterator[Frontend]:
    """nginx in front of the server, during the block.

    :param folder: for its files; empty.
    :param cache: the folder that nginx takes for the server's cache; None: the server's cache.
    :param user: of nginx's workers, if this process is root's.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(reserve_port())) for _ in range(3)]
        plain, secure, redirected = (reserved.getsockname()[1] for reserved in sockets)
        frontend = Frontend(server, plain, secure, redirected, self_signed(folder).both)
        (folder / "nginx.conf").write_text(main_configuration(folder, "site.conf", user=user))
        shutil.copy(DEPLOYED / "kci-storage-proxy.conf", folder)
        cache = cache or server.cache_directory
        (folder / "site.conf").write_text(site(server, plain, secure, redirected, frontend.certificate, cache))
        stack.enter_context(_running(folder, frontend))
        yield frontend


@contextlib.contextmanager
def _running(folder: Path, frontend: Frontend) -> Iterator[None]:
    errors = folder / "error.log"
    command: list[str | Path] = [program(), "-p", folder, "-c", folder / "nginx.conf", "-e", errors]
    process = subprocess.Popen(command, cwd=folder)

    def is_up() -> bool:
        assert process.poll() is None, errors.read_text()
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{frontend.url}/v1/health", timeout=5).ok
        return False

    try:
        wait_until(is_up, START_SECONDS, "nginx's start")
        yield
    finally:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.terminate()
        process.wait(STOP_SECONDS)
        psutil.wait_procs(children, STOP_SECONDS)


def program() -> str:
    """The path of nginx; the test is skipped where it is not installed."""
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx")
    return found
