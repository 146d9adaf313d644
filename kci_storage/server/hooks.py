# SPDX-License-Identifier: LGPL-2.1-or-later
"""gunicorn's configuration: the settings, and the hooks that it calls in the master and in its workers.

Used as ``gunicorn -c python:kci_storage.server.hooks``, and by ``gunicorn.conf.py`` for ``gunicorn wsgi:app``. On
import it reads the server's configuration, and ends the process with one line if that cannot be used.
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

MAX_DESCRIPTORS = 2**20  # a higher limit would only make the kernel's tables larger


def _use_certificate(config: Config) -> None:
    """Use this configuration's certificate for new connections; read the file again even if its path is the same."""
    Worker.tls = tls.server_context(config.server.certfile, config.server.keyfile)


def _refuse(reason: object) -> NoReturn:
    print(f"kci-storage: {reason}", file=sys.stderr)
    sys.exit(os.EX_CONFIG)


try:
    _config = preflight.usable()
    open_cache(_config)  # in the master, so that an error is reported once rather than by each worker
except ConfigError as exc:
    _refuse(exc)

logs.configure(debug=wants_debug())
logs.take_over()
_master = _reload.begin(_config, _use_certificate)
_settings = settings.values(_config)
globals().update(_settings)  # where gunicorn looks for them


def on_starting(server: Any) -> None:
    """Check gunicorn's settings, and prepare the master, which is about to listen."""
    in_force, defaults = gunicorn_parts.settings_of(server), gunicorn_parts.default_settings()
    if reason := gunicorn_settings.refusal(in_force, defaults, _settings):
        _refuse(reason)
    try:
        _master.metrics = metrics_folder.choose()  # named after this process: as a daemon, it has another ID by now
    except ConfigError as exc:
        _refuse(exc)
    gunicorn_parts.replace_reload(server, _master.reload)  # gunicorn's own does not validate the configuration
    gunicorn_parts.refuse_upgrade_where_it_would_end_the_server(server)
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
        level = logging.WARNING if _config.server.connections else logging.INFO  # configured, or the default
        fields = {"wanted": wanted, "connections": possible, "descriptors": descriptors}
        log.log(level, logfmt.line(event="connections_lowered", **fields))
    return min(wanted, possible)


def _raise_limit() -> int:
    """Raise the limit of open files; how many descriptors a process can have from now on.

    The usual soft limit of 1,024 is for programs that use ``select()``. Each client, download, upload and lock needs
    a descriptor.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def pre_fork(server: Any, worker: Any) -> None:
    """Give the new worker its number, and block the signals that end a process until it has its own handlers.

    Until then, the worker has the master's handlers, which put the signal into a queue that no code in the worker
    reads. So it would go on serving until the master kills it, ``graceful_timeout`` later.
    """
    worker.number = _master.numbers.take()
    worker.name = numbering.name(os.getpid(), worker.number)
    _master.ledger.assign(worker.number)
    hold_signals()


def post_fork(server: Any, worker: Any) -> None:
    """Called first in a new worker: count in its own row and files from now on."""
    _master.ledger.take(worker.number)
    multiprocess.begin(_master.metrics.path, worker.name)


def post_worker_init(worker: Any) -> None:
    """Called in a new worker that has made the application: start its background threads."""
    worker.services = worker.application.extensions["kci_storage"]
    worker.services.start()
    multiprocess.start_restoring()


def worker_exit(server: Any, worker: Any) -> None:
    """Called when a worker ends, in good order or by an error.

    In good order the process ends here. A normal exit of the interpreter would wait for threads that wait for a
    silent backend, although their clients are gone, and would tear down modules that daemon threads still use.
    """
    services = getattr(worker, "services", None)
    if services is None:
        return
    services.stop()
    ending = sys.exc_info()[1]  # gunicorn raises an exception to end the process
    if isinstance(ending, SystemExit) and not ending.code:
        logging.shutdown()
        os._exit(0)


def child_exit(server: Any, worker: Any) -> None:
    """A worker is gone: remove its gauges and its clients' counts. The next worker of its number has its counters."""
    multiprocess.forget_worker(_master.metrics.path, worker.name)
    _master.ledger.release(worker.number)
    _master.numbers.release(worker.number)


def on_exit(server: Any) -> None:
    """The master ends: remove its counters."""
    _master.metrics.remove()
