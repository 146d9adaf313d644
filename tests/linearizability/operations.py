# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients did and saw: the operations of a history, and what each of them does to one key."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """An operation on one key."""

    PUT = "PUT"  # over whatever is there; also a file of a form or of an archive
    REPLACE = "PUT If-Match"
    CREATE = "PUT If-None-Match: *"
    DELETE = "DELETE"
    DELETE_IF = "DELETE If-Match"
    READ = "GET"  # also HEAD, and a part of the object
    LIST = "list"  # what a listing says of the key


WRITES = frozenset({Kind.PUT, Kind.REPLACE, Kind.CREATE, Kind.DELETE, Kind.DELETE_IF})
CONDITIONAL = frozenset({Kind.REPLACE, Kind.DELETE_IF})


class Outcome(enum.Enum):
    """What the client knows afterwards."""

    DONE = "done"
    FAILED = "failed"  # it did not happen, and will not
    UNMET = "412"  # another version is there than the condition asks for
    ABSENT = "404"  # nothing is there
    UNKNOWN = "unknown"  # it may take effect at any later time, or never
    STALE = "stale"  # a read whose answer says that it may be old


@dataclass(frozen=True, slots=True)
class Operation:
    """One request, as its client knows it. Times are seconds on the monotonic clock."""

    kind: Kind
    key: str
    begin: float
    end: float  # when the client gave up waiting, or had the answer
    outcome: Outcome
    content: int | None = None  # the number of what was written or read; None: nothing is there
    expected: int | None = None  # the content whose ETag is the condition
    how: str = ""  # the request in the client's words, its ETags and its status
    machine: int = 0  # which server answered
    etag: str = ""  # of what was written or read
    answered: bool = True  # whether the server answered; else it may still be about to begin
    number: int = -1  # of the operation in its history
    after: frozenset[int] = frozenset()  # the numbers of writes that have taken effect before this read

    @property
    def is_write(self) -> bool:
        """Whether it may change what is stored."""
        return self.kind in WRITES

    @property
    def is_pending(self) -> bool:
        """Whether it is a write that may take effect at any time after its beginning."""
        return self.is_write and self.outcome is Outcome.UNKNOWN

    def line(self, zero: float) -> str:
        """The operation in one line.

        :param zero: the beginning of the history.
        """
        expected = f" of {self.expected}" if self.kind in CONDITIONAL else ""
        what = "nothing" if self.content is None else str(self.content)
        result = f"{what if not self.kind.value.startswith('DELETE') else ''} {self.outcome.value}"
        times = f"{self.begin - zero:8.3f} {self.end - zero:8.3f}"
        return f"{times}  m{self.machine} {self.kind.value}{expected}: {result.strip()}  ({self.how})"
