# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's view of the server: one method for each request, without retries."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self
from urllib.parse import quote

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase

from kci_storage import __version__, keys
from kci_storage.client.errors import ClientError, ServerRefused, Unexpected, Unreachable, UsageError
from kci_storage.errors import BadKey

PIECE_SIZE = 256 * 1024  # bytes that are read or sent at a time
MAX_ERROR_TEXT = 4096  # bytes of an error response that are read
MAX_LINE = 64 * 1024  # bytes; a key of 1,024 characters and its properties are far fewer
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")


@dataclass(frozen=True)
class Properties:
    """A stored file's properties."""

    key: str
    size: int  # bytes
    etag: str | None = None  # as sent, with its quotes
    last_modified: str | None = None  # an HTTP date
    content_type: str | None = None
    sha256: str | None = None  # hex; None: the server does not know it


@dataclass(frozen=True)
class Level:
    """One page of a folder's direct entries."""

    folders: list[str]  # with a slash at the end
    files: list[Properties]


class UploadBody(Protocol):
    """A body for ``requests``: it has a length, and is read in pieces."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size``; empty at the end."""


class Download:
    """A stored file, or its rest, as it arrives. Closed at the end of a ``with`` block."""

    def __init__(self, response: requests.Response, properties: Properties, start: int):
        self.properties = properties
        self.start = start  # offset of the first byte that comes
        self._response = response

    def pieces(self) -> Iterator[bytes]:
        """The content, each byte as soon as it has come, so that an interrupted download keeps all of them.

        :raises Unreachable: the connection ended early.
        """
        with _network():
            while piece := self._response.raw.read1(PIECE_SIZE, decode_content=False):
                yield piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._response.close()


class Storage:
    """A server. Thread-safe.

    All methods raise :class:`~kci_storage.client.errors.ServerRefused` if the server's response is an error,
    :class:`~kci_storage.client.errors.Unreachable` if there is no response, and
    :class:`~kci_storage.client.errors.UsageError` for an invalid key.

    :param url: without a slash at the end.
    :param token: for requests that need one; None: there is none.
    :param timeout: seconds without progress after which a connection is closed.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 60):
        self._url = url
        self._token = token
        self._timeout = timeout
        self._of_thread = threading.local()

    # Files

    def url_of(self, key: str) -> str:
        """A file's URL.

        The key is checked first, since a library would resolve ``..`` itself, and request another file.
        """
        try:
            return f"{self._url}/{quote(keys.check_readable(key))}"
        except BadKey as exc:
            raise UsageError(exc.message) from exc

    def properties(self, key: str) -> Properties:
        """A file's properties."""
        with self._ask("HEAD", self.url_of(key)) as response:
            return _properties(key, response)

    def download(self, key: str, start: int = 0, etag: str | None = None) -> Download:
        """The file from ``start`` on if its version is still ``etag``, else the whole file (RFC 9110, 13.1.5)."""
        headers = {"Range": f"bytes={start}-", "If-Range": etag} if start and etag else {}
        response = self._ask("GET", self.url_of(key), headers, stream=True)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise Unexpected("the file came encoded in another way than it is stored")
            return Download(response, *_span(_properties(key, response), response))
        except BaseException:
            response.close()
            raise

    def upload(self, key: str, body: UploadBody, size: int, sha256: str, *, absent: bool = False) -> Properties:
        """Store a file. The server stores it only if its content has the given digest.

        :param size: of the body, in bytes.
        :param sha256: of the body, in hex.
        :param absent: fail if a file of that key exists.
        """
        digest = base64.b64encode(bytes.fromhex(sha256)).decode()
        headers = {"Repr-Digest": f"sha-256=:{digest}:"}
        if absent:
            headers["If-None-Match"] = "*"
        with self._ask("PUT", self.url_of(key), headers, write=True, body=body if size else b"") as response:
            return _confirmed(key, size, sha256, response)

    def delete(self, key: str) -> None:
        """Delete a file."""
        self._ask("DELETE", self.url_of(key), write=True).close()

    # Lists

    def level(self, prefix: str) -> tuple[Level, str | None]:
        """A folder's direct entries: the first page, and the path of the next one, for :meth:`next_page`.

        :param prefix: empty for the top level, else with a slash at the end.
        """
        if prefix:
            self.url_of(f"{prefix}x")
        return self.next_page(f"/{quote(prefix)}" if prefix else keys.ROOT_URL)

    def next_page(self, path: str) -> tuple[Level, str | None]:
        """The page at ``path``, and the path of the one after it."""
        with self._ask("GET", self._url + path, {"Accept": "application/json"}) as response:
            return _level(response)

    def list(self, prefix: str) -> Iterator[Properties]:
        """All files whose key starts with the prefix, as they arrive."""
        url = f"{self._url}/v1/list?format=json&prefix={quote(prefix, safe='')}"
        with self._ask("GET", url, stream=True) as response, _network():
            if response.headers.get("Content-Type") != "application/x-ndjson":
                raise Unexpected("the server's answer is no list of files")
            for line in _lines(response):
                yield _listed(line)

    # Requests

    def _ask(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        *,
        write: bool = False,
        stream: bool = False,
        body: UploadBody | bytes | None = None,
    ) -> requests.Response:
        with _network():
            response = self._session().request(
                method,
                url,
                headers={"Accept-Encoding": "identity", **(headers or {})},
                auth=_Token(self._token if write else None),
                allow_redirects=not write,  # a redirect turns a PUT into a GET, which would look like a success
                stream=stream,
                data=body,
                # While a body is sent, urllib3 uses the first one. It must be long, since a server that waits for
                # another upload of the same key does not read for a while.
                timeout=(self._timeout, self._timeout),
            )
            if 200 <= response.status_code < 300:
                return response
            with response:
                raise ServerRefused(response.status_code, _error_text(response), response.headers.get("Retry-After"))

    def _session(self) -> requests.Session:
        """The calling thread's session."""
        if not hasattr(self._of_thread, "session"):
            session = requests.Session()
            session.headers["User-Agent"] = f"kci-storage/{__version__}"
            for scheme in ("http://", "https://"):
                session.mount(scheme, _Adapter())
            self._of_thread.session = session
        session = self._of_thread.session
        assert isinstance(session, requests.Session)
        return session


