# SPDX-License-Identifier: LGPL-2.1-or-later
"""The doubt about a key: its changes whose answer was lost, and until when each may still be carried out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

ABSENT = ""  # names no version: the change requires that there is no object
ANY = "*"  # it is unknown which version the change names, or whether any
LANDING_SECONDS = 300  # after a writer's death, in which its last request may still be carried out by the backend
MAX_SECONDS = 24 * 3600  # a time that lies further ahead was written while the clock was wrong


@dataclass(frozen=True)
class Doubt:
    """The lost changes of a key.

    :param lands_until: by the ETag of the version that the change replaces, :data:`ABSENT` or :data:`ANY`: until when
        it may be carried out, in seconds since the epoch.

    >>> doubt = Doubt({"v1": 100.0})
    >>> doubt.concerns("v1", 99.0), doubt.concerns("v1", 101.0), doubt.concerns("v2", 99.0)
    (True, False, False)
    """

    lands_until: Mapping[str, float] = field(default_factory=dict)

    def concerns(self, present: str | None, now: float) -> bool:
        """Whether a lost change may still be carried out, given what the backend has now.

        :param present: the ETag of the stored version; None: there is no object.
        :param now: in seconds since the epoch.
        """
        named = ABSENT if present is None else present
        return any(self._ends(name, now) > now for name in (named, ANY))

    def is_over(self, now: float) -> bool:
        """Whether none can be carried out any more, whatever the backend has."""
        return all(self._ends(name, now) <= now for name in self.lands_until)

    def _ends(self, name: str, now: float) -> float:
        until = self.lands_until.get(name, 0.0)
        return until if until - now < MAX_SECONDS else 0.0

    def with_change(self, named: str, until: float) -> Doubt:
        """The doubt with one more lost change."""
        return Doubt({**self.lands_until, named: max(until, self.lands_until.get(named, 0.0))})

    def of_creations(self) -> Doubt:
        """What is left of it once the versions that the changes name are gone: no ETag is given twice.

        Only a change that requires that there is no object may be carried out again, after a deletion.
        """
        until = max(self.lands_until.get(ABSENT, 0.0), self.lands_until.get(ANY, 0.0))
        return Doubt({ABSENT: until} if until else {})

    def to_json(self) -> bytes:
        """The content of the doubt's file."""
        return json.dumps({"lands_until": self.lands_until}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Doubt:
        """Parse the content of a doubt's file.

        :raises ValueError: it is none.
        """
        try:
            return cls({str(name): float(until) for name, until in json.loads(data)["lands_until"].items()})
        except (TypeError, KeyError, AttributeError) as exc:
            raise ValueError(f"not a doubt: {exc}") from exc
