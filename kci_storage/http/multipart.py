# SPDX-License-Identifier: LGPL-2.1-or-later
"""Multipart forms (RFC 7578), decoded piece by piece as they arrive, and the rules for the names of their parts.

A file name is taken whole, or its part is refused; libraries for forms cut the names that they cannot read, or keep a
part of their encoding. Nor do they find the parts as it is done here. Werkzeug's decoder takes five times as long for
a form of 16 KiB. The quick one, ``multipart`` on PyPI, refuses blanks after a boundary, and content with a line that
begins like a boundary; a part without a body it takes for one with the next part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

from kci_storage.errors import BadForm, UploadTooLarge

READ_SIZE = 256 * 1024  # bytes that are received at a time, at most
FORM_OVERHEAD = 1024 * 1024  # bytes by which a form may exceed the limit, which then holds for each file
MAX_PARTS = 10_000
MAX_HEAD = 32 * 1024  # bytes of a part's headers; a name of 1,024 characters has up to 12 KiB when percent-encoded
MAX_BOUNDARY = 200  # characters; 70 by RFC 2046, 5.1.1

# What may follow a boundary in its line (RFC 2046, 5.1.1): two hyphens after the last one, then blanks, which hardly
# any client sends. _UNFINISHED matches what may become that when more of the line has come.
_LINE_END = re.compile(rb"(--)?[ \t]{0,64}(\r?\n|\r?\Z)")
_UNFINISHED = re.compile(rb"(?:-|(?:--)?[ \t]{0,64}\r?)\Z")
_EMPTY_LINE = re.compile(rb"\r?\n(\r?\n)")
_CONTINUATION = re.compile(rb"\r?\n[ \t]+")  # of a header, in its next line (RFC 5322, 2.2.3)

PATH_FIELD = "path"
FILE_FIELD = re.compile(r"file[0-9]+")

# Header values are texts of Latin-1, that is, bytes. A value without quotes may contain blanks: some clients forget
# the quotes. The value ends where the next parameter begins or the header ends, else there is a quote within it.
# No part of the pattern gives back what it took, so that a match takes no more steps than the header is long.
_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = r'"((?:[^"\\]|\\.)*+)"'
_PARAMETER = re.compile(rf'[ \t]*+;[ \t]*+({_NAME})[ \t]*+=[ \t]*+(?:{_QUOTED}[ \t]*+|([^";]*+))(?=;|\Z)')
_SPARE_END = re.compile(r"[ \t;]*\Z")
# RFC 822 has the first two. Browsers write the others (HTML Standard, 4.10.21.8), and leave backslashes as they are.
_ESCAPED = re.compile(r'\\(["\\])|%(22|0D|0A)')
_PERCENT_ENCODED = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*")
_CONTINUED = re.compile(r"filename\*[0-9]")  # RFC 2231, 3
_ENCODED_WORD = re.compile(r"=\?[^?]+\?[BbQq]\?[^?]*\?=")  # RFC 2047, 2
_PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")  # of Content-Transfer-Encoding
_UTF8_CHARSETS = ("", "utf-8", "utf8", "us-ascii")


class Body(Protocol):
    """A request body that raises if it ends too early."""

    def readinto(self, buffer: memoryview) -> int:
        """Put the next bytes at the beginning of ``buffer``.

        :returns: how many bytes, at least one; 0: the body has ended.
        :raises ClientDisconnected: it ended too early.
        """


class Parameters(NamedTuple):
    """The parameters of a header's value, by their names in lower case."""

    values: dict[str, str]  # without quotes, but with escapes
    is_whole: bool  # whether all of the value could be read


