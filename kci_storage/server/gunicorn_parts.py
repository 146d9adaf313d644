# SPDX-License-Identifier: LGPL-2.1-or-later
"""The undocumented parts of gunicorn that this server uses, checked when this module is imported.

gunicorn documents its settings, its hooks and the base class of workers. All other parts are used in this module
alone. If a version of gunicorn has other names, or parses requests differently, the server refuses to start with one
line, rather than fail at the first request that needs the part.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, Protocol

from kci_storage import logfmt
from kci_storage.monitoring import logs

log = logging.getLogger(__name__)

Headers = list[tuple[str, str]]

MAX_FIELDS = 100  # header fields of a request, the default of gunicorn's setting


class NotAsExpected(Exception):
    """A part of gunicorn is missing or has changed."""


class Part(NamedTuple):
    """A name of gunicorn's that is used here."""

    module: str
    name: str  # dotted, below the module
    parameters: tuple[str, ...] | None = None  # a call or an override relies on these; None: it is not called
    assigned_in: str = ""  # for an attribute of an object: the function that sets it


PARTS = (
    # The worker: its start, its end, and the methods that it calls.
    Part("gunicorn.workers.base", "Worker", ("self", "age", "ppid", "sockets", "app", "timeout", "cfg", "log")),
    Part("gunicorn.workers.base", "Worker.init_process", ("self",)),
    Part("gunicorn.workers.base", "Worker.init_signals", ("self",)),
    Part("gunicorn.workers.base", "Worker.load_wsgi", ("self",)),
    Part("gunicorn.workers.base", "Worker.run", ("self",)),
    Part("gunicorn.workers.base", "Worker.notify", ("self",)),
    Part("gunicorn.workers.base", "Worker.alive", assigned_in="Worker.handle_exit"),
    Part("gunicorn.workers.base", "Worker.wsgi", assigned_in="Worker.load_wsgi"),
    Part("gunicorn.errors", "AppImportError"),
    # The master: reload (SIGHUP), the next master (SIGUSR2) and stop.
    Part("gunicorn.arbiter", "Arbiter"),
    Part("gunicorn.arbiter", "Arbiter.cfg", assigned_in="Arbiter.setup"),
    Part("gunicorn.arbiter", "Arbiter.handle_hup", ("self",)),
    Part("gunicorn.arbiter", "Arbiter.reload", ("self",)),
    Part("gunicorn.arbiter", "Arbiter.handle_usr2", ("self",)),
    Part("gunicorn.arbiter", "Arbiter.master_pid", assigned_in="Arbiter.__init__"),
    Part("gunicorn.arbiter", "Arbiter.num_workers", assigned_in="Arbiter.setup"),
    Part("gunicorn.arbiter", "Arbiter.stop", ("self", "graceful")),
    Part("gunicorn.errors", "HaltServer"),
    # Its own messages.
    Part("gunicorn.glogging", "Logger.setup", ("self", "cfg")),
    # The settings, to compare those in use with gunicorn's defaults.
    Part("gunicorn.config", "Config", ("self", "usage", "prog")),
    Part("gunicorn.config", "Config.settings", assigned_in="Config.__init__"),
    Part("gunicorn.config", "Setting.get", ("self",)),
    # The parser of requests, and the reader of chunked bodies.
    Part("gunicorn.http.message", "Request", ("self", "cfg", "unreader", "peer_addr", "req_number")),
    Part("gunicorn.http.message", "Request.method", assigned_in="Request.__init__"),
    Part("gunicorn.http.message", "Request.uri", assigned_in="Request.__init__"),
    Part("gunicorn.http.message", "Request.version", assigned_in="Message.__init__"),
    Part("gunicorn.http.message", "Request.headers", assigned_in="Message.__init__"),
    Part("gunicorn.http.message", "Request.body", assigned_in="Message.__init__"),
    Part("gunicorn.http.body", "Body.read", ("self", "size")),
    # The parser's exceptions, which determine the response's status.
    Part("gunicorn.http.errors", "ParseException"),
    Part("gunicorn.http.errors", "LimitRequestHeaders"),
    Part("gunicorn.http.errors", "UnsupportedTransferCoding"),
)


def _check(part: Part) -> None:
    """Check that a part exists and has the expected parameters.

    :raises NotAsExpected: it does not.
    """
    _, _, attribute = part.name.rpartition(".")
    if part.assigned_in:
        if attribute not in _assigned(_found(part.module, part.assigned_in)):
            raise NotAsExpected(f"{part.module}.{part.name} is not set by {part.assigned_in}")
        return
    found = _found(part.module, part.name)
    if part.parameters is not None:
        function = found.__init__ if inspect.isclass(found) else found
        if (names := tuple(inspect.signature(function).parameters)) != part.parameters:
            raise NotAsExpected(f"{part.module}.{part.name} takes {', '.join(names)}")


