# SPDX-License-Identifier: LGPL-2.1-or-later
"""Multipart forms (RFC 7578), piece by piece as they arrive.

Werkzeug's decoder says what a form consists of. It copies each byte some four times, so it is given only the pieces
in which there may be a boundary; the others are content as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, MultipartDecoder, NeedData, State

from kci_storage.errors import BadForm, UploadTooLarge

READ_SIZE = 256 * 1024  # bytes that are received at a time, at most
FORM_MEMORY = 1024 * 1024  # bytes of a form that may be undecided at once: a part's head, and one read
FORM_OVERHEAD = 1024 * 1024  # bytes that a form may have beyond the limit, which then holds for each file
MOST_PARTS = 10_000
LONGEST_PADDING = 64  # blanks after a boundary, which RFC 2046, 5.1.1 allows and nobody sends


class Body(Protocol):
    """A request body that never ends silently short."""

    def readinto(self, buffer: memoryview) -> int:
        """Put the next bytes at the beginning of ``buffer``.

        :returns: how many, at least one; 0: the body has ended.
        :raises ClientDisconnected: it ended too early.
        """


def form_events(body: Body, boundary: bytes, max_bytes: int) -> Iterator[Event]:
    """What a multipart body consists of, piece by piece, read to its very end.

    The bytes of a :class:`~werkzeug.sansio.multipart.Data` are good until the next event is asked for.

    :param max_bytes: how large it may be, but for :data:`FORM_OVERHEAD`.
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
    """A form on its way in.

    What may be the beginning of a boundary's line waits for the next piece in the decoder. The buffer has a margin in
    front of the pieces, where it is put before that one: so both are searched, and handed on, as one.
    """

    def __init__(self, body: Body, boundary: bytes):
        self._body = body
        self._boundary = boundary
        self._mark = b"--" + boundary
        self._margin = len(b"\r\n" + self._mark)  # bytes
        self._decoder = MultipartDecoder(boundary, max_form_memory_size=FORM_MEMORY, max_parts=MOST_PARTS)
        self._buffer = bytearray(self._margin + READ_SIZE)
        self._view = memoryview(self._buffer)

    def events(self, max_bytes: int) -> Iterator[Event]:
        """As of :func:`form_events`, with the decoder's own errors."""
        received = 0
        while size := self._body.readinto(self._view[self._margin :]):
            received += size
            if received > max_bytes + FORM_OVERHEAD:
                raise too_large(max_bytes)
            yield from self._take(size)
        self._decoder.receive_data(None)
        yield from _decoded(self._decoder)

    def _take(self, size: int) -> Iterator[Event]:
        """What the next piece brings: so many bytes, behind the margin."""
        if self._decoder.state is State.EPILOGUE:  # what comes after the closing boundary means nothing
            return
        if self._is_content(size):
            yield Data(self._content(size), more_data=True)  # type: ignore[arg-type]  # any buffer will do
            return
        self._decoder.receive_data(self._view[self._margin : self._margin + size])  # type: ignore[arg-type]  # the same
        if not _ends_in_boundary(self._decoder.buffer, self._boundary):
            yield from _decoded(self._decoder)

    def _is_content(self, size: int) -> bool:
        """Whether there is no boundary in the piece, together with what waits."""
        waiting = self._decoder.buffer
        if self._decoder.state is not State.DATA or len(waiting) > self._margin or size < self._margin:
            return False
        start = self._margin - len(waiting)
        self._buffer[start : self._margin] = waiting
        return self._buffer.find(self._mark, start, self._margin + size) < 0

    def _content(self, size: int) -> memoryview:
        """What waited and the piece, but for its end, which waits now."""
        waiting = self._decoder.buffer
        start, stop = self._margin - len(waiting), size  # as much as the margin holds is left
        waiting[:] = self._view[stop : stop + self._margin]
        return self._view[start:stop]


def _ends_in_boundary(buffer: bytearray, boundary: bytes) -> bool:
    r"""Whether what is here ends between a boundary and the end of its line: then the decoder has to wait for more.

    Werkzeug (3.1) takes the line break before such a boundary for content: the file got one byte more.

    >>> _ends_in_boundary(bytearray(b"content\r\n--b-"), b"b"), _ends_in_boundary(bytearray(b"content-"), b"b")
    (True, False)
    """
    tail = bytes(buffer[-len(boundary) - LONGEST_PADDING :])
    return tail.endswith((b"-", b" ", b"\t")) and tail.rstrip(b" \t").removesuffix(b"-").endswith(b"--" + boundary)


def _decoded(decoder: MultipartDecoder) -> Iterator[Event]:
    while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
        yield event


def too_large(max_bytes: int) -> UploadTooLarge:
    """The error for a body over the limit."""
    return UploadTooLarge(f"a file may have at most {max_bytes} bytes")
