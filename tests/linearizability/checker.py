# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether one store that does one thing after the other can have behaved as the clients saw it: linearizability.

The search is that of Wing and Gong ("Testing and verifying concurrent objects", J. Parallel Distrib. Comput. 17,
1993) with the memory of Lowe ("Testing for linearizability", Concurrency Computat.: Pract. Exper. 29, 2017). It walks
over the beginnings and ends of the operations in the order of time, with all *configurations* that are possible so
far: what is stored, and which of the running operations have taken effect. At an operation's end it must have taken
effect; others take effect before it only where that helps. A history is right if a configuration is left at its end.

Linearizability is local: each key is examined by itself (Herlihy and Wing, 1990).

What is assumed beyond the usual:

- A write of unknown outcome may take effect at any later time, or never. But once the server has answered it (with
  5xx), it does not replace a content whose write began after that answer and was acknowledged.
- An ETag belongs to one content, but a content may get another ETag after a write whose outcome was unknown, or when
  a process was killed that may have been writing. So a 412 for an ETag must be right only if neither came before it.
- An answer that says that it is stale need only be something that was written before.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from tests.linearizability.operations import Kind, Operation, Outcome

UNSEEN = -1  # in place of contents that nobody read: which of them is stored makes no difference
SHOWN = 14  # operations before the one that cannot be explained


class Configuration(NamedTuple):
    """A possible state of affairs."""

    stored: int | None  # the content; None: nothing
    done: frozenset[int]  # the running operations that have taken effect, by their index


@dataclass(frozen=True)
class Violation:
    """An operation of a key that cannot be explained."""

    key: str
    operation: Operation
    reason: str
    context: tuple[Operation, ...] = ()  # the key's operations, in order
    stored: frozenset[int | None] = frozenset()  # what may have been there before

    def text(self, zero: float) -> str:
        """The key's operations up to this one, and what is wrong with it."""
        lines = last_lines(self.context, zero, self.operation, self.stored)
        return "\n".join([f"{self.key}: {self.reason}", *lines])


def last_lines(
    operations: Iterable[Operation],
    zero: float,
    wrong: Operation | None = None,
    stored: Iterable[int | None] = (),
) -> list[str]:
    """The last operations, and the earlier writes that may explain them, as lines.

    :param wrong: these are the last ones that began before its end.
    :param stored: contents whose writes are shown as well.
    """
    before = sorted(
        (each for each in operations if wrong is None or each.begin <= wrong.end), key=lambda each: each.begin
    )
    recent = before[-SHOWN:]
    contents = {each.content for each in recent} | {each.expected for each in recent} | set(stored)
    earlier = [each for each in before[:-SHOWN] if each is wrong or _writes_one_of(each, contents)]
    return [f"  {'!!' if each is wrong else '  '} {each.line(zero)}" for each in earlier[-SHOWN:] + recent]


def _writes_one_of(operation: Operation, contents: set[int | None]) -> bool:
    """Whether it wrote one of these contents, or is a deletion that may still take effect."""
    return operation.is_write and (operation.content in contents if operation.content else operation.is_pending)


def violations(history: Iterable[Operation], killed: float = inf) -> list[Violation]:
    """What is wrong with a history: at most one thing of each key that cannot be explained, and each wrong ETag.

    :param killed: when the first process was killed.
    """
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    return [wrong for operations in by_key.values() for wrong in _violations(operations, killed)]


def _violations(operations: list[Operation], killed: float) -> Iterator[Violation]:
    yield from _wrong_etags(operations)
    yield from _wrong_stale(operations)
    # While a write is running, a hit may be the old version and a listing the new one.
    for left_out in (Kind.LIST, Kind.READ):
        found = first_violation([each for each in operations if each.kind is not left_out], killed)
        if found is not None:
            yield replace(found, context=tuple(operations))
            return


def _wrong_etags(operations: list[Operation]) -> Iterator[Violation]:
    """An ETag of two contents."""
    known: dict[str, int | None] = {}
    for each in operations:
        if each.etag and known.setdefault(each.etag, each.content) != each.content:
            yield Violation(each.key, each, f"ETag {each.etag} was that of {known[each.etag]}", tuple(operations))


