# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which user agents are not served: crawlers that one knows by the names that they give themselves.

The names come from the package crawler-user-agents, a public list that its maintainers renew about weekly; it is the
only thing here that has to be kept up to date. Of its kinds those are taken that read a site for somebody else's
purpose. Programs with which people download (curl, wget, libraries), monitoring and link previews stay.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

ALWAYS = frozenset({"ai-crawler", "search-engine"})  # the list's kinds of which all are refused
BY_NAME = "seo"  # the kind that holds much else beside, of which those are refused whose name says what they are
ROBOT = re.compile(r"bot\b|bot[^a-z]|crawl|spider|scrap|seo", re.IGNORECASE)
WELCOME = re.compile(r"google|bingbot|bingpreview|msnbot|adidxbot", re.IGNORECASE)  # Google's and Bing's own

REMEMBERED = 4096  # user agents for which the answer is remembered
LONGEST_REMEMBERED = 512  # characters; so that strangers cannot fill the memory


class UserAgents:
    """The user agents that are refused.

    :param ban: texts; a user agent that holds one, in whatever case, is refused.
    :param defaults: whether crawlers of the public list are refused, too.

    >>> agents = UserAgents(["NastyBot"], defaults=False)
    >>> agents.find("Mozilla/5.0 (compatible; nastybot/2.1)"), agents.find("curl/8.14.1")
    ('nastybot', None)
    """

    def __init__(self, ban: Iterable[str], defaults: bool):
        patterns = [re.escape(text) for text in ban]
        if defaults:
            patterns.append(rf"\b(?:{'|'.join(known())})")
        self._pattern = re.compile("|".join(patterns), re.IGNORECASE) if patterns else None
        self._find_remembered = functools.lru_cache(REMEMBERED)(self._search)

    def find(self, user_agent: str) -> str | None:
        """What in a user agent is refused; None: nothing."""
        if self._pattern is None or not user_agent:
            return None
        return (self._find_remembered if len(user_agent) <= LONGEST_REMEMBERED else self._search)(user_agent)

    def _search(self, user_agent: str) -> str | None:
        assert self._pattern is not None
        match = self._pattern.search(_text(user_agent))
        return match[0] if match else None


def _text(header: str) -> str:
    """A header's text, which WSGI gives as if each of its bytes were a character."""
    return header if header.isascii() else header.encode("latin-1").decode("utf-8", "replace")


def known() -> Iterator[str]:
    """The regular expressions of the public list for those crawlers that are refused."""
    return (entry["pattern"] for entry in entries() if is_refused(entry))


def is_refused(entry: dict[str, Any]) -> bool:
    """Whether an entry of the public list is one of those that are refused.

    >>> is_refused({"pattern": "GPTBot", "tags": ["ai-crawler"]}), is_refused({"pattern": "curl", "tags": []})
    (True, False)
    """
    pattern, tags = entry["pattern"], set(entry.get("tags", ()))
    if WELCOME.search(pattern):
        return False
    return bool(tags & ALWAYS) or (BY_NAME in tags and ROBOT.search(pattern) is not None)


def entries() -> list[dict[str, Any]]:
    """The public list. It takes 20 ms and 4 MB, so it is read by those alone who want it."""
    import crawleruseragents  # noqa: PLC0415  (see above)

    data: list[dict[str, Any]] = crawleruseragents.CRAWLER_USER_AGENTS_DATA
    return data