def _found(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for step in name.split("."):
        found = getattr(found, step, None)
    if found is None:
        raise NotAsExpected(f"{module}.{name} is missing")
    return found


def _assigned(function: Any) -> set[str]:
    """The attributes that a function sets."""
    return {str(step.argval) for step in dis.get_instructions(function) if step.opname == "STORE_ATTR"}


def _stop(reason: object) -> NoReturn:
    from gunicorn import __version__

    print(f"kci-storage: gunicorn {__version__} cannot be used: {reason}; 27.0.1 can", file=sys.stderr)
    sys.exit(os.EX_CONFIG)


try:
    for _part in PARTS:
        _check(_part)
except (ImportError, NotAsExpected) as _exc:
    _stop(_exc)

from gunicorn import glogging
from gunicorn.config import Config
from gunicorn.errors import AppImportError, HaltServer
from gunicorn.http import errors
from gunicorn.http.message import Request
from gunicorn.workers import base

# Requests


class Source(Protocol):
    """The parser's source of bytes (:class:`kci_storage.net.received.Received`)."""

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        """Exactly ``size`` bytes, fewer at the end; None: as many as have come, where ``read_ahead`` are wanted."""

    def unread(self, data: bytes) -> None:
        """Put bytes back in front of the others."""


class Body(Protocol):
    """A request's body."""

    def read(self, size: int) -> bytes:
        """The next bytes; fewer than ``size`` at the end.

        :raises Exception: of many classes: the client is gone, or the encoding is broken.
        """


class ParsedRequest(NamedTuple):
    """A request's head, and the reader of its body."""

    method: str
    target: str  # as the client wrote it (RFC 9112, 3.2)
    version: tuple[int, int]
    headers: Headers  # names in capitals
    body: Body


class MalformedRequest(Exception):
    """The request is malformed, and has to be refused.

    :param status: of the response.
    :param reason: for the log: the class of the error, since its message might quote a header with a token in it.
    :param text: the response's text; empty: the usual one for the status.
    """

    def __init__(self, status: int, reason: str, text: str = ""):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.text = text


_STATUSES: dict[type[Exception], int] = {
    errors.LimitRequestHeaders: 431,
    errors.UnsupportedTransferCoding: 501,
    errors.ParseException: 400,
}


class RequestSettings:
    """gunicorn's settings for its parser, cached since they are looked up for each request and do not change.

    The application evaluates a proxy's headers itself, by ``trusted_proxies``. The length of the request line is
    limited by this server, since gunicorn's limit is too short for the longest key.
    """

    http_parser = "python"  # the other parser accepts bare line feeds
    proxy_protocol = "off"
    secure_scheme_headers: Mapping[str, str] = MappingProxyType({})
    forwarder_headers: Sequence[str] = ()
    limit_request_line = 0  # no limit

    def __init__(self, settings: Any):
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(self._settings, name)
        return value


class _Request(Request):
    """gunicorn's parser, but for expectations: it takes an empty list of them for one that it does not know.

    :func:`_rehearse` shows whether the attribute still does this.
    """

    _policy_expect_continue = False


def parse(settings: RequestSettings, source: Source) -> ParsedRequest:
    """Parse a request's head.

    gunicorn does not get the client's address, since it must not evaluate any proxy's headers.

    :raises MalformedRequest: it cannot be parsed.
    """
    try:
        request = _Request(settings, source, None)
    except errors.ParseException as exc:
        status = next(status for kind, status in _STATUSES.items() if isinstance(exc, kind))
        raise MalformedRequest(status, type(exc).__name__) from exc
    return ParsedRequest(request.method, request.uri, request.version, request.headers, request.body)


# Processes


class Worker(base.Worker):
    """The base class of the worker: maps the methods that gunicorn calls to methods with this server's names."""

    def __init__(self, age: int, ppid: int, sockets: list[Any], app: Any, timeout: float, cfg: Any, log: Any):
        super().__init__(age, ppid, sockets, app, timeout, cfg, log)
        self.master = ppid
        self.listeners = sockets
        self.settings = cfg

    def init_process(self) -> None:
        """Called in the new process."""
        self.begin()
        super().init_process()

    def init_signals(self) -> None:
        """Install the signal handlers."""
        super().init_signals()
        self.handle_signals()

    def load_wsgi(self) -> None:
        """Make the application.

        :raises AppImportError: it cannot be made; gunicorn prints the message and ends the server.
        """
        try:
            super().load_wsgi()
        except self.unusable as exc:
            raise AppImportError(f"kci-storage: {exc}") from exc

    def run(self) -> None:
        """Answer requests until the worker is told to stop."""
        self.serve()

    def beat(self) -> None:
        """Send the heartbeat to the master."""
        self.notify()

    @property
    def is_stopping(self) -> bool:
        """Whether a signal has told this worker to stop."""
        return not self.alive

    @property
    def application(self) -> Callable[..., Any]:
        """The WSGI application."""
        application: Callable[..., Any] = self.wsgi
        return application

    # To be overridden

    unusable: tuple[type[Exception], ...] = ()  # exceptions for an application that cannot be made

    def begin(self) -> None:
        """Create the resources that must not be shared with the parent process."""

    def handle_signals(self) -> None:
        """Called when the signal handlers have been installed."""

    def serve(self) -> None:
        """Answer requests until :attr:`is_stopping`, and then finish the requests that have begun."""


class Logger(glogging.Logger):
    """gunicorn's own messages, as lines of the server's log; in a file, if the setting ``errorlog`` names one."""

    def setup(self, cfg: Any) -> None:
        """Called at the start, and when the settings have changed."""
        super().setup(cfg)
        log = logging.getLogger("gunicorn.error")
        for handler in tuple(log.handlers):
            if isinstance(handler, logging.FileHandler):
                handler.setFormatter(logs.LogfmtFormatter())
            else:
                log.removeHandler(handler)
        if cfg.errorlog == "-":
            log.addHandler(logs.line_handler())


def replace_reload(server: Any, reload: Callable[[Callable[[], None]], None]) -> None:
    """Make SIGHUP call ``reload``, whose argument is gunicorn's own reaction: replace all workers by new ones.

    Two cases are gunicorn's. A master whose workers SIGWINCH has ended starts them again. And one that has been
    started by SIGUSR2 would take the PID file of the old master, and end because that still runs.
    """
    new_workers = server.reload

    def handle_hup() -> None:
        if server.master_pid and server.cfg.pidfile:
            log.error(logfmt.line(event="reload_refused", reason="the old master still runs, and has the PID file"))
            return
        reload(new_workers)
        if not server.num_workers:
            new_workers()

    server.handle_hup = handle_hup


def refuse_upgrade_where_it_would_end_the_server(server: Any) -> None:
    """Refuse SIGUSR2 where the end of the old master would end the new one too: under systemd, and in a container."""
    upgrade = server.handle_usr2
    # What systemd says to a service (sd_notify(3), sd_listen_fds(3)); gunicorn removes one of these variables later.
    has_systemd = "NOTIFY_SOCKET" in os.environ or os.environ.get("LISTEN_PID") == str(os.getpid())

    def handle_usr2() -> None:
        if has_systemd:
            log.error(logfmt.line(event="upgrade_refused", reason="systemd supervises this master: restart the unit"))
        elif os.getpid() == 1:
            log.error(logfmt.line(event="upgrade_refused", reason="a container ends with its first process"))
        else:
            upgrade()

    server.handle_usr2 = handle_usr2


def stop_despite_failures(server: Any) -> None:
    """Let the master stop in good order if a worker cannot start.

    Most often the next worker cannot start either. gunicorn reaps that one while it stops, and would end with a
    traceback.
    """
    stop = server.stop

    def stop_workers(graceful: bool = True) -> None:
        while True:
            try:
                stop(graceful)
            except HaltServer:
                continue
            return

    server.stop = stop_workers


# Settings


def settings_of(server: Any) -> dict[str, Any]:
    """The master's settings, by name."""
    return _values(server.cfg)


def default_settings() -> dict[str, Any]:
    """gunicorn's default settings, by name."""
    return _values(Config())


def _values(settings: Any) -> dict[str, Any]:
    return {name: setting.get() for name, setting in settings.settings.items()}


# The check of the parser


class _Sample:
    """A sample request, as a source of bytes."""

    def __init__(self, data: bytes):
        self._data = data

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        data, self._data = self._data[:size], self._data[len(self._data) if size is None else size :]
        return data

    def unread(self, data: bytes) -> None:
        self._data = data + self._data


def _rehearse() -> None:
    """Parse sample requests.

    :raises NotAsExpected: the result is not the expected one.
    """
    settings = RequestSettings(Config())
    head = b"PUT /a%20b?c HTTP/1.1\r\nHost: x\r\nExpect: \r\nTransfer-Encoding: chunked\r\n\r\n"
    put = head + b"3\r\nabc\r\n0\r\n\r\nGET /"
    source = _Sample(put)
    method, target, version, headers, body = parse(settings, source)
    expected = "PUT", "/a%20b?c", (1, 1), [("HOST", "x"), ("EXPECT", ""), ("TRANSFER-ENCODING", "chunked")]
    if (method, target, version, headers) != expected or body.read(5) != b"abc" or source.read() != b"GET /":
        raise NotAsExpected("it parses a request differently")
    for status, head in (
        (400, b"GET / HTTP/1.1\r\nHost : x\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\n" + (MAX_FIELDS + 1) * b"A: b\r\n" + b"\r\n"),
        (501, b"PUT / HTTP/1.1\r\nTransfer-Encoding: br\r\n\r\n"),
    ):
        try:
            parse(settings, _Sample(head))
        except MalformedRequest as exc:
            if exc.status == status:
                continue
        raise NotAsExpected(f"it does not refuse a request with the expected status {status}")


try:
    _rehearse()
except Exception as _exc:  # noqa: BLE001  (another version may raise anything)
    _stop(f"{type(_exc).__name__}: {_exc}" if not isinstance(_exc, NotAsExpected) else _exc)
