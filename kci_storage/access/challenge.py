# SPDX-License-Identifier: LGPL-2.1-or-later
"""The browser challenge: a program that calls itself a browser gets a file only once it has run a page's script.

The script asks for a cookie, and loads the file again. The cookie is a signed expiry time, valid for the client's
network alone. So it is of no use elsewhere, and the server keeps no record of the cookies that it has issued.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import hmac
import time
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from kci_storage import keys
from kci_storage.access.crawlers import UserAgents
from kci_storage.errors import BadKey
from kci_storage.http.networks import around, parse_address
from kci_storage.pages import csp
from kci_storage.pages.directory import directory_url

if TYPE_CHECKING:
    from kci_storage.config.settings import DownloadChallengeConfig

COOKIE = "kci_storage_download"
FALLBACK = "challenge_fallback"  # the query parameter for browsers without JavaScript
REMEMBERED_CLIENTS = 16_384  # client addresses whose result is cached, about 500 bytes each


def _template(name: str) -> str:
    return files("kci_storage.pages").joinpath("templates", name).read_text(encoding="utf-8")


STYLE, SCRIPT, PAGE = _template("challenge.css"), _template("challenge.js"), Template(_template("challenge.html"))
FALLBACK_LINK = Template(_template("challenge_fallback.html"))
POLICY = csp.policy(STYLE, SCRIPT, "connect-src 'self'", "img-src 'self'")


class ChallengeVerdict(enum.Enum):
    """The outcome of a browser's download. Its value is the metric's label."""

    SHOWN = "shown"  # the page was sent instead of the file
    PASSED = "passed"  # the request has a valid cookie
    SLOWED = "slowed"  # no JavaScript: the file is sent at a limited rate


class Challenge:
    """The challenge as it is configured."""

    def __init__(self, settings: DownloadChallengeConfig):
        self._user_agents = UserAgents(settings.user_agents, defaults=False)
        self._secret = settings.secret.encode()
        self._seconds = settings.cookie_ttl_seconds
        self._secure = settings.secure_cookie
        self.fallback_rate = settings.fallback_bytes_per_second
        self._prefix_lengths = settings.ipv4_prefix_length, settings.ipv6_prefix_length
        self._network = functools.lru_cache(REMEMBERED_CLIENTS)(self._network_of)

    def concerns(self, user_agent: str) -> bool:
        """Whether programs with this user agent are challenged."""
        return self._user_agents.find(user_agent) is not None

    def judge(self, environ: dict[str, Any]) -> ChallengeVerdict | None:
        """The verdict on a request whose user agent :meth:`concerns` the challenge; None: it is no download."""
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD") or not _names_file(environ["PATH_INFO"]):
            return None
        if self.has_passed(environ.get("HTTP_COOKIE", ""), environ.get("REMOTE_ADDR", "")):
            return ChallengeVerdict.PASSED
        return (
            ChallengeVerdict.SLOWED
            if self.fallback_rate and _asks_for_fallback(environ["QUERY_STRING"])
            else ChallengeVerdict.SHOWN
        )

    def has_passed(self, cookies: str, address: str) -> bool:
        """Whether a client has a valid cookie.

        :param cookies: the value of ``Cookie``.
        :param address: the client's.
        """
        pairs = (pair.strip(" \t").partition("=") for pair in cookies.split(";"))
        return any(name == COOKIE and self._is_valid(value, address) for name, _, value in pairs)

    def _is_valid(self, value: str, address: str) -> bool:
        expires, _, signature = value.partition(".")
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12 and signature.isascii()):
            return False
        left = int(expires) - time.time()
        return 0 < left <= self._seconds + 1 and hmac.compare_digest(signature, self._sign(expires, address))

    def set_cookie(self, address: str) -> str:
        """The value of ``Set-Cookie`` for a client that has run the script (RFC 6265)."""
        expires = str(int(time.time()) + self._seconds)
        secure = "; Secure" if self._secure else ""
        value = f"{expires}.{self._sign(expires, address)}"
        return f"{COOKIE}={value}; Max-Age={self._seconds}; Path=/; HttpOnly; SameSite=Lax{secure}"

    def _sign(self, expires: str, address: str) -> str:
        text = f"{COOKIE} {expires} {self._network(address)}"
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def _network_of(self, address: str) -> str:
        """The network that a cookie is bound to; empty for a client without an address, as on a Unix socket."""
        parsed = parse_address(address)
        return "" if parsed is None else str(around(parsed, *self._prefix_lengths))

    def page(self, path_info: str, query: str) -> bytes:
        """The page that a browser gets instead of the file.

        :param path_info: the request's ``PATH_INFO``, which :meth:`judge` has accepted as a key.
        :param query: the request's query string.
        """
        folder, slash, _ = keys.from_path_info(path_info).rpartition("/")
        fallback = ""
        if self.fallback_rate:
            url = "?" + "&".join(filter(None, (query, f"{FALLBACK}=1")))
            fallback = FALLBACK_LINK.substitute(url=escape(url))
        links = {"fallback": fallback, "folder": escape(directory_url(folder + slash))}
        return PAGE.substitute(style=STYLE, script=SCRIPT, **links).encode()


def _names_file(path_info: str) -> bool:
    try:
        return keys.is_valid(keys.from_path_info(path_info))
    except BadKey:
        return False


def _asks_for_fallback(query: str) -> bool:
    return FALLBACK in query and parse_qs(query).get(FALLBACK, [""])[-1] == "1"