def _wrong_stale(operations: list[Operation]) -> Iterator[Violation]:
    """A stale answer with something that was never written."""
    for each in operations:
        if each.outcome is Outcome.STALE and each.content is not None and not _was_written(each, operations):
            yield Violation(each.key, each, "stale, but never written", tuple(operations))


def _was_written(read: Operation, operations: list[Operation]) -> bool:
    writes = (each for each in operations if each.is_write and each.outcome in (Outcome.DONE, Outcome.UNKNOWN))
    return any(each.content == read.content and each.begin < read.end for each in writes)


# One key


def first_violation(operations: Sequence[Operation], killed: float = inf) -> Violation | None:
    """The first operation of a key that cannot be explained; None: all can."""
    return _Search(_checked(operations, killed)).run()


class _Configurations:
    """Configurations that were found, but for those that can do no more than another one.

    That is one that has used more of the pending writes, and has explained fewer of the reads.
    """

    def __init__(self, pending: frozenset[int], reads: frozenset[int]):
        self._pending = pending
        self._reads = reads
        self._found: dict[object, list[tuple[frozenset[int], frozenset[int]]]] = defaultdict(list)

    def add(self, configuration: Configuration) -> bool:
        """Whether it is a new one that is worth a try."""
        pending, reads = configuration.done & self._pending, configuration.done & self._reads
        found = self._found[configuration.stored, configuration.done - self._pending - self._reads]
        if any(used <= pending and explained >= reads for used, explained in found):
            return False
        found.append((pending, reads))
        return True


class _Search:
    """The search through one key's operations, of those that have to be explained."""

    def __init__(self, operations: Sequence[Operation]):
        self._operations = operations
        self._all = _canonical(self._operations)
        self._writers = {each.content: each for each in self._all if each.is_write and each.content is not None}
        indices = range(len(self._all))
        self._pending = frozenset(index for index in indices if self._all[index].is_pending)
        self._reads = frozenset(index for index in indices if not _changes(self._all[index]))
        self._by_number = {self._all[index].number: index for index in indices}
        self._open: set[int] = set()  # the running operations
        self._over: set[int] = set()  # those that have ended

    def run(self) -> Violation | None:
        possible = [Configuration(None, frozenset())]
        for _, is_end, index in self._events():
            if not is_end:
                self._open.add(index)
                continue
            before, possible = possible, self._ended(possible, index)
            if not possible:
                return self._violation(index, before)
            self._open.discard(index)
            self._over.add(index)
            possible = self._without(possible, index)
        return None

    def _without(self, possible: Iterable[Configuration], index: int) -> list[Configuration]:
        """The configurations after an operation's end: that it has taken effect goes without saying."""
        after = self._no_configurations()
        return [each for before in possible if after.add(each := before._replace(done=before.done - {index}))]

    def _events(self) -> list[tuple[float, bool, int]]:
        """The beginnings and ends in order, at one moment the beginnings first. A pending write has no end."""
        begins = [(each.begin, False, index) for index, each in enumerate(self._all)]
        ends = [(each.end, True, index) for index, each in enumerate(self._all) if not each.is_pending]
        return sorted(begins + ends)

    def _ended(self, possible: Iterable[Configuration], index: int) -> list[Configuration]:
        """The configurations in which an operation, which ends now, has taken effect."""
        ended, seen, todo = [], self._no_configurations(), deque(possible)
        while todo:  # those with fewer writes come first, so that they keep out those with more
            configuration = self._with_reads(todo.popleft())
            if not seen.add(configuration):
                continue
            if index in configuration.done:
                ended.append(configuration)
            else:
                todo.extend(self._successors(configuration))
        return ended

    def _with_reads(self, configuration: Configuration) -> Configuration:
        """The configuration after the running operations that hold now and change nothing: that loses nothing."""
        stored, done = configuration
        hold = [index for index in self._open & self._reads - done if self._may_hold(index, configuration)]
        return Configuration(stored, done.union(hold))

    def _may_hold(self, index: int, configuration: Configuration) -> bool:
        read = self._all[index]
        before = (self._by_number[number] for number in read.after)
        return all(each in self._over or each in configuration.done for each in before) and self._holds(
            read, configuration.stored
        )

    def _successors(self, configuration: Configuration) -> Iterator[Configuration]:
        """What one more write makes of it. Of pending ones that do the same, the first to be too late is enough."""
        stored, done = configuration
        tried = set()
        for index in sorted(self._open - self._reads - done, key=self._deadline):
            write = self._all[index]
            effect = write.kind, write.content, write.expected
            if write.is_pending and (effect in tried or write.content == stored):
                continue
            if self._holds(write, stored) and not self._is_too_late(index, stored):
                yield Configuration(write.content, done | {index})
                if write.is_pending:
                    tried.add(effect)

    def _deadline(self, index: int) -> float:
        """A write whose outcome is unknown does not replace an acknowledged one that began after this time."""
        write = self._all[index]
        return write.end if write.is_pending and write.answered else inf

    @staticmethod
    def _holds(operation: Operation, stored: int | None) -> bool:
        """Whether an operation can have its outcome while this is stored."""
        if operation.outcome is Outcome.ABSENT:
            return stored is None
        if operation.outcome is Outcome.UNMET:
            return stored is not None if operation.kind is Kind.CREATE else stored != operation.expected
        return _NEEDS[operation.kind](operation, stored)

    def _is_too_late(self, write: int, stored: int | None) -> bool:
        """Whether a write whose outcome is unknown would replace a later one that was acknowledged."""
        present = self._writers.get(stored) if stored is not None else None
        return present is not None and present.outcome is Outcome.DONE and present.begin > self._deadline(write)

    def _no_configurations(self) -> _Configurations:
        return _Configurations(self._pending, self._reads)

    def _violation(self, index: int, before: Iterable[Configuration]) -> Violation:
        wrong, stored = self._operations[index], frozenset(each.stored for each in before)
        reason = f"cannot be explained; before it, {' or '.join(sorted(map(_name, stored)))} was stored"
        return Violation(wrong.key, wrong, reason, stored=stored)