class _Adapter(HTTPAdapter):
    """Sends bodies in larger pieces than urllib3's 16 KiB."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **{**kwargs, "blocksize": PIECE_SIZE})


class _Token(AuthBase):
    """Sends the token or none; without this, ``requests`` would use a password from ``~/.netrc``."""

    def __init__(self, token: str | None):
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token is not None:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Turn the libraries' exceptions into :class:`~kci_storage.client.errors.ClientError`."""
    try:
        yield
    except requests.exceptions.SSLError as exc:
        raise ClientError(f"no safe connection: {_reason(exc)}") from exc
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as exc:
        raise Unreachable(_reason(exc)) from exc
    except requests.RequestException as exc:
        raise ClientError(f"the request failed: {printable(str(exc))}") from exc
    except urllib3.exceptions.HTTPError as exc:
        raise Unreachable(_reason(exc)) from exc


def _reason(exc: BaseException) -> str:
    """The innermost exception's message, which the outer ones only quote."""
    inner = exc
    while (cause := inner.__cause__ or inner.__context__) is not None:
        inner = cause
    if isinstance(inner, TimeoutError) or isinstance(exc, requests.Timeout):
        return "the server does not answer in time"
    if isinstance(inner, urllib3.exceptions.IncompleteRead):
        return "the connection ended early"
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return f"the connection failed: {printable(text)}"


def printable(text: str) -> str:
    r"""A text on one line, without control characters for a terminal.

    >>> printable("a\x1b[31mb\nc")
    'a?[31mb c'
    """
    return "".join(each if each.isprintable() else " " if each.isspace() else "?" for each in text)


# Parsing responses


def _properties(key: str, response: requests.Response) -> Properties:
    headers = response.headers
    digest = _DIGEST.search(headers.get("Repr-Digest", ""))
    return Properties(
        key,
        _size(headers.get("Content-Length")),
        headers.get("ETag"),
        headers.get("Last-Modified"),
        headers.get("Content-Type"),
        base64.b64decode(digest[1]).hex() if digest else None,
    )


def _size(text: str | None) -> int:
    if text is None or not text.isascii() or not text.isdigit():
        raise Unexpected("the server does not say how large the file is")
    return int(text)


def _span(properties: Properties, response: requests.Response) -> tuple[Properties, int]:
    """The properties of the whole file, and the offset at which the response begins."""
    if response.status_code != 206:
        return properties, 0
    found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if found is None or int(found[2]) + 1 != int(found[3]):
        raise Unexpected("the server sent another part of the file than it was asked for")
    return Properties(**{**vars(properties), "size": int(found[3])}), int(found[1])


def _confirmed(key: str, size: int, sha256: str, response: requests.Response) -> Properties:
    """The stored file's properties, if the server confirms the sent size and digest."""
    try:
        [stored] = response.json()["files"]
        if (stored["path"], stored["size"], stored["sha256"]) != (key, size, sha256):
            raise Unexpected("the server has stored something else than what was sent")
        return Properties(key, size, stored["etag"], sha256=sha256)
    except (ValueError, KeyError, TypeError) as exc:
        raise Unexpected("the server does not confirm what it has stored") from exc


def _level(response: requests.Response) -> tuple[Level, str | None]:
    """A directory page, and the path of the next one."""
    try:
        page = response.json()
        folders = [str(folder["path"]) for folder in page["folders"]]
        files = [_listed(file) for file in page["files"]]
        following = page["next"]
    except (ValueError, KeyError, TypeError) as exc:
        raise Unexpected("the server's answer is no directory page") from exc
    return Level(folders, files), None if following is None else "/" + str(following).lstrip("/")


def _listed(entry: bytes | dict[str, Any]) -> Properties:
    try:
        fields = json.loads(entry) if isinstance(entry, bytes) else entry
        return Properties(str(fields["path"]), int(fields["size"]), str(fields["etag"]), str(fields["last_modified"]))
    except (ValueError, KeyError, TypeError) as exc:
        raise Unexpected("the server's list cannot be read") from exc


def _lines(response: requests.Response) -> Iterator[bytes]:
    rest = b""
    for piece in response.raw.stream(PIECE_SIZE, decode_content=False):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
        if len(rest) > MAX_LINE:
            raise Unexpected("the server's list cannot be read")
    if rest:
        raise Unreachable("the server's list ended early")


def _error_text(response: requests.Response) -> str:
    """The server's message in an error response; without one, as in a proxy's page, the status's name."""
    if response.is_redirect:
        return f"the server is elsewhere, give its URL: {printable(response.headers['Location'])}"
    content_type = response.headers.get("Content-Type", "")
    text = next(response.iter_content(MAX_ERROR_TEXT), b"").decode(errors="replace")
    if content_type.startswith("application/problem+json"):
        with contextlib.suppress(ValueError, AttributeError):
            text = str(json.loads(text).get("detail", ""))
    elif not content_type.startswith("text/plain"):
        text = ""
    if response.status_code == 404 and not text:
        return "no such file"  # an answer to HEAD has no text
    return printable(text.strip() or response.reason or "error")