class Part:
    """The head of a form's part.

    :param headers: one per line, continuation lines included (RFC 5322, 2.2.3).
    :raises BadForm: they are malformed, or the part's name cannot be read.
    """

    def __init__(self, headers: bytes):
        lines = _CONTINUATION.sub(b" ", headers).splitlines()
        self._headers = [_header(line) for line in lines if line]
        if not self._header("content-disposition"):
            raise BadForm("the form has a part without Content-Disposition")
        self._disposition = _parameters(self._header("content-disposition"))
        self.name = self._field_name()  # empty: it has none

    def _field_name(self) -> str:
        """The part's name.

        :raises BadForm: it cannot be read.
        """
        encoded = self._disposition.values.get("name", "")
        try:
            name = _decoded(encoded)
        except ValueError:
            raise BadForm("the form has a part whose name is not UTF-8") from None
        if not name and not self._disposition.is_whole:
            raise BadForm("the form has a part whose Content-Disposition cannot be read")
        return name

    @property
    def has_file_name(self) -> bool:
        """Whether the part is a file, whatever its name."""
        return any(name in self._disposition.values for name in ("filename", "filename*"))

    def file_name(self) -> str:
        """The file's name, whole. It may be empty, and may break the rules for keys.

        :raises BadForm: the part has no file name, or one that cannot be read.
        """
        parameters = self._disposition.values
        if not self._disposition.is_whole or any(_CONTINUED.match(name) for name in parameters):
            raise self._unreadable("escape quotes and backslashes")
        if not self.has_file_name:
            raise BadForm(f"{self.name} has no file name: send it as a file")
        try:
            extended = parameters.get("filename*")
            name = _decoded(parameters["filename"]) if extended is None else _extended(extended)
        except ValueError as exc:
            raise self._unreadable(str(exc)) from None
        if _ENCODED_WORD.search(name):
            raise self._unreadable("send it as UTF-8, without an encoding of e-mail")
        return name

    def _unreadable(self, reason: str) -> BadForm:
        return BadForm(f"the file name of {self.name} cannot be read: {reason}")

    def check_encoding(self) -> None:
        """Check that the content can be taken as it comes.

        :raises BadForm: it is encoded, or a form within the form.
        """
        if self._header("content-transfer-encoding").strip().lower() not in _PLAIN_ENCODINGS:
            raise BadForm(f"{self.name} has a Content-Transfer-Encoding: send it as it is")
        if self._header("content-type").partition(";")[0].strip().lower() == "multipart/mixed":
            raise BadForm(f"{self.name} has several files within: give each a part of its own, as file0, file1, …")

    @property
    def is_utf8(self) -> bool:
        """Whether the content, if it is a text, claims to be UTF-8, or claims nothing."""
        charset = _parameters(self._header("content-type")).values.get("charset", "")
        return charset.lower() in _UTF8_CHARSETS

    def _header(self, name: str) -> str:
        """The value of a header; empty: the part does not have it.

        :param name: in lower case.
        :raises BadForm: it has two of them.
        """
        values = [value for other, value in self._headers if other == name]
        if len(values) > 1:
            raise BadForm(f"the form has a part with two headers {name}")
        return values[0] if values else ""


# What a form consists of: the head of a part, then pieces of its content, then None at its end.
Event = Part | memoryview | None


def form_events(body: Body, boundary: bytes, max_bytes: int) -> Iterator[Event]:
    """The events of a multipart body, piece by piece. The body is read to its end.

    A piece of content is valid until the next event is taken.

    :param max_bytes: how large the body may be, plus :data:`FORM_OVERHEAD`.
    :raises BadForm: it is malformed, or ended before its closing boundary.
    :raises UploadTooLarge: it is too large.
    """
    return _Form(body, boundary, max_bytes).events()


class _Form:
    """A form that is being received.

    The buffer holds what has come and was not passed on: bytes ``start`` to ``stop``. The last of them may be the
    beginning of a boundary, so they wait for the next piece, which is received behind them.
    """

    def __init__(self, body: Body, boundary: bytes, max_bytes: int):
        self._body = body
        self._max_bytes = max_bytes
        self._received = 0  # bytes
        self._mark = b"--" + boundary
        self._delimiter = b"\n" + self._mark
        self._buffer = bytearray(MAX_HEAD + MAX_BOUNDARY + READ_SIZE)
        self._view = memoryview(self._buffer)
        self._buffer[0:1] = b"\n"  # as if an empty line preceded the first boundary
        self._start, self._stop = 0, 1
        self._skipped = 1  # bytes at the start that belong to a boundary, or to nothing
        self._is_last = False  # whether the last boundary closes the form

    def events(self) -> Iterator[Event]:
        """As :func:`form_events`."""
        for _ in self._content():  # bytes before the first boundary are ignored (RFC 2046, 5.1.1)
            pass
        if self._buffer.startswith(b"\r", self._start):  # as in all standards; some programs write LF alone
            self._delimiter = b"\r\n" + self._mark
        parts = 0
        while not self._is_last:
            if (parts := parts + 1) > MAX_PARTS:
                raise BadForm(f"the form has more than {MAX_PARTS:,} parts")
            yield Part(self._head())
            yield from self._content()
            yield None
        while self._fill():  # so are bytes after the last one
            self._start = self._stop

    def _head(self) -> bytes:
        """The headers of the next part, which begin with the end of the boundary's line."""
        while not (match := _EMPTY_LINE.search(self._buffer, self._start, self._end_of_head())):
            if self._stop - self._start >= MAX_HEAD:
                raise BadForm("the form has a part whose headers are too long")
            self._fill_or_fail()
        head = bytes(self._view[self._start : match.start()])
        self._start, self._skipped = match.start(1), len(match[1])
        return head

    def _end_of_head(self) -> int:
        return min(self._stop, self._start + MAX_HEAD)

    def _content(self) -> Iterator[memoryview]:
        """The content up to the next boundary, in pieces. The empty line before it may be that boundary's first."""
        while True:
            found = self._buffer.find(self._delimiter, self._start, self._stop)
            may_be_content = found if found >= 0 else self._stop - len(self._delimiter) + 1
            if piece := self._taken(may_be_content):
                yield piece
            if found < 0:
                self._fill_or_fail()
            elif self._passed_boundary():
                return
            elif piece := self._taken(self._start + len(self._delimiter)):  # a line that begins like a boundary
                yield piece

    def _taken(self, end: int) -> memoryview:
        """The bytes up to ``end``, which are content; none, if they have been taken already."""
        size = max(0, end - self._start)
        begin, self._start = self._start, self._start + size
        skipped = min(self._skipped, size)
        self._skipped -= skipped
        return self._view[begin + skipped : begin + size]

    def _passed_boundary(self) -> bool:
        """Pass by the boundary at the start, except for the end of its line; False: it is not one."""
        while self._line_is_unfinished() and self._fill():
            pass
        match = _LINE_END.match(self._buffer, self._start + len(self._delimiter), self._stop)
        if match is None:
            return False
        self._start, self._is_last = match.start(2), match[1] is not None
        return True

    def _line_is_unfinished(self) -> bool:
        return _UNFINISHED.match(self._buffer, self._start + len(self._delimiter), self._stop) is not None

    def _fill(self) -> bool:
        """Receive the next piece; False: there is none.

        :raises UploadTooLarge: the form is too large.
        """
        waiting = bytes(self._view[self._start : self._stop])
        self._view[: len(waiting)] = waiting
        size = self._body.readinto(self._view[len(waiting) : len(waiting) + READ_SIZE])
        self._start, self._stop = 0, len(waiting) + size
        self._received += size
        if self._received > self._max_bytes + FORM_OVERHEAD:
            raise too_large(self._max_bytes)
        return size > 0

    def _fill_or_fail(self) -> None:
        if not self._fill():
            raise BadForm("the form is malformed, or ended before its closing boundary")


