# SPDX-License-Identifier: LGPL-2.1-or-later
"""logfmt: ``key=value`` pairs, one line per event, safe against any value that a client sends."""

from __future__ import annotations

import functools
import re
import select
import time

_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # what needs no quotes: printable ASCII without space, quote, = and backslash
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PAIR = re.compile(r'([A-Za-z0-9_]+)=("(?:[^"\\]|\\.)*"|\S*)')  # in a line that this module has written
_CHARACTER = re.compile(r"\\u[0-9a-f]{4}|\\.|.")  # one character as written between quotes

MAX_VALUE_LENGTH = 2_048  # characters, so that no client can fill the disk with one line
MAX_LINE_SIZE = select.PIPE_BUF  # bytes, the newline included: such a write to a pipe is atomic (POSIX, write)
MIN_CUT_SIZE = 64  # bytes; a shorter value is not cut, so that something of each value is left
CUT = "[cut]"  # in place of what was cut


def value(raw: object, max_length: int = MAX_VALUE_LENGTH) -> str:
    r"""One logfmt value: quoted if need be, and always on one line.

    :param max_length: characters; the end of a longer value is cut, which ``[cut]`` shows.

    >>> value("curl/8.5"), value('a "b"'), value("x\ny"), value(""), value("abcdefgh", 7)
    ('curl/8.5', '"a \\"b\\""', '"x\\ny"', '""', 'ab[cut]')
    """
    if type(raw) is int:
        return str(raw)
    text = str(raw)
    if len(text) > max_length:
        text = text[: max_length - len(CUT)] + CUT
    if _PLAIN.fullmatch(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{_CONTROL.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def line(**fields: object) -> str:
    """A line of ``key=value`` pairs; a field that is None is omitted.

    >>> line(event="access", status=200, user=None)
    'event=access status=200'
    """
    return " ".join(f"{name}={value(raw)}" for name, raw in fields.items() if raw is not None)


def encoded(text: str) -> bytes:
    r"""A line as bytes, with its newline, shortened so that several processes can write to one pipe.

    The longest values are cut first: a traceback at its beginning, any other value at its end.

    >>> data = encoded(f"a={'x' * 5000} b=end")
    >>> len(data), data[-13:]
    (4096, b'x[cut] b=end\n')
    """
    data = f"{text}\n".encode()
    return data if len(data) <= MAX_LINE_SIZE else f"{_shortened(text, len(data) - MAX_LINE_SIZE)}\n".encode()


def _shortened(text: str, excess: int) -> str:
    pairs = _PAIR.findall(text)
    by_length = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][1].encode()))
    for index in by_length:
        name, written = pairs[index]
        size = len(written.encode())
        if excess <= 0 or size <= MIN_CUT_SIZE:
            break
        written = _cut(written, max(MIN_CUT_SIZE, size - excess), from_front=name == "traceback")
        excess -= size - len(written.encode())
        pairs[index] = name, written
    return " ".join(f"{name}={written}" for name, written in pairs)


def _cut(written: str, size: int, from_front: bool) -> str:
    """Cut a written value to at most ``size`` bytes, :data:`CUT` included."""
    quote = '"' if written.startswith('"') else ""
    characters = _CHARACTER.findall(written[1:-1] if quote else written)
    kept, left = [], size - 2 * len(quote) - len(CUT)
    for character in reversed(characters) if from_front else characters:
        left -= len(character.encode())
        if left < 0:
            break
        kept.append(character)
    text = CUT + "".join(reversed(kept)) if from_front else "".join(kept) + CUT
    return f"{quote}{text}{quote}"


def timestamp(seconds: float) -> str:
    """A time as in RFC 3339, in UTC, to the millisecond.

    :param seconds: since the epoch.

    >>> timestamp(0.5)
    '1970-01-01T00:00:00.500Z'
    """
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
