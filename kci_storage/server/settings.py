"""gunicorn's settings: read from the configuration, and as facts about gunicorn demand.

Used as ``gunicorn -c python:kci_storage.server.settings``, and by ``gunicorn.conf.py`` for ``gunicorn wsgi:app``.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
import socket
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from kci_storage import logfmt
from kci_storage.access.tokens import MIN_SECRET_BYTES, is_weak
from kci_storage.config.reading import wants_debug
from kci_storage.config.settings import Config, ConfigError
from kci_storage.monitoring import logs, numbering
from kci_storage.net import tls
from kci_storage.server import preflight
from kci_storage.server import reload as _reload  # gunicorn has a setting of that name
from kci_storage.server.worker import (
    LONGEST_REQUEST_LINE,
    Worker,
    hold_signals,
    release_signals,
    stop_workers,
)
from kci_storage.services import open_cache

METRICS_PREFIX = "kci-storage-metrics"
SHARED_MEMORY = Path("/dev/shm")


def metrics_directory() -> str:
    """A folder in memory for the workers' counters, named after the master, before prometheus_client is imported.

    In memory, since a counter's page that finds no room on a full disk kills the worker (SIGBUS).
    """
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    for old in parent.glob(f"{METRICS_PREFIX}-{os.getuid()}-*"):
        pid = int(old.name.rsplit("-", 2)[1])
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{METRICS_PREFIX}-{os.getuid()}-{os.getpid()}-", dir=parent)


def _use_certificate(config: Config) -> None:
    """New connections have this configuration's certificate; also when only the file's content is another one."""
    Worker.tls = tls.server_context(config.server.certfile, config.server.keyfile)


try:
    _config = preflight.usable()
    open_cache(_config)  # before the workers, each of whom would say so
except ConfigError as exc:
    print(f"kci-storage: {exc}", file=sys.stderr)
    sys.exit(os.EX_CONFIG)

os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", metrics_directory())
logs.configure(debug=wants_debug())
_master = _reload.begin(_config, _use_certificate)
Worker.send_timeout = _config.server.send_timeout

bind = _config.server.bind
workers = _config.server.worker_count
threads = _config.server.threads
worker_class = "kci_storage.server.worker.Worker"
worker_tmp_dir = str(SHARED_MEMORY) if os.access(SHARED_MEMORY, os.W_OK) else None
worker_connections = 1000 + threads  # idle ones, and slow readers of files, cost no thread
keepalive = 75  # seconds
timeout = 120  # seconds without a heartbeat after which a worker is killed; its main loop never works
graceful_timeout = 300  # seconds for running transfers at a stop; the rest is cut, and clients resume
max_requests = 0  # a worker that restarts itself is not replaced before its last transfer has ended
preload_app = False  # connections of the SDK that are inherited by a fork mix up their answers
http_parser = "python"  # the other one accepts bare line feeds
limit_request_line = LONGEST_REQUEST_LINE
control_socket_disable = True  # it would be shared by all servers of one user
proc_name = "kci-storage"
# gunicorn must not look at X-Forwarded-*: trusted_proxies says whom to believe, and the application does.
forwarded_allow_ips = ""


def on_starting(server: Any) -> None:
    """gunicorn's own TLS would hide what the worker has to see. Weak secrets work, with one warning."""
    server.handle_hup = partial(_master.reload, server.reload)  # gunicorn's own does not look whether all is valid
    server.stop = partial(stop_workers, server.stop)
    if server.cfg.is_ssl:
        print("kci-storage: for TLS, set certfile and keyfile in the configuration's [server]", file=sys.stderr)
        sys.exit(os.EX_CONFIG)
    if any(is_weak(secret) for secret in _config.secrets):
        server.log.warning(logfmt.line(event="weak_secret", message=f"shorter than {MIN_SECRET_BYTES} bytes"))
    os.register_at_fork(after_in_parent=release_signals)


# Downloads, uploads and their locks are open files; the usual soft limit of 1,024 is for programs that use select().
_, _most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_most_files, _most_files))


def when_ready(server: Any) -> None:
    """A client that vanishes without a word is noticed by the kernel; accepted sockets inherit this."""
    for listener in server.LISTENERS:
        if listener.sock.family in (socket.AF_INET, socket.AF_INET6):
            milliseconds = int(_config.server.send_timeout * 1000)
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def pre_fork(server: Any, worker: Any) -> None:
    """A worker will count in a place of its own; what stops it while it is being forked waits for its handlers.

    Until then it has the master's, which only put the signal into a queue that nobody in the new process looks at: it
    would serve on until the master kills it, ``graceful_timeout`` later.
    """
    worker.number = _master.numbers.take()
    _master.ledger.assign(worker.number)
    hold_signals()


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, first of all."""
    _master.ledger.take(worker.number)
    numbering.own = numbering.name(server.pid, worker.number)


def post_worker_init(worker: Any) -> None:
    """The application is there: start what runs beside requests."""
    worker.app.wsgi().extensions["kci_storage"].start()


def worker_exit(server: Any, worker: Any) -> None:
    """The worker has answered its last request, and ends in good order or by an error.

    In good order it ends here: the interpreter would wait for threads that wait for a silent backend on behalf of
    nobody, and pull the floor from under those that nobody waits for.
    """
    application = getattr(worker, "wsgi", None) and worker.app.wsgi()
    if application is None:
        return
    application.extensions["kci_storage"].stop()
    ending = sys.exc_info()[1]  # what gunicorn raised to end the process
    if isinstance(ending, SystemExit) and not ending.code:
        logging.shutdown()
        os._exit(0)


def child_exit(server: Any, worker: Any) -> None:
    """A worker is gone: its gauges with it, and what its clients had. Its counters go to the next of its number."""
    from kci_storage.monitoring import multiprocess  # only now, since PROMETHEUS_MULTIPROC_DIR must be set before

    multiprocess.forget_worker(numbering.name(server.pid, worker.number))
    _master.ledger.release(worker.number)
    _master.numbers.give_back(worker.number)


def on_exit(server: Any) -> None:
    """The master ends: its counters with it."""
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
