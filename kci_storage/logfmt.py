# SPDX-License-Identifier: LGPL-2.1-or-later
"""logfmt: ``key=value`` pairs, one line per event, safe against whatever a client sends."""

from __future__ import annotations

import functools
import re
import select
import time

_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")  # what needs no quotes: printable ASCII without space, quote, = and backslash
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_PAIR = re.compile(r'([A-Za-z0-9_]+)=("(?:[^"\\]|\\.)*"|\S*)')  # of a line that this module has made
_CHARACTER = re.compile(r"\\u[0-9a-f]{4}|\\.|.")  # as it is written between quotes

LONGEST_VALUE = 2_048  # characters; what a client sends cannot fill the disk with one line
LONGEST_LINE = select.PIPE_BUF  # bytes, its end included: as many stay together in a pipe that several write to
LEAST_VALUE = 64  # bytes to which a value is cut at most, so that a line keeps something of all
CUT = "[cut]"  # where something was left out


def value(raw: object, longest: int = LONGEST_VALUE) -> str:
    r"""One logfmt value: quoted where it has to be, and always one line.

    :param longest: characters; of a longer one the end is cut off, which ``[cut]`` shows.

    >>> value("curl/8.5"), value('a "b"'), value("x\ny"), value(""), value("abcdefgh", 7)
    ('curl/8.5', '"a \\"b\\""', '"x\\ny"', '""', 'ab[cut]')
    """
    if type(raw) is int:
        return str(raw)
    text = str(raw)
    if len(text) > longest:
        text = text[: longest - len(CUT)] + CUT
    if _PLAIN.fullmatch(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{_CONTROL.sub(_escape, text)}"'


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match.group()):04x}"


def line(**fields: object) -> str:
    """A line of pairs; a field that is None is left out.

    >>> line(event="access", status=200, user=None)
    'event=access status=200'
    """
    return " ".join(f"{name}={value(raw)}" for name, raw in fields.items() if raw is not None)


def encoded(text: str) -> bytes:
    r"""A line as it is written: with its end, and not so long that a pipe could tear it.

    The longest values are cut first. Of a traceback the beginning is left out, of anything else the end.

    >>> data = encoded(f"a={'x' * 5000} b=end")
    >>> len(data), data[-13:]
    (4096, b'x[cut] b=end\n')
    """
    data = f"{text}\n".encode()
    return data if len(data) <= LONGEST_LINE else f"{_shortened(text, len(data) - LONGEST_LINE)}\n".encode()


def _shortened(text: str, excess: int) -> str:
    pairs = _PAIR.findall(text)
    by_length = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][1].encode()))
    for index in by_length:
        name, written = pairs[index]
        size = len(written.encode())
        if excess <= 0 or size <= LEAST_VALUE:
            break
        written = _cut(written, max(LEAST_VALUE, size - excess), from_front=name == "traceback")
        excess -= size - len(written.encode())
        pairs[index] = name, written
    return " ".join(f"{name}={written}" for name, written in pairs)


def _cut(written: str, size: int, from_front: bool) -> str:
    """A written value of at most so many bytes, which shows that it was cut."""
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
    """RFC 3339, UTC, to the millisecond.

    >>> timestamp(0.5)
    '1970-01-01T00:00:00.500Z'
    """
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@functools.lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
