# SPDX-License-Identifier: LGPL-2.1-or-later
"""Byte ranges (RFC 9110, section 14): parsing ``Range``, and the layout of a ``multipart/byteranges`` body."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_RANGES = 64  # of one request
_MAX_DIGITS = 18  # of an offset; a longer one is beyond the end of any file
_BEYOND_ANY_FILE = 10**_MAX_DIGITS


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    def content_range(self, size: int) -> str:
        """The value of ``Content-Range``, whose last position is inclusive (RFC 9110 section 14.4).

        :param size: of the whole object, in bytes.

        >>> ByteRange(0, 10).content_range(100)
        'bytes 0-9/100'
        """
        return f"bytes {self.start}-{self.stop - 1}/{size}"


_RANGE_SPEC = re.compile(r"([0-9]*)-([0-9]*)\Z")


class MalformedRange(Exception):
    """A Range header that is to be ignored as a whole."""


def parse_ranges(value: str, size: int) -> list[ByteRange]:
    """The satisfiable ranges, in the requested order, clamped to the size.

    :param value: the value of ``Range``.
    :param size: of the object, in bytes.
    :raises MalformedRange: the header is to be ignored.
    """
    unit, _, specs = value.partition("=")
    members = [member for text in specs.split(",") if (member := text.strip(" \t"))]
    if unit.lower() != "bytes" or not 0 < len(members) <= MAX_RANGES:
        raise MalformedRange
    ranges = [_parse_range(member, size) for member in members]
    return [part for part in ranges if part.length > 0]


def _parse_range(spec: str, size: int) -> ByteRange:
    """One range, clamped to the size; empty if it is unsatisfiable."""
    match = _RANGE_SPEC.match(spec)
    if match is None or spec == "-":
        raise MalformedRange
    first, last = (_offset(digits) for digits in match.groups())
    if first is None:
        return ByteRange(max(0, size - (last or 0)), size)
    if last is None:
        return ByteRange(min(first, size), size)
    if last < first:
        raise MalformedRange
    return ByteRange(min(first, size), min(last + 1, size))


def _offset(digits: str) -> int | None:
    """An offset in bytes. Long ones are clamped, since ``int`` is slow for thousands of digits, or refuses them."""
    if not digits:
        return None
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _MAX_DIGITS else _BEYOND_ANY_FILE


def coalesce(ranges: list[ByteRange]) -> tuple[ByteRange, ...]:
    """Join ranges that overlap or touch; otherwise keep the requested order (RFC 9110 section 15.3.7.2)."""
    joined: list[tuple[int, ByteRange]] = []
    for index, part in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if joined and part.start <= joined[-1][1].stop:
            first, before = joined.pop()
            index, part = min(index, first), ByteRange(before.start, max(before.stop, part.stop))
        joined.append((index, part))
    return tuple(part for _, part in sorted(joined, key=lambda item: item[0]))


@dataclass(frozen=True, slots=True)
class MultipartRanges:
    """The layout of a ``multipart/byteranges`` body (RFC 9110 section 14.6), without its content.

    :param ranges: the parts; two or more, since a single range is not sent as multipart.
    :param size: of the whole object, in bytes.
    :param part_type: the object's content type, which each part repeats.
    :param boundary: 1 to 70 random letters and digits, which the content must not contain.
    """

    ranges: tuple[ByteRange, ...]
    size: int
    part_type: str
    boundary: str

    @property
    def content_type(self) -> str:
        """The response's ``Content-Type``."""
        return f"multipart/byteranges; boundary={self.boundary}"

    @property
    def content_length(self) -> int:
        """The response's ``Content-Length``, in bytes."""
        return sum(len(part) if isinstance(part, bytes) else part.length for part in self.segments)

    @property
    def segments(self) -> tuple[bytes | ByteRange, ...]:
        r"""The pieces to send, in order: literal bytes, and ranges of the content.

        >>> MultipartRanges((ByteRange(0, 1), ByteRange(8, 9)), 9, "text/plain", "b").segments[0]
        b'\r\n--b\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-0/9\r\n\r\n'
        """
        return tuple(self._segments())

    def _segments(self) -> Iterator[bytes | ByteRange]:
        # The first boundary has a line break before it, too: it is allowed (RFC 2046, 5.1.1), nginx and Apache send
        # it, and zsync does not end without.
        for part in self.ranges:
            yield self._literal(f"\r\n--{self.boundary}\r\n{self._part_head(part)}\r\n")
            yield part
        yield self._literal(f"\r\n--{self.boundary}--\r\n")

    def _part_head(self, part: ByteRange) -> str:
        return f"Content-Type: {self.part_type}\r\nContent-Range: {part.content_range(self.size)}\r\n"

    @staticmethod
    def _literal(text: str) -> bytes:
        return text.encode("latin-1", "replace")
