# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which user agents are refused: crawlers that identify themselves by name.

The names come from the package crawler-user-agents, a public list that its maintainers update about weekly; nothing
else here has to be kept up to date. AI crawlers, search engines and SEO bots on that list are refused. Programs with
which people download (curl, wget, libraries), monitoring and link previews are not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

ALWAYS = frozenset({"ai-crawler", "search-engine"})  # tags of the list: all their entries are refused
BY_NAME = "seo"  # a mixed tag: only its entries whose name matches ROBOT are refused
ROBOT = re.compile(r"bot\b|bot[^a-z]|crawl|spider|scrap|seo", re.IGNORECASE)
WELCOME = re.compile(r"google|bingbot|bingpreview|msnbot|adidxbot", re.IGNORECASE)  # Google's and Bing's own

REMEMBERED = 4096  # user agents whose result is cached
MAX_REMEMBERED_LENGTH = 512  # characters of a cached user agent, so that clients cannot fill the memory


class UserAgents:
    """The user agents that are refused.

    :param ban: a user agent that contains one of these texts, in any case, is refused.
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
        """The part of a user agent for which it is refused; None: it is not refused."""
        if self._pattern is None or not user_agent:
            return None
        return (self._find_remembered if len(user_agent) <= MAX_REMEMBERED_LENGTH else self._search)(user_agent)

    def _search(self, user_agent: str) -> str | None:
        assert self._pattern is not None
        match = self._pattern.search(_text(user_agent))
        return match[0] if match else None


def _text(header: str) -> str:
    """A header's text as UTF-8; WSGI passes it decoded as Latin-1 (PEP 3333)."""
    return header if header.isascii() else header.encode("latin-1").decode("utf-8", "replace")


def known() -> Iterator[str]:
    """The public list's regular expressions of the crawlers that are refused."""
    return (entry["pattern"] for entry in entries() if is_refused(entry))


def is_refused(entry: dict[str, Any]) -> bool:
    """Whether an entry of the public list names a crawler that is refused.

    >>> is_refused({"pattern": "GPTBot", "tags": ["ai-crawler"]}), is_refused({"pattern": "curl", "tags": []})
    (True, False)
    """
    pattern, tags = entry["pattern"], set(entry.get("tags", ()))
    if WELCOME.search(pattern):
        return False
    return bool(tags & ALWAYS) or (BY_NAME in tags and ROBOT.search(pattern) is not None)


def entries() -> list[dict[str, Any]]:
    """The public list. Loading it takes 20 ms and 4 MB, so it is imported only when it is used."""
    import crawleruseragents  # noqa: PLC0415  (see above)

    data: list[dict[str, Any]] = crawleruseragents.CRAWLER_USER_AGENTS_DATA
    return data
