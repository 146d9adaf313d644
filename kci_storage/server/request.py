# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answering one request: parses its head, calls the application, and decides whether the connection is kept."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from kci_storage import logfmt
from kci_storage.net import slots
from kci_storage.net.client_socket import ClientSocket
from kci_storage.net.connection import Connection
from kci_storage.net.received import ChunkedBody, LengthBody, Received
from kci_storage.server.gunicorn_parts import MalformedRequest, ParsedRequest, RequestSettings, parse
from kci_storage.server.refusals import internal_error, refusal
from kci_storage.server.response import SERVER, Response, WrappedFile
from kci_storage.wsgi.exchange import CONNECTION, REQUEST_ID

log = logging.getLogger(__name__)

Environ = dict[str, Any]
Body = LengthBody | ChunkedBody | io.BytesIO

# A key of 1,024 characters has up to 12 KiB when percent-encoded.
MAX_TARGET_LENGTH = 16 * 1024  # characters
GONE = (ConnectionError, TimeoutError)  # raised by operations on the socket of a client that is gone
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
MOUNT_VARIABLE = "SCRIPT_NAME"  # environment variable: the path below which the application is mounted


class Requests:
    """Answers requests.

    :param settings: gunicorn's settings.
    :param application: returns the WSGI application.
    :param may_keep: returns whether connections may be kept at all.
    """

    def __init__(self, settings: Any, application: Callable[[], Callable[..., Any]], may_keep: Callable[[], bool]):
        self._settings = RequestSettings(settings)
        self._application = application
        self._may_keep = may_keep

    def answer(self, conn: Connection) -> None:
        """Answer the request whose head has come, and set the connection's ``keep``."""
        conn.keep = False
        slots.begin_request()
        try:
            conn.keep = self._answer(conn)
        except GONE:
            log.debug("event=client_gone request_id=%s", conn.request_id)
        except BaseException:  # the thread must go on, and close the connection
            log.exception(logfmt.line(event="request_failed", request_id=conn.request_id or None))

    def _answer(self, conn: Connection) -> bool:
        head = conn.take_head()
        try:
            received = Received(conn.sock, head if head.isascii() else with_encoded_target(head))
            request = self._parsed(received)
            environ = make_environ(conn, request)
            body = _body(request, environ, received)
            expects_continue = _expects_continue(request, environ)
        except MalformedRequest as exc:
            conn.sock.sendall(refusal(exc.status, conn.client, exc.reason, exc.text, head=head))
            return False
        keep = self._may_keep() and wants_to_stay(request, environ.get("HTTP_CONNECTION", ""))
        response = Response(conn.sock, request.method, request.version, keep)
        environ["wsgi.input"] = body
        environ[CONNECTION] = Channel(conn.sock, body, response, expects_continue)
        self._respond(conn, environ, response)
        conn.head = received.take()
        return response.keep and (isinstance(body, io.BytesIO) or body.is_read)

    def _parsed(self, received: Received) -> ParsedRequest:
        request = parse(self._settings, received)
        if len(request.target) > MAX_TARGET_LENGTH:
            raise MalformedRequest(414, "LongTarget")
        return request

    def _respond(self, conn: Connection, environ: Environ, response: Response) -> None:
        try:
            body = self._application()(environ, response.start_response)
            try:
                response.send(body)
            finally:
                if hasattr(body, "close"):
                    body.close()
        except GONE:
            raise
        except Exception:
            if not response.headers_sent:
                with contextlib.suppress(OSError):
                    conn.sock.sendall(internal_error(environ.get(REQUEST_ID, "")))
            raise
        finally:
            conn.request_id = environ.get(REQUEST_ID, "")


class Channel:
    """The application's access to its connection (:class:`kci_storage.wsgi.exchange.ClientConnection`)."""

    def __init__(self, sock: ClientSocket, body: Body, response: Response, expects_continue: bool):
        self._sock = sock
        self._body = body
        self._response = response
        self._expects_continue = expects_continue

    def continue_body(self) -> None:
        """Send 100 Continue if the client waits for it (RFC 9110, 10.1.1)."""
        if self._expects_continue:
            self._expects_continue = False
            self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def receive_into(self, buffer: memoryview) -> int:
        """Put the next bytes of the body at the beginning of ``buffer``; how many; 0: the body has ended."""
        return self._body.readinto(buffer)

    def close_afterwards(self) -> None:
        """Send ``Connection: close``, and close the connection after this response."""
        self._response.force_close()


def wants_to_stay(request: ParsedRequest, connection: str) -> bool:
    """Whether the client may send another request on this connection (RFC 9112, 9.3).

    :param connection: the value of its ``Connection`` header.
    """
    if request.method == "CONNECT":
        return False  # the next bytes are not HTTP for this server (RFC 9110, 9.3.6)
    if not connection:
        return request.version > (1, 0)
    options = {option.strip(" \t").lower() for option in connection.split(",")}
    return "close" not in options and (request.version > (1, 0) or "keep-alive" in options)


def _body(request: ParsedRequest, environ: Environ, received: Received) -> Body:
    """The request's body. The parser has refused requests with both Content-Length and Transfer-Encoding."""
    if "HTTP_TRANSFER_ENCODING" in environ:
        return ChunkedBody(request.body)
    length = int(environ.get("CONTENT_LENGTH", 0))
    return LengthBody(received, length) if length else io.BytesIO()