def boundary_of(content_type: str) -> bytes:
    """The boundary of a form (RFC 2046, 5.1.1).

    :param content_type: the value of the request's ``Content-Type``.
    :raises BadForm: that is not the type of a form.

    >>> boundary_of("Multipart/Form-Data; Boundary=a:b"), boundary_of('multipart/form-data; boundary="a b"')
    (b'a:b', b'a b')
    """
    boundary = _parameters(content_type).values.get("boundary", "")
    is_form = content_type.partition(";")[0].strip().lower() == "multipart/form-data"
    if not is_form or not 0 < len(boundary) <= MAX_BOUNDARY or not boundary.isascii():
        raise BadForm("send a multipart/form-data body, with its boundary in Content-Type")
    return boundary.encode()


def too_large(max_bytes: int) -> UploadTooLarge:
    """The error for a body over the limit."""
    return UploadTooLarge(f"a file may have at most {max_bytes} bytes")


def _header(line: bytes) -> tuple[str, str]:
    """A header's name, in lower case, and its value, as a text of Latin-1.

    :raises BadForm: the line is none.
    """
    name, colon, value = line.partition(b":")
    if not colon:
        raise BadForm("the form has a part whose headers are malformed")
    return name.strip().lower().decode("latin-1"), value.strip().decode("latin-1")


def _parameters(value: str) -> Parameters:
    r"""The parameters of a header's value.

    A parameter that occurs twice cannot be read: another program might take the other one.

    >>> _parameters('form-data; name="file0"; filename=two words.txt')
    Parameters(values={'name': 'file0', 'filename': 'two words.txt'}, is_whole=True)
    >>> _parameters('form-data; name="file0"; filename="a"b"')
    Parameters(values={'name': 'file0'}, is_whole=False)
    """
    values: dict[str, str] = {}
    position = len(value.partition(";")[0])
    while match := _PARAMETER.match(value, position):
        name, quoted, plain = match.groups()
        if name.lower() in values:
            break
        values[name.lower()] = plain.rstrip(" \t") if quoted is None else quoted
        position = match.end()
    return Parameters(values, _SPARE_END.match(value, position) is not None)


def _decoded(value: str) -> str:
    r"""A parameter's text, without its escapes.

    :raises ValueError: it is not UTF-8.

    >>> _decoded(r"a\"b%22c\d")
    'a"b"c\\d'
    """
    if "\\" in value or "%" in value:
        value = _ESCAPED.sub(lambda match: match[1] or chr(int(match[2], 16)), value)
    return value if value.isascii() else _utf8(value.encode("latin-1"))


def _extended(value: str) -> str:
    """The text of a parameter that is percent-encoded (RFC 8187, 3.2).

    :raises ValueError: it is in another charset than UTF-8, or the encoding is wrong.

    >>> _extended("UTF-8''%C3%BC.txt")
    'ü.txt'
    """
    charset, _, rest = value.partition("'")
    _, apostrophe, encoded = rest.partition("'")
    if not apostrophe or charset.lower() != "utf-8" or not _PERCENT_ENCODED.fullmatch(encoded):
        raise ValueError("filename* starts with UTF-8'', and is percent-encoded")
    return _utf8(unquote_to_bytes(encoded.encode("latin-1")))


def _utf8(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
