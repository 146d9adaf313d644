"""Logging in logfmt: ``key=value`` pairs, one line per event, safe against whatever a client sends.

Everything goes to standard error, where systemd and containers expect it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from typing import TYPE_CHECKING

from kci_storage.logfmt import line, timestamp, value

if TYPE_CHECKING:
    from kci_storage.wsgi.exchange import Exchange


LONGEST_TRACEBACK = 65_536  # characters; its end is what matters most


def log_access(exchange: Exchange) -> None:
    """The one line that every request gets, once its response has gone out."""
    environ = exchange.environ
    raw_path = environ.get("RAW_URI") or environ.get("PATH_INFO", "")
    path = value(raw_path.partition("?")[0])  # a query may hold what nobody should read
    who = {"user": exchange.user} if exchange.user else {"ua": environ.get("HTTP_USER_AGENT", "")}
    _write_line(
        f"ts={timestamp(exchange.started)} event=access ip={value(environ.get('REMOTE_ADDR', ''))} "
        f"status={exchange.status} bytes={exchange.sent} method={value(environ['REQUEST_METHOD'])} path={path} "
        f"{line(**who, cache=exchange.cache)} duration={exchange.duration:.6f} "
        f"{line(request_id=exchange.request_id, error=exchange.error)}"
    )


def _write_line(line: str) -> None:
    """Write past the logging module, which costs a hit more than finding its file does.

    One system call for a line, so that those of several threads and processes do not mix.
    """
    with contextlib.suppress(OSError):  # nobody reads the log any more; that is no reason to fail a request
        os.write(sys.stderr.fileno(), f"{line}\n".encode())


def log_refusal(ip: str, status: int, sent: int, request_id: str, error: str) -> None:
    """The access line of what never became a request, so that its method and path are not known."""
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
    """Puts the time and the level before a message that is logfmt already, and a traceback into one field."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"ts={timestamp(record.created)} level={record.levelname.lower()} {record.getMessage()}"
        if record.exc_info:
            line += f" traceback={value(self.formatException(record.exc_info), LONGEST_TRACEBACK)}"
        return line


def configure(*, debug: bool) -> None:
    """Set up this process's logging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    root = logging.getLogger("kci_storage")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    root.propagate = False
    for noisy in ("azure", "urllib3"):  # at INFO the SDK logs every request, URLs with signatures included
        logging.getLogger(noisy).setLevel(logging.WARNING)