def _expects_continue(request: ParsedRequest, environ: Environ) -> bool:
    """Whether the client waits for 100 Continue (RFC 9110, 10.1.1). An empty list is no expectation.

    :raises MalformedRequest: it expects something else.
    """
    expected = {member.strip(" \t").lower() for member in environ.get("HTTP_EXPECT", "").split(",")} - {""}
    if expected - {"100-continue"}:
        raise MalformedRequest(417, "ExpectationFailed")
    return bool(expected) and request.version > (1, 0)


def with_encoded_target(head: bytes) -> bytes:
    r"""The head with its request's target percent-encoded, which busybox wget and lftp leave to the server.

    :raises MalformedRequest: the target is not UTF-8.

    >>> with_encoded_target("GET /ü?x HTTP/1.1\r\nX: é\r\n\r\n".encode())
    b'GET /%C3%BC?x HTTP/1.1\r\nX: \xc3\xa9\r\n\r\n'
    """
    start = 2 if head.startswith(b"\r\n") else 0  # an empty line before the request (RFC 9112, 2.2)
    end = head.find(b"\r\n", start)
    line = head if end < 0 else head[:end]
    try:
        line.decode()
    except UnicodeDecodeError:
        raise MalformedRequest(400, "TargetNotUtf8", "the path is neither percent-encoded nor UTF-8") from None
    method, blank, target = line.partition(b" ")
    return method + blank + _NOT_ASCII.sub(_percent_encoded, target) + head[len(line) :]


def _percent_encoded(match: re.Match[bytes]) -> bytes:
    return b"%%%02X" % ord(match[0])


# The environ


def make_environ(conn: Connection, request: ParsedRequest) -> Environ:
    """A request's WSGI environment (PEP 3333), without its body.

    The part that all requests of a connection share is cached in the connection. On a Unix socket, the server's name
    is taken from ``Host``.

    :raises MalformedRequest: the path is not below the one that the application is mounted at.
    """
    if not conn.environ:
        conn.environ = _of_connection(conn)
    path, query = split_target(request.target)
    major, minor = request.version
    environ = {
        **conn.environ,
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": query,
        "RAW_URI": request.target,
        "SERVER_PROTOCOL": f"HTTP/{major}.{minor}",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1") if "%" in path else path,
    }
    for name, value in request.headers:
        key = _variable(name)
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    if conn.environ["SCRIPT_NAME"]:
        _mount(environ, path)
    if "SERVER_NAME" not in environ:
        host = environ.get("HTTP_HOST", "")
        environ["SERVER_NAME"], environ["SERVER_PORT"] = _name_and_port(host, environ["wsgi.url_scheme"])
    return environ


def _of_connection(conn: Connection) -> Environ:
    environ: Environ = {
        "wsgi.errors": sys.stderr,
        "wsgi.version": (1, 0),
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": WrappedFile,
        "wsgi.input_terminated": True,
        "wsgi.url_scheme": "https" if conn.sock.is_encrypted else "http",
        "SERVER_SOFTWARE": SERVER,
        "SCRIPT_NAME": os.environ.get(MOUNT_VARIABLE, ""),
    }
    if isinstance(conn.server, tuple):
        environ |= {"SERVER_NAME": conn.server[0], "SERVER_PORT": str(conn.server[1])}
    if isinstance(conn.client, tuple):
        return {**environ, "REMOTE_ADDR": conn.client[0], "REMOTE_PORT": str(conn.client[1])}
    return {**environ, "REMOTE_ADDR": ""}


def split_target(target: str) -> tuple[str, str]:
    """The percent-encoded path and the query of a request's target (RFC 9112, 3.2).

    >>> split_target("/a//b?c?d#e"), split_target("//a"), split_target("http://host?a"), split_target("*")
    (('/a//b', 'c?d'), ('//a', ''), ('/', 'a'), ('*', ''))
    """
    if target.startswith("/"):
        path, _, query = target.partition("#")[0].partition("?")
        return path, query
    parts = urlsplit(target)
    return parts.path or "/", parts.query


def _mount(environ: Environ, path: str) -> None:
    below = environ["SCRIPT_NAME"]
    if not path.startswith(below):
        raise MalformedRequest(400, "NotMounted")
    environ["PATH_INFO"] = unquote_to_bytes(path.removeprefix(below)).decode("latin-1")


def _name_and_port(host: str, scheme: str) -> tuple[str, str]:
    """The server's name and port in a ``Host`` header.

    >>> _name_and_port("storage:8080", "http"), _name_and_port("[::1]", "https"), _name_and_port("storage", "http")
    (('storage', '8080'), ('[::1]', '443'), ('storage', '80'))
    """
    name, colon, port = host.rpartition(":")
    if colon and port.isdecimal():
        return name, port
    return host, "443" if scheme == "https" else "80"


@functools.lru_cache(256)
def _variable(name: str) -> str:
    """The environment's key for a header, whose name gunicorn converts to capitals (RFC 3875, 4.1.18)."""
    variable = name.replace("-", "_")
    return variable if name in ("CONTENT-TYPE", "CONTENT-LENGTH") else f"HTTP_{variable}"
