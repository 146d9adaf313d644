# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logging in logfmt: ``key=value`` pairs, one line per event, escaped so that no client can forge lines.

All lines go to standard error, where systemd and containers expect them. Each is written by one system call, and is
short enough for an atomic write to a pipe (``PIPE_BUF``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from kci_storage.logfmt import MAX_LINE_SIZE, encoded, line, timestamp, value

if TYPE_CHECKING:
    from kci_storage.wsgi.exchange import Exchange

PROGRAM = "kci_storage"  # messages of its modules' loggers are logfmt already
EVENTS = {"gunicorn.error": "gunicorn", "py.warnings": "warning", PROGRAM: "flask"}  # by logger

log = logging.getLogger(__name__)


def log_access(exchange: Exchange) -> None:
    """Write a request's access line, once its response has been sent."""
    environ = exchange.environ
    raw_path = environ.get("RAW_URI") or environ.get("PATH_INFO", "")
    path = value(raw_path.partition("?")[0])  # without the query, which may hold secrets
    client = {"user": exchange.user} if exchange.user else {"ua": environ.get("HTTP_USER_AGENT", "")}
    _write_line(
        f"ts={timestamp(exchange.started)} event=access ip={value(environ.get('REMOTE_ADDR', ''))} "
        f"status={exchange.status} bytes={exchange.sent} method={value(environ['REQUEST_METHOD'])} path={path} "
        f"{line(**client, cache=exchange.cache)} duration={exchange.duration:.6f} "
        f"{line(request_id=exchange.request_id, error=exchange.error)}"
    )


def _write_line(line: str) -> None:
    """Write a line without the logging module, which would take more time than all else that a hit does.

    One system call per line, so that lines of several threads and processes do not mix.
    """
    with contextlib.suppress(OSError):  # a log that cannot be written must not fail a request
        os.write(sys.stderr.fileno(), encoded(line))


def log_refusal(ip: str, status: int, sent: int, request_id: str, error: str) -> None:
    """Write the access line of a malformed request, whose method and path are unknown.

    :param sent: bytes of the response's body.
    """
    _write_line(
        line(
            ts=timestamp(time.time()),
            event="access",
            ip=ip,
            status=status,
            bytes=sent,
            request_id=request_id,
            error=f"malformed_request: {error}",
        )
    )


class LogfmtFormatter(logging.Formatter):
    """Puts the time and the level before a message of this program, which is logfmt already.

    A traceback becomes one field. So does the message of any other logger: a library's, Flask's (whose logger has
    this program's name), or that of Python's warnings.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = f"ts={timestamp(record.created)} level={record.levelname.lower()} {_message(record)}"
        if record.exc_info:
            text += f" traceback={_traceback(self.formatException(record.exc_info))}"
        return text


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.name.startswith(f"{PROGRAM}."):
        return message
    event = EVENTS.get(record.name)
    logger = record.name if event is None else None
    return line(event=event or "library", logger=logger, pid=record.process, message=message.strip())


def _traceback(text: str) -> str:
    """A traceback as one field; a long one is cut at its beginning, since its end matters most."""
    return value(text[-MAX_LINE_SIZE:], MAX_LINE_SIZE)


class LineHandler(logging.Handler):
    """Writes each record by one system call, so that lines of several threads and processes do not mix."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _write_line(self.format(record))
        except Exception:  # noqa: BLE001  (as logging's own handlers)
            self.handleError(record)


def line_handler() -> logging.Handler:
    """A handler that writes records, as logfmt, to standard error."""
    handler = LineHandler()
    handler.setFormatter(LogfmtFormatter())
    return handler


def configure(*, debug: bool) -> None:
    """Set up this process's logging."""
    root = logging.getLogger(PROGRAM)
    root.handlers[:] = [line_handler()]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
    for noisy in ("azure", "urllib3"):  # at INFO the SDK logs every request, URLs with signatures included
        logging.getLogger(noisy).setLevel(logging.WARNING)


def take_over() -> None:
    """Turn everything else that Python writes to standard error into lines of the log; for server processes."""
    logging.getLogger().handlers[:] = [line_handler()]
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


def _log_uncaught(kind: type[BaseException], error: BaseException, frames: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    _log_error("uncaught", error, where=threading.current_thread().name)


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        _log_error("uncaught", arguments.exc_value, where=arguments.thread and arguments.thread.name)


def _log_unraisable(arguments: sys.UnraisableHookArgs) -> None:
    if arguments.exc_value is not None:
        _log_error("unraisable", arguments.exc_value, where=arguments.object)


def _log_error(event: str, error: BaseException, where: object) -> None:
    """Log an exception that no caller handles."""
    log.error(line(event=event, where=where), exc_info=error)
