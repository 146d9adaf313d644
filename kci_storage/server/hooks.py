# SPDX-License-Identifier: LGPL-2.1-or-later
"""What gunicorn calls in the life of the master and of its workers; and what it loads for that.

Used as ``gunicorn -c python:kci_storage.server.hooks``, and by ``gunicorn.conf.py`` for ``gunicorn wsgi:app``. On
import it reads the configuration, and ends the process with one line where that cannot be used.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from typing import Any, NoReturn

from kci_storage import logfmt
from kci_storage.access.tokens import MIN_SECRET_BYTES, is_weak
from kci_storage.config.reading import wants_debug
from kci_storage.config.settings import Config, ConfigError
from kci_storage.monitoring import logs, metrics_folder, multiprocess, numbering
from kci_storage.net import tls
from kci_storage.server import gunicorn_parts, gunicorn_settings, preflight, settings
from kci_storage.server import reload as _reload  # gunicorn has a setting of that name
from kci_storage.server.worker import Worker, hold_signals, release_signals
from kci_storage.services import open_cache

log = logging.getLogger("kci_storage.server.hooks")

MOST_DESCRIPTORS = 2**20  # more would only make tables larger


def _use_certificate(config: Config) -> None:
    """New connections have this configuration's certificate; also when only the file's content is another one."""
    Worker.tls = tls.server_context(config.server.certfile, config.server.keyfile)


def _refuse(reason: object) -> NoReturn:
    print(f"kci-storage: {reason}", file=sys.stderr)
    sys.exit(os.EX_CONFIG)


try:
    _config = preflight.usable()
    open_cache(_config)  # before the workers, each of which would say so
except ConfigError as exc:
    _refuse(exc)

logs.configure(debug=wants_debug())
logs.take_over()
_master = _reload.begin(_config, _use_certificate)
_settings = settings.values(_config)
globals().update(_settings)  # where gunicorn looks for them


def on_starting(server: Any) -> None:
    """The master is about to listen: gunicorn must not have been told what this server does not heed."""
    in_force, defaults = gunicorn_parts.settings_of(server), gunicorn_parts.default_settings()
    if reason := gunicorn_settings.refusal(in_force, defaults, _settings):
        _refuse(reason)
    try:
        _master.metrics = metrics_folder.choose()  # named after this process, which is another one in the background
    except ConfigError as exc:
        _refuse(exc)
    gunicorn_parts.replace_reload(server, _master.reload)  # gunicorn's own does not look whether all is valid
    gunicorn_parts.stop_despite_failures(server)
    if any(is_weak(secret) for secret in _config.secrets):
        log.warning(logfmt.line(event="weak_secret", message=f"shorter than {MIN_SECRET_BYTES} bytes"))
    os.register_at_fork(after_in_parent=release_signals)
    Worker.send_timeout = _config.server.send_timeout
    Worker.connections = _connections()


def _connections() -> int:
    """How many connections each worker may have."""
    descriptors = _raise_limit()
    wanted, possible = (
        settings.wanted_connections(_config.server),
        settings.possible_connections(_config, descriptors),
    )
    if possible < wanted:
        level = logging.WARNING if _config.server.connections else logging.INFO  # whether that is what was asked for
        fields = {"wanted": wanted, "connections": possible, "descriptors": descriptors}
        log.log(level, logfmt.line(event="connections_lowered", **fields))
    return min(wanted, possible)


def _raise_limit() -> int:
    """How many descriptors a process can have, from now on.

    The usual soft limit of 1,024 is for programs that use ``select()``; clients, downloads, uploads and their locks
    are open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def pre_fork(server: Any, worker: Any) -> None:
    """A worker will count in a place of its own; what stops it while it is being forked waits for its handlers.

    Until then it has the master's, which only put the signal into a queue that nobody in the new process looks at: it
    would serve on until the master kills it, ``graceful_timeout`` later.
    """
    worker.number = _master.numbers.take()
    worker.name = numbering.name(os.getpid(), worker.number)
    _master.ledger.assign(worker.number)
    hold_signals()


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, first of all."""
    _master.ledger.take(worker.number)
    multiprocess.begin(_master.metrics.path, worker.name)


def post_worker_init(worker: Any) -> None:
    """The application is there: start what runs beside requests."""
    worker.services = worker.application.extensions["kci_storage"]
    worker.services.start()
    multiprocess.start_restoring()


def worker_exit(server: Any, worker: Any) -> None:
    """The worker has answered its last request, and ends in good order or by an error.

    In good order it ends here: the interpreter would wait for threads that wait for a silent backend on behalf of
    nobody, and pull the floor from under those that nobody waits for.
    """
    services = getattr(worker, "services", None)
    if services is None:
        return
    services.stop()
    ending = sys.exc_info()[1]  # what gunicorn raised to end the process
    if isinstance(ending, SystemExit) and not ending.code:
        logging.shutdown()
        os._exit(0)


def child_exit(server: Any, worker: Any) -> None:
    """A worker is gone: its gauges with it, and what its clients had. Its counters go to the next of its number."""
    multiprocess.forget_worker(_master.metrics.path, worker.name)
    _master.ledger.release(worker.number)
    _master.numbers.release(worker.number)


def on_exit(server: Any) -> None:
    """The master ends: its counters with it."""
    _master.metrics.remove()
