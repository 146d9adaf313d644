# SPDX-License-Identifier: LGPL-2.1-or-later
"""How old a read may be that one machine answers while others write.

A copy is served without a question for ``revalidate_after`` seconds. So a read on one machine tells what was stored
at some time in the last so many seconds, plus the time that fetching or storing the copy took. But what this machine
itself has acknowledged before had taken effect by then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tests.linearizability.operations import Kind, Operation, Outcome

MARGIN = 0.1  # seconds: a fetch may begin before the request that is written down, and end after it


def widened(operations: Iterable[Operation], revalidate_after: float) -> list[Operation]:
    """The operations, in which a read begins as early as what it tells may be from.

    :param revalidate_after: seconds; 0: there is one machine, whose reads are never old.
    """
    operations = list(operations)
    if not revalidate_after:
        return operations
    groups = defaultdict(list)
    for each in operations:
        groups[each.key, each.machine].append(each)
    return [_widened(each, groups[each.key, each.machine], revalidate_after) for each in operations]


def _widened(operation: Operation, same: list[Operation], revalidate_after: float) -> Operation:
    if operation.kind is not Kind.READ:
        return operation
    oldest = operation.begin - revalidate_after - MARGIN
    took = max((each.end - each.begin for each in _that_may_have_brought_it(operation, same, oldest)), default=0.0)
    return replace(operation, begin=oldest - took, after=frozenset(_acknowledged_before(operation, same)))


def _that_may_have_brought_it(read: Operation, same: list[Operation], oldest: float) -> Iterator[Operation]:
    return (each for each in same if each.kind is not Kind.LIST and each.begin < read.begin and each.end >= oldest)


def _acknowledged_before(read: Operation, same: list[Operation]) -> Iterator[int]:
    writes = (each for each in same if each.is_write and each.outcome is Outcome.DONE)
    return (each.number for each in writes if each.end < read.begin)
