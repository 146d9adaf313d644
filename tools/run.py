# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make run``, once the environment exists: a configuration, the server, and lines to paste.

If there is no configuration file, one is written, with the local driver and a new secret. The lines are printed when
the server answers; Ctrl-C or SIGTERM ends it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kci_storage.access import tokens
from kci_storage.config.checks import split_bind
from kci_storage.config.reading import CONFIG_VARIABLE, DEFAULT_FILE, load
from kci_storage.config.settings import Config, ConfigError

FIRST_CONFIG = """\
# Written by `make run`. Every key, with its default and help, is in config.toml.sample.
driver = "local"
jwt_secret = "{secret}"
"""
START_SECONDS = 60
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    """Run until the server ends; returns its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        path = Path(os.environ.get(CONFIG_VARIABLE) or DEFAULT_FILE)
        write_first_config(path)
        config = load(path)
        check_bind(config)
    except (ConfigError, OSError) as exc:
        print(f"run: {exc}", file=sys.stderr)
        return os.EX_CONFIG
    return serve(config)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def write_first_config(path: Path) -> None:
    """Write a configuration to try the server, readable by its owner alone, unless the file exists."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(FIRST_CONFIG.format(secret=tokens.new_secret()))
        print(f"run: wrote {path} with a fresh secret, for the local driver", flush=True)


def check_bind(config: Config) -> None:
    """Check that the address is free. gunicorn would retry for some seconds, with a less helpful message.

    :raises ConfigError: it is not free.
    """
    address = split_bind(config.server.bind)
    if address is None:
        return
    family, kind, protocol, _, resolved = _resolve(config, address)
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(resolved)
        except OSError as exc:
            hint = f"choose another port: make run KCI_STORAGE_PORT={address[1] + 1}"
            raise ConfigError(f"cannot listen on {config.server.bind}: {exc.strerror}; {hint}") from None


def _resolve(config: Config, address: tuple[str, int]) -> tuple[Any, ...]:
    try:
        return socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    except OSError as exc:
        raise ConfigError(f"cannot listen on {config.server.bind}: {exc.strerror}") from None


def serve(config: Config) -> int:
    """Start the server, print the lines when it answers, and wait for its end; returns its exit code."""
    environ = {**os.environ, CONFIG_VARIABLE: str(config.path)}
    with subprocess.Popen([sys.executable, "-m", "kci_storage.cli", "serve"], env=environ) as server:
        try:
            if wait_for_health(config, server):
                print(lines_to_paste(config), flush=True)
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return _wait_for_the_end(server)


def _wait_for_the_end(server: subprocess.Popen[bytes]) -> int:
    try:
        return server.wait()
    except KeyboardInterrupt:  # a second Ctrl-C: do not wait for running downloads
        server.send_signal(signal.SIGQUIT)
        return server.wait()


def wait_for_health(config: Config, server: subprocess.Popen[bytes]) -> bool:
    """Whether the server answers within a minute; False at once if it ends."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if is_healthy(config.server.bind):
                return True
        time.sleep(0.1)
    return False


def is_healthy(bind: str) -> bool:
    """Whether ``/v1/health`` answers with 200.

    :raises OSError: the server does not answer.
    """
    with _connect(bind) as connection:
        connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in connection.makefile("rb").readline()


def _connect(bind: str) -> socket.socket:
    address = split_bind(bind)
    if address is not None:
        return socket.create_connection((EVERYWHERE.get(address[0], address[0]), address[1]), timeout=5)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    connection.connect(bind.removeprefix("unix:"))
    return connection


def base_url(address: tuple[str, int]) -> str:
    """The URL for this machine of a server that listens on host and port.

    >>> base_url(("0.0.0.0", 3000)), base_url(("::", 80))
    ('http://127.0.0.1:3000', 'http://[::1]:80')
    """
    host = EVERYWHERE.get(address[0], address[0])
    return f"http://[{quote(host, safe=':')}]:{address[1]}" if ":" in host else f"http://{host}:{address[1]}"


def writer(config: Config) -> tuple[str, str]:
    """The name of a user with write permission, and a folder to which this user may write."""
    for user in config.users:
        for prefix in user.prefixes:
            return user.name, prefix.rstrip("*").strip("/") or "demo"
    return "demo@example.com", "demo"


def lines_to_paste(config: Config) -> str:
    """Commands that upload and download, for any shell and folder, with a token that is valid for a day.

    README.md has the same commands, with the token in a variable.
    """
    email, folder = writer(config)
    token = tokens.issue(email, config.secrets[0], 1)
    address = split_bind(config.server.bind)
    curl, url = "curl", base_url(address) if address else "http://localhost"
    if address is None:
        curl += f" --unix-socket {shlex.quote(config.server.bind.removeprefix('unix:'))}"
    upload = f"{curl} -H {shlex.quote(f'Authorization: Bearer {token}')}"
    form = f"-F {shlex.quote(f'path={folder}')} -F 'file0=@-;filename=form.txt'"
    return f"""
The server is ready. In another terminal, upload a form as KernelCI's own clients do:

  echo 'Hello, form' | {upload} {form} {url}/upload

upload one file as it is (-T FILE, or - for standard input):

  echo 'Hello, curl' | {upload} -T - {url}/{quote(folder)}/put.txt

and download them:

  {curl} {url}/{quote(folder)}/form.txt
  {curl} {url}/{quote(folder)}/put.txt

Ctrl-C ends the server.
"""


if __name__ == "__main__":
    sys.exit(main())
