# SPDX-License-Identifier: LGPL-2.1-or-later
"""Retention tags: which tags an object gets, and when it has expired by them. Pure.

An object gets its tags when it is uploaded, and keeps them: changed rules hold for later uploads only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kci_storage.config.ages import OWNER, days_of, is_age, tag_value
from kci_storage.keys import Prefix

if TYPE_CHECKING:
    from kci_storage.config.settings import RetentionConfig


SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class _Rule:
    prefix: Prefix
    value: str


class Retention:
    """Decides the tags of uploaded objects.

    :param config: the configuration's section ``[retention]``. Without a value and a rule, nothing is tagged.
    """

    def __init__(self, config: RetentionConfig):
        self._key = config.tag_key
        self._default = config.tag_value
        rules = [_Rule(Prefix.parse(rule.prefix), rule.value) for rule in config.rules]
        self._rules = sorted(rules, key=lambda rule: len(rule.prefix.start), reverse=True)

    def tags(self, email: str, key: str) -> Mapping[str, str]:
        """The tags of an object.

        :param email: the uploader's.
        """
        if not self._default and not self._rules:
            return {}
        value = self._value(key)
        return {OWNER: tag_value(email), **({self._key: value} if value else {})}

    def _value(self, key: str) -> str:
        """The age of the matching rule with the longest prefix, or the default; empty: the object never expires."""
        return next((rule.value for rule in self._rules if rule.prefix.covers(key)), self._default)


def is_expired(tags: Mapping[str, str], tag_key: str, last_modified: float, now: float) -> bool:
    """Whether an object is older than its tag allows. Without a tag, or with one that is no age, it never expires.

    :param last_modified: seconds since the epoch.
    :param now: seconds since the epoch.

    >>> is_expired({"retention": "1d"}, "retention", 0, 86_401), is_expired({}, "retention", 0, 1e12)
    (True, False)
    """
    age = tags.get(tag_key, "")
    return is_age(age) and now - last_modified > days_of(age) * SECONDS_PER_DAY


def lifecycle_policy(config: RetentionConfig, container: str) -> dict[str, Any]:
    """A lifecycle management policy by which Azure deletes expired objects: one rule for each age.

    :param container: the container of the objects.
    """
    values = {value for value in (config.tag_value, *(rule.value for rule in config.rules)) if value}
    return {"rules": [_lifecycle_rule(config.tag_key, value, container) for value in sorted(values, key=days_of)]}


def _lifecycle_rule(tag_key: str, value: str, container: str) -> dict[str, Any]:
    return {
        "enabled": True,
        "name": f"{container}-{value}",
        "type": "Lifecycle",
        "definition": {
            "filters": {
                "blobTypes": ["blockBlob"],
                "prefixMatch": [f"{container}/"],
                "blobIndexMatch": [{"name": tag_key, "op": "==", "value": value}],
            },
            "actions": {"baseBlob": {"delete": {"daysAfterModificationGreaterThan": days_of(value)}}},
        },
    }
