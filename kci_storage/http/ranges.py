# SPDX-License-Identifier: LGPL-2.1-or-later
"""Byte ranges (RFC 9110, section 14): which parts of a file a ``Range`` asks for, and how several are sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_RANGES = 64  # of one request
_MAX_DIGITS = 18  # of an offset; what is longer is beyond any file
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
    """The satisfiable ranges, in the order asked for, clamped to the size."""
    unit, _, specs = value.partition("=")
    members = [member for text in specs.split(",") if (member := text.strip(" \t"))]
    if unit.lower() != "bytes" or not 0 < len(members) <= MAX_RANGES:
        raise MalformedRange
    ranges = [_parse_range(member, size) for member in members]
    return [part for part in ranges if part.length > 0]


def _parse_range(spec: str, size: int) -> ByteRange:
    """One range, clamped; empty when it is unsatisfiable."""
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
    """A number of bytes; it never reaches the length that ``int`` refuses or takes long for."""
    if not digits:
        return None
    significant = digits.lstrip("0")
    return int(significant or "0") if len(significant) <= _MAX_DIGITS else _BEYOND_ANY_FILE


def coalesce(ranges: list[ByteRange]) -> tuple[ByteRange, ...]:
    """Join those that overlap or touch; else the order asked for is kept (RFC 9110 section 15.3.7.2)."""
    joined: list[tuple[int, ByteRange]] = []
    for place, part in sorted(enumerate(ranges), key=lambda item: item[1].start):
        if joined and part.start <= joined[-1][1].stop:
            first, before = joined.pop()
            place, part = min(place, first), ByteRange(before.start, max(before.stop, part.stop))
        joined.append((place, part))
    return tuple(part for _, part in sorted(joined, key=lambda item: item[0]))


@dataclass(frozen=True, slots=True)
class MultipartRanges:
    """A ``multipart/byteranges`` body (RFC 9110 section 14.6), described without its content.

    :param ranges: the parts; two or more, as one range alone is no multipart body.
    :param size: of the whole object, in bytes.
    :param part_type: the object's content type, which each part repeats.
    :param boundary: of 1 to 70 letters and digits that are not in the content: random ones.
    """

    ranges: tuple[ByteRange, ...]
    size: int
    part_type: str
    boundary: str

    @property
    def content_type(self) -> str:
        """That of the response."""
        return f"multipart/byteranges; boundary={self.boundary}"

    @property
    def content_length(self) -> int:
        """That of the response, in bytes."""
        return sum(len(part) if isinstance(part, bytes) else part.length for part in self.segments)

    @property
    def segments(self) -> tuple[bytes | ByteRange, ...]:
        r"""What to send, in order: literal bytes, and ranges of the content.

        >>> MultipartRanges((ByteRange(0, 1), ByteRange(8, 9)), 9, "text/plain", "b").segments[0]
        b'--b\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-0/9\r\n\r\n'
        """
        return tuple(self._segments())

    def _segments(self) -> Iterator[bytes | ByteRange]:
        before = ""
        for part in self.ranges:
            yield self._literal(f"{before}--{self.boundary}\r\n{self._part_head(part)}\r\n")
            yield part
            before = "\r\n"
        yield self._literal(f"\r\n--{self.boundary}--\r\n")

    def _part_head(self, part: ByteRange) -> str:
        return f"Content-Type: {self.part_type}\r\nContent-Range: {part.content_range(self.size)}\r\n"

    @staticmethod
    def _literal(text: str) -> bytes:
        return text.encode("latin-1", "replace")
