"""A request as gunicorn reads it, and as WSGI has it; what is the same for a connection's next one is kept."""

from __future__ import annotations

import functools
from typing import Any

from gunicorn import util
from gunicorn.http import message, wsgi

# What of an environ is a connection's and a server's; the rest is the request's.
OF_CONNECTION = (
    "wsgi.errors",
    "wsgi.version",
    "wsgi.multiprocess",
    "wsgi.run_once",
    "wsgi.file_wrapper",
    "wsgi.input_terminated",
    "SERVER_SOFTWARE",
    "SERVER_NAME",
    "SERVER_PORT",
    "REMOTE_ADDR",
    "REMOTE_PORT",
    "SCRIPT_NAME",
)


class Request(message.Request):
    """gunicorn's, which believes nobody's ``X-Forwarded-*``: that is for ``trusted_proxies`` to say."""

    def _peer_is_trusted_proxy(self) -> bool:
        return False


class Environs:
    """Makes the environs of a connection's requests.

    The first is gunicorn's own, and what it says of the connection is kept. A server on a Unix socket gets its name
    from each request, so there, and where the application is mounted below a path, all are gunicorn's.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def make(self, request: Any, conn: Any, response: type[wsgi.Response]) -> tuple[wsgi.Response, dict[str, Any]]:
        """The response, to be begun, and the environ (PEP 3333)."""
        if self._kept:
            return response(request, conn.sock, conn.cfg), {**self._kept, **_of_request(request)}
        made, environ = wsgi.create(request, conn.sock, conn.client, conn.server, conn.cfg, response)
        environ["wsgi.multithread"] = True
        if not isinstance(conn.server, str) and not environ["SCRIPT_NAME"]:
            self._kept = {name: environ[name] for name in (*OF_CONNECTION, "wsgi.multithread") if name in environ}
        return made, environ


def _of_request(request: Any) -> dict[str, Any]:
    major, minor = request.version
    path = request.path
    environ: dict[str, Any] = {
        "wsgi.input": request.body,
        "wsgi.url_scheme": request.scheme,
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": request.query,
        "RAW_URI": request.uri,
        "SERVER_PROTOCOL": f"HTTP/{major}.{minor}",
        "PATH_INFO": util.unquote_to_wsgi_str(path) if "%" in path else path,
    }
    for name, value in request.headers:
        key = _variable(name)
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ


@functools.lru_cache(256)
def _variable(name: str) -> str:
    """The variable for a header, whose name gunicorn has in capitals (RFC 3875, 4.1.18)."""
    variable = name.replace("-", "_")
    return variable if name in ("CONTENT-TYPE", "CONTENT-LENGTH") else f"HTTP_{variable}"
