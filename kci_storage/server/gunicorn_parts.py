# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that this server uses of gunicorn beyond its documentation; checked when it is imported.

gunicorn documents its settings, its hooks and the base class of workers. What else is used stands here and nowhere
else: the other modules see only this one. A gunicorn that names something otherwise, or reads requests otherwise,
stops the start with one line, and not the first client who needs it.
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

from kci_storage.monitoring import logs

Headers = list[tuple[str, str]]

MOST_FIELDS = 100  # header fields of a request, as gunicorn's setting has it


class NotAsExpected(Exception):
    """gunicorn lacks something that is used here, or has it otherwise."""


class Part(NamedTuple):
    """A name of gunicorn's that is used here."""

    module: str
    name: str  # dotted, below the module
    parameters: tuple[str, ...] | None = None  # that a call or an override relies on; None: it is not called
    assigned_in: str = ""  # the function that sets it, where it is an attribute of an object


PARTS = (
    # The worker: how it begins, what stops it, and what it calls.
    Part("gunicorn.workers.base", "Worker", ("self", "age", "ppid", "sockets", "app", "timeout", "cfg", "log")),
    Part("gunicorn.workers.base", "Worker.init_process", ("self",)),
    Part("gunicorn.workers.base", "Worker.init_signals", ("self",)),
    Part("gunicorn.workers.base", "Worker.load_wsgi", ("self",)),
    Part("gunicorn.workers.base", "Worker.run", ("self",)),
    Part("gunicorn.workers.base", "Worker.notify", ("self",)),
    Part("gunicorn.workers.base", "Worker.alive", assigned_in="Worker.handle_exit"),
    Part("gunicorn.workers.base", "Worker.wsgi", assigned_in="Worker.load_wsgi"),
    Part("gunicorn.errors", "AppImportError"),
    # The master: what SIGHUP and a stop do.
    Part("gunicorn.arbiter", "Arbiter"),
    Part("gunicorn.arbiter", "Arbiter.cfg", assigned_in="Arbiter.setup"),
    Part("gunicorn.arbiter", "Arbiter.handle_hup", ("self",)),
    Part("gunicorn.arbiter", "Arbiter.reload", ("self",)),
    Part("gunicorn.arbiter", "Arbiter.stop", ("self", "graceful")),
    Part("gunicorn.errors", "HaltServer"),
    # Its own messages.
    Part("gunicorn.glogging", "Logger.setup", ("self", "cfg")),
    # The settings, to compare those that are in use with what they would be by themselves.
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
    # What it raises, from which the answer's status follows.
    Part("gunicorn.http.errors", "ParseException"),
    Part("gunicorn.http.errors", "LimitRequestHeaders"),
    Part("gunicorn.http.errors", "ExpectationFailed"),
    Part("gunicorn.http.errors", "UnsupportedTransferCoding"),
)


def _check(part: Part) -> None:
    """:raises NotAsExpected: the part is not there, or takes other parameters."""
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
    """Where the parser and the reader of chunked bodies get their bytes from."""

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        """So many bytes, fewer at the end; None: what is there, or comes next, of which ``read_ahead`` are wanted."""

    def unread(self, data: bytes) -> None:
        """Put back what belongs to what comes after."""


class Body(Protocol):
    """A request's body, which is there or is yet to come."""

    def read(self, size: int) -> bytes:
        """The next bytes; fewer than ``size`` at the end.

        :raises Exception: of many kinds: the client is gone, or the coding is broken.
        """


class ParsedRequest(NamedTuple):
    """A request's head, and how to get at its body."""

    method: str
    target: str  # as the client wrote it (RFC 9112, 3.2)
    version: tuple[int, int]
    headers: Headers  # names in capitals
    body: Body


class MalformedRequest(Exception):
    """What came is no request that can be answered otherwise than by a refusal.

    :param status: of the answer.
    :param reason: for the log: the class of what is wrong. A message could quote a header with a token in it.
    """

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason


_STATUSES: dict[type[Exception], int] = {
    errors.LimitRequestHeaders: 431,
    errors.ExpectationFailed: 417,
    errors.UnsupportedTransferCoding: 501,
    errors.ParseException: 400,
}


class RequestSettings:
    """gunicorn's settings, of which its parser looks up many for each request; in a worker they do not change.

    What a proxy says of its client is for ``trusted_proxies`` to believe, and the application does that. How long a
    request's line may be follows from how long a key may be, for which gunicorn's limit is too short.
    """

    http_parser = "python"  # the other one accepts bare line feeds
    proxy_protocol = "off"
    secure_scheme_headers: Mapping[str, str] = MappingProxyType({})
    forwarder_headers: Sequence[str] = ()
    limit_request_line = 0  # none

    def __init__(self, settings: Any):
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(self._settings, name)
        return value


