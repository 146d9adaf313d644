# SPDX-License-Identifier: LGPL-2.1-or-later
"""Permissions: which keys a user may write and delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kci_storage.errors import Forbidden
from kci_storage.keys import Prefix

if TYPE_CHECKING:
    from kci_storage.config.settings import User


class Permissions:
    """Which keys each user may write and delete.

    :param users: the configuration's ``[[users]]``; entries of one name add up. Without any entry, every user may
        write every key.
    """

    def __init__(self, users: Sequence[User]):
        self._rules: dict[str, list[Prefix]] = {}
        for user in users:
            self._rules.setdefault(user.name, []).extend(map(Prefix.parse, user.prefixes))

    def check(self, email: str, key: str) -> None:
        """Check that the user may write the key.

        :raises Forbidden: the user may not.
        """
        if self._rules and not any(rule.covers(key) for rule in self._rules.get(email, ())):
            raise Forbidden("this token has no permission for this key", detail=f"{email!r} may not write {key!r}")

    def check_folder(self, email: str, folder: str) -> None:
        """Check that the user may write at least one key in the folder; empty: the root.

        :raises Forbidden: the user may write none.
        """
        if self._rules and not any(rule.reaches(folder) for rule in self._rules.get(email, ())):
            raise Forbidden("this token has no permission there", detail=f"{email!r} may not write into {folder!r}")