def _name(stored: int | None) -> str:
    return {None: "nothing", UNSEEN: "something that nobody read"}.get(stored, str(stored))


def _changes(operation: Operation) -> bool:
    return operation.is_write and operation.outcome in (Outcome.DONE, Outcome.UNKNOWN)


def _checked(operations: Sequence[Operation], killed: float) -> list[Operation]:
    """The operations that have to be explained."""
    first = min((each.begin for each in operations if each.is_pending), default=inf)
    return [each for each in operations if _counts(each, min(first, killed))]


def _counts(operation: Operation, etags_end: float) -> bool:
    """Whether an operation has to be explained; 412 for an ETag only if it came before contents may get others."""
    if operation.outcome is Outcome.UNMET:
        return operation.kind is Kind.CREATE or operation.end < etags_end
    if operation.outcome is Outcome.UNKNOWN:
        return operation.is_write
    return operation.outcome in (Outcome.DONE, Outcome.ABSENT)


def _canonical(operations: Sequence[Operation]) -> list[Operation]:
    """The operations with one content in place of all that were written with unknown outcome and never seen."""
    seen = {each.content for each in operations if not each.is_write} | {each.expected for each in operations}
    return [
        replace(each, content=UNSEEN) if each.is_pending and each.content not in seen | {None} else each
        for each in operations
    ]


_NEEDS: dict[Kind, Callable[[Operation, int | None], bool]] = {
    Kind.PUT: lambda operation, stored: True,
    Kind.CREATE: lambda operation, stored: stored is None,
    Kind.REPLACE: lambda operation, stored: stored == operation.expected,
    Kind.DELETE: lambda operation, stored: stored is not None,
    Kind.DELETE_IF: lambda operation, stored: stored == operation.expected,
    Kind.READ: lambda operation, stored: stored == operation.content,
    Kind.LIST: lambda operation, stored: stored == operation.content,
}
