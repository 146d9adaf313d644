# SPDX-License-Identifier: LGPL-2.1-or-later
"""Multipart forms (RFC 7578), decoded piece by piece as they arrive.

Werkzeug's decoder does the parsing. It copies each byte about four times, so it gets only the pieces that may contain
a boundary; all other pieces are content.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, MultipartDecoder, NeedData, State

from kci_storage.errors import BadForm, UploadTooLarge

READ_SIZE = 256 * 1024  # bytes that are received at a time, at most
FORM_MEMORY = 1024 * 1024  # bytes in the decoder at a time, at most: a part's head, and one read
FORM_OVERHEAD = 1024 * 1024  # bytes by which a form may exceed the limit, which then holds for each file
MAX_PARTS = 10_000
MAX_PADDING = 64  # blanks after a boundary, which RFC 2046, 5.1.1 allows, and hardly any client sends


class Body(Protocol):
    """A request body that raises if it ends too early."""

    def readinto(self, buffer: memoryview) -> int:
        """Put the next bytes at the beginning of ``buffer``.

        :returns: how many bytes, at least one; 0: the body has ended.
        :raises ClientDisconnected: it ended too early.
        """


def form_events(body: Body, boundary: bytes, max_bytes: int) -> Iterator[Event]:
    """The events of a multipart body, piece by piece. The body is read to its end.

    The bytes of a :class:`~werkzeug.sansio.multipart.Data` are valid until the next event is taken.

    :param max_bytes: how large the body may be, plus :data:`FORM_OVERHEAD`.
    :raises BadForm: it is malformed, or ended before its closing boundary.
    :raises UploadTooLarge: it is too large.
    """
    try:
        yield from _Form(body, boundary).events(max_bytes)
    except RequestEntityTooLarge:
        raise BadForm("the form has too many parts, or a part whose headers are too long") from None
    except UnicodeDecodeError:
        raise BadForm("the headers of a part, or a file name in them, are not UTF-8") from None
    except ValueError as exc:
        raise BadForm("the form is malformed, or ended before its closing boundary", detail=str(exc)) from exc


class _Form:
    """A form that is being received.

    The last bytes of a piece may be the beginning of a boundary, so they wait in the decoder for the next piece. The
    buffer has a margin in front of that piece. The waiting bytes are copied there, so that both are searched and
    passed on as one.
    """

    def __init__(self, body: Body, boundary: bytes):
        self._body = body
        self._boundary = boundary
        self._mark = b"--" + boundary
        self._margin = len(b"\r\n" + self._mark)  # bytes
        self._decoder = MultipartDecoder(boundary, max_form_memory_size=FORM_MEMORY, max_parts=MAX_PARTS)
        self._buffer = bytearray(self._margin + READ_SIZE)
        self._view = memoryview(self._buffer)

    def events(self, max_bytes: int) -> Iterator[Event]:
        """As :func:`form_events`, but with the decoder's own exceptions."""
        received = 0
        while size := self._body.readinto(self._view[self._margin :]):
            received += size
            if received > max_bytes + FORM_OVERHEAD:
                raise too_large(max_bytes)
            yield from self._take(size)
        self._decoder.receive_data(None)
        yield from _decoded(self._decoder)

    def _take(self, size: int) -> Iterator[Event]:
        """The events of the next piece, which is in the buffer behind the margin.

        :param size: of the piece, in bytes.
        """
        if self._decoder.state is State.EPILOGUE:  # bytes after the closing boundary are ignored (RFC 2046, 5.1.1)
            return
        if self._is_content(size):
            yield Data(self._content(size), more_data=True)  # type: ignore[arg-type]  # any buffer will do
            return
        self._decoder.receive_data(self._view[self._margin : self._margin + size])  # type: ignore[arg-type]  # the same
        if not _ends_in_boundary(self._decoder.buffer, self._boundary):
            yield from _decoded(self._decoder)

    def _is_content(self, size: int) -> bool:
        """Whether the waiting bytes and the piece contain no boundary."""
        waiting = self._decoder.buffer
        if self._decoder.state is not State.DATA or len(waiting) > self._margin or size < self._margin:
            return False
        start = self._margin - len(waiting)
        self._buffer[start : self._margin] = waiting
        return self._buffer.find(self._mark, start, self._margin + size) < 0

    def _content(self, size: int) -> memoryview:
        """The waiting bytes and the piece, except its last bytes, which wait from now on."""
        waiting = self._decoder.buffer
        start, stop = self._margin - len(waiting), size  # as many bytes as the margin holds remain
        waiting[:] = self._view[stop : stop + self._margin]
        return self._view[start:stop]


def _ends_in_boundary(buffer: bytearray, boundary: bytes) -> bool:
    r"""Whether the buffer ends between a boundary and the end of its line: then the decoder has to wait for more.

    Werkzeug (3.1) takes the line break before such a boundary for content, so that the file would get one byte more.

    >>> _ends_in_boundary(bytearray(b"content\r\n--b-"), b"b"), _ends_in_boundary(bytearray(b"content-"), b"b")
    (True, False)
    """
    tail = bytes(buffer[-len(boundary) - MAX_PADDING :])
    return tail.endswith((b"-", b" ", b"\t")) and tail.rstrip(b" \t").removesuffix(b"-").endswith(b"--" + boundary)


def _decoded(decoder: MultipartDecoder) -> Iterator[Event]:
    while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
        yield event


def too_large(max_bytes: int) -> UploadTooLarge:
    """The error for a body over the limit."""
    return UploadTooLarge(f"a file may have at most {max_bytes} bytes")
