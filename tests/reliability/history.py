# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients did and saw, and whether one storage can have behaved so: linearizability, per key.

Every version is uploaded once, so a read says by itself which upload it saw. Gibbons and Korach ("Testing shared
memories", SIAM J. Comput. 26, 1997) call an upload and the reads of it a cluster. By the *end of its first* operation
to end, the version was there; at the *beginning of its last* one, it was still there or to come. Where the first of
these times comes before the second, the version was there all the time between them (a forward zone), so no other
version may have been there at any moment of that time: no other forward zone may overlap it, and no other version may
have come and gone within it.

A deletion, and the absence that a read saw, are not unique like that. They may not lie within a forward zone; and for
each absence there must be a deletion, or the beginning, after which no upload had certainly taken effect by then.

An operation that failed may have taken effect at any time after its beginning, or never. So whatever is reported is
wrong for certain; and a version that was served after another one had replaced it is reported, if both its upload and
its replacement were acknowledged, or were seen by a client.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import inf


class Kind(Enum):
    """What a client did."""

    UPLOAD = "upload"
    DELETE = "delete"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Operation:
    """One request, as its client knows it; times are seconds on one clock."""

    kind: Kind
    key: str
    begin: float
    end: float  # infinite: it failed, so that its effect may be still to come
    version: int | None = None  # what was uploaded or read; None: nothing is there

    def __str__(self) -> str:
        return f"{self.kind.value} {self.key} {self.version} [{self.begin:.4f}, {self.end:.4f}]"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A version's upload and the reads of it."""

    version: int
    upload: Operation
    there: float  # by then it has taken effect
    still: float  # then it had not been replaced yet, or not come yet

    @property
    def is_forward(self) -> bool:
        """Whether it certainly was there for a time, from ``there`` to ``still``."""
        return self.there < self.still

    def __str__(self) -> str:
        return f"version {self.version}, uploaded [{self.upload.begin:.4f}, {self.upload.end:.4f}]"


def violations(history: Iterable[Operation]) -> list[str]:
    """What no storage that does one thing after the other can have done, one line each.

    >>> upload = Operation(Kind.UPLOAD, "k", 0, 1, 1), Operation(Kind.UPLOAD, "k", 2, 3, 2)
    >>> violations([*upload, Operation(Kind.READ, "k", 2.5, 4, 1)])
    []
    >>> len(violations([*upload, Operation(Kind.READ, "k", 4, 5, 1)]))
    1
    """
    by_key = defaultdict(list)
    for operation in history:
        by_key[operation.key].append(operation)
    return [f"{key}: {problem}" for key, operations in by_key.items() for problem in _violations(operations)]


def _violations(operations: list[Operation]) -> Iterator[str]:
    uploads = {operation.version: operation for operation in operations if operation.kind is Kind.UPLOAD}
    reads = [operation for operation in operations if operation.kind is Kind.READ and operation.version is not None]
    for read in reads:
        if read.version not in uploads or uploads[read.version].begin > read.end:
            yield f"{read} of a version whose upload had not begun"
    clusters = [_cluster(upload, reads) for upload in uploads.values()]
    deletions = [operation for operation in operations if operation.kind is Kind.DELETE]
    absences = [operation for operation in operations if operation.kind is Kind.READ and operation.version is None]
    yield from _overlaps(clusters)
    yield from _interruptions(clusters, deletions + absences)
    yield from _unexplained(clusters, deletions, absences)


def _cluster(upload: Operation, reads: list[Operation]) -> Cluster:
    cluster = [upload, *(read for read in reads if read.version == upload.version)]
    assert upload.version is not None
    return Cluster(upload.version, upload, min(each.end for each in cluster), max(each.begin for each in cluster))


def _overlaps(clusters: list[Cluster]) -> Iterator[str]:
    """Two versions at a time, or one within the other's."""
    forward = sorted((cluster for cluster in clusters if cluster.is_forward), key=lambda cluster: cluster.there)
    for number, one in enumerate(forward):
        for other in forward[number + 1 :]:
            if other.there < one.still:
                yield f"{one} and {other} were both there at {other.there:.4f}, and again"
        for other in clusters:
            if not other.is_forward and one.there < other.still and other.there < one.still:
                yield f"{one} was there at {one.still:.4f}, although {other} replaced it meanwhile"


def _interruptions(clusters: list[Cluster], absences: list[Operation]) -> Iterator[str]:
    """Nothing was there, although a version was there before and after."""
    for cluster in clusters:
        for absence in absences:
            if cluster.is_forward and cluster.there < absence.begin and absence.end < cluster.still:
                yield f"{cluster} was there at {cluster.still:.4f}, in spite of {absence}"


def _unexplained(clusters: list[Cluster], deletions: list[Operation], absences: list[Operation]) -> Iterator[str]:
    """Nothing was there, although no deletion can be the cause."""
    beginning = Operation(Kind.DELETE, "", -inf, -inf)
    for absence in absences:
        causes = [cause for cause in (beginning, *deletions) if cause.begin < absence.end]
        if not any(_explains(cause, absence, clusters) for cause in causes):
            yield f"{absence}, although something was uploaded after the last deletion"


def _explains(cause: Operation, absence: Operation, clusters: list[Cluster]) -> bool:
    return not any(cause.end < cluster.upload.begin and cluster.there < absence.begin for cluster in clusters)