def parse(settings: RequestSettings, source: Source) -> ParsedRequest:
    """Read a request's head.

    gunicorn is not told the client's address: there is nothing that it would believe one rather than another.

    :raises MalformedRequest: it cannot be read.
    """
    try:
        request = Request(settings, source, None)
    except errors.ParseException as exc:
        status = next(status for kind, status in _STATUSES.items() if isinstance(exc, kind))
        raise MalformedRequest(status, type(exc).__name__) from exc
    return ParsedRequest(request.method, request.uri, request.version, request.headers, request.body)


# Processes


class Worker(base.Worker):
    """The base of a worker: what gunicorn calls becomes what a worker of ours does."""

    def __init__(self, age: int, ppid: int, sockets: list[Any], app: Any, timeout: float, cfg: Any, log: Any):
        super().__init__(age, ppid, sockets, app, timeout, cfg, log)
        self.master = ppid
        self.listeners = sockets
        self.settings = cfg

    def init_process(self) -> None:
        """In the new process."""
        self.begin()
        super().init_process()

    def init_signals(self) -> None:
        """From now on signals are heeded."""
        super().init_signals()
        self.heed_signals()

    def load_wsgi(self) -> None:
        """Make the application.

        :raises AppImportError: that cannot be; gunicorn prints the line and ends the server.
        """
        try:
            super().load_wsgi()
        except self.unusable as exc:
            raise AppImportError(f"kci-storage: {exc}") from exc

    def run(self) -> None:
        """Until the worker is told to stop."""
        self.serve()

    def beat(self) -> None:
        """Tell the master that this worker lives."""
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

    # What a worker does

    unusable: tuple[type[Exception], ...] = ()  # what making the application raises when it cannot be

    def begin(self) -> None:
        """Start what must not be shared with the process that this one was forked from."""

    def heed_signals(self) -> None:
        """The signals' handlers are there."""

    def serve(self) -> None:
        """Answer requests until :attr:`is_stopping`, and then for as long as that takes what has begun."""


class Logger(glogging.Logger):
    """Its own messages, as lines of the server's log; in a file, if the setting ``errorlog`` names one."""

    def setup(self, cfg: Any) -> None:
        """At the start, and when the settings have changed."""
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
    """Have SIGHUP call a function of ours, with what gunicorn would do: replace all workers by new ones."""
    new_workers = server.reload
    server.handle_hup = lambda: reload(new_workers)


def stop_despite_failures(server: Any) -> None:
    """Have a server stop that ends because a worker could not start.

    Then most often the next one could not either, and gunicorn, which reaps it while it stops, would end with a
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
    """The settings that a master process has."""
    return _values(server.cfg)


def default_settings() -> dict[str, Any]:
    """What gunicorn's settings are by themselves."""
    return _values(Config())


def _values(settings: Any) -> dict[str, Any]:
    return {name: setting.get() for name, setting in settings.settings.items()}


# Does it work?


class _Sample:
    """A request that has come."""

    def __init__(self, data: bytes):
        self._data = data

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        data, self._data = self._data[:size], self._data[len(self._data) if size is None else size :]
        return data

    def unread(self, data: bytes) -> None:
        self._data = data + self._data


def _rehearse() -> None:
    """Read some requests.

    :raises NotAsExpected: they are not read as they are here.
    """
    settings = RequestSettings(Config())
    put = b"PUT /a%20b?c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /"
    source = _Sample(put)
    method, target, version, headers, body = parse(settings, source)
    expected = "PUT", "/a%20b?c", (1, 1), [("HOST", "x"), ("TRANSFER-ENCODING", "chunked")]
    if (method, target, version, headers) != expected or body.read(5) != b"abc" or source.read() != b"GET /":
        raise NotAsExpected("it reads a request otherwise")
    for status, head in (
        (400, b"GET / HTTP/1.1\r\nHost : x\r\n\r\n"),
        (417, b"GET / HTTP/1.1\r\nExpect: more\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\n" + (MOST_FIELDS + 1) * b"A: b\r\n" + b"\r\n"),
        (501, b"PUT / HTTP/1.1\r\nTransfer-Encoding: br\r\n\r\n"),
    ):
        try:
            parse(settings, _Sample(head))
        except MalformedRequest as exc:
            if exc.status == status:
                continue
        raise NotAsExpected(f"it does not refuse with {status} what is to be refused so")


try:
    _rehearse()
except Exception as _exc:  # noqa: BLE001  (whatever another version makes of them)
    _stop(f"{type(_exc).__name__}: {_exc}" if not isinstance(_exc, NotAsExpected) else _exc)
