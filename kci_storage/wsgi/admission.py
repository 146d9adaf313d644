"""Who is let in: crawlers, blocked networks, and clients that want too much are refused before any work.

What is found out about an address with a user agent is remembered, so that a hit pays for one look.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kci_storage.access.challenge import POLICY, Challenge, Verdict
from kci_storage.access.crawlers import LONGEST_REMEMBERED, UserAgents
from kci_storage.access.limits import Cells, Downloads, Ledger, Rate
from kci_storage.errors import Refused, SubnetRefused, UserAgentRefused, meaning
from kci_storage.http import problems
from kci_storage.http.networks import Subnets, around, parse_address
from kci_storage.wsgi.exchange import EXCHANGE
from kci_storage.wsgi.responder import CORS_HEADERS, NOSNIFF, Headers

if TYPE_CHECKING:
    from kci_storage.access.policies import Policies
    from kci_storage.config.settings import Config

ROBOTS = "/robots.txt"  # a crawler may read that it is not wanted
ROUTE = "refused"  # for the metrics
CHALLENGE_ROUTE = "challenge"  # the same, of the page that a browser gets instead of a file
REMEMBERED_CLIENTS = 16_384  # addresses, about 500 bytes each
REMEMBERED_VISITORS = 4096  # pairs of an address and a user agent, about as large


class Client(NamedTuple):
    """What the rules say of an address."""

    blocked_by: str | None  # the subnet
    cells: Cells | None  # where it is counted; None: nowhere


@dataclass(frozen=True, slots=True)
class Visitor:
    """What the rules say of an address with a user agent."""

    banned_for: str | None  # what in the user agent
    blocked_by: str | None
    is_refused: bool  # for one of these
    is_browser: bool  # by its name; the challenge asks for more
    cells: Cells | None
    begin_download: Callable[[], Callable[[], None]] | None  # counts one; None: they are not counted


UNKNOWN = Client(None, None)  # it has no address, or nobody asks for it


class Admission:
    """The rules of one configuration.

    :param ledger: where clients are counted.
    :param challenge: None: there is none.
    """

    def __init__(self, config: Config, ledger: Ledger, challenge: Challenge | None):
        limits = config.limits
        self.challenge = challenge
        self._user_agents = UserAgents(config.useragent.ban, config.useragent.defaults)
        self._subnets = Subnets(config.block_subnets)
        self._ledger = ledger
        self._prefix_lengths = limits.ipv4_prefix_length, limits.ipv6_prefix_length
        per_second, downloads = limits.requests_per_second, limits.downloads_per_client
        self._rate = Rate(ledger, per_second, limits.burst) if per_second else None
        self._downloads = Downloads(ledger, downloads) if downloads else None
        self._looks_at_clients = bool(config.block_subnets or per_second or downloads)
        self._client = functools.lru_cache(REMEMBERED_CLIENTS)(self._look_at_client)
        self._visitor = functools.lru_cache(REMEMBERED_VISITORS)(self._look_at)

    def admit(self, environ: dict[str, Any]) -> Visitor:
        """Let a request in.

        :raises Refused: it is not let in.
        """
        user_agent = environ.get("HTTP_USER_AGENT", "")
        look = self._visitor if len(user_agent) <= LONGEST_REMEMBERED else self._look_at
        visitor = look(environ.get("REMOTE_ADDR", ""), user_agent)
        if visitor.is_refused:
            self._refuse(visitor, environ["PATH_INFO"])
        if visitor.cells is not None:
            exchange = environ[EXCHANGE]
            if self._rate is not None:
                self._rate.count(visitor.cells, exchange.begun)
            if self._downloads is not None and environ["REQUEST_METHOD"] == "GET":
                self._downloads.check(visitor.cells)
                exchange.count = visitor.begin_download
        return visitor

    @staticmethod
    def _refuse(visitor: Visitor, path_info: str) -> None:
        """Raise what the visitor is refused for; a crawler may read one file all the same."""
        if visitor.banned_for is not None and path_info != ROBOTS:
            raise UserAgentRefused("this user agent is not served here", detail=visitor.banned_for)
        if visitor.blocked_by is not None:
            raise SubnetRefused("this network is not served here", detail=visitor.blocked_by)

    def _look_at(self, address: str, user_agent: str) -> Visitor:
        client = self._client(address) if self._looks_at_clients else UNKNOWN
        banned_for = self._user_agents.find(user_agent)
        return Visitor(
            banned_for,
            client.blocked_by,
            is_refused=banned_for is not None or client.blocked_by is not None,
            is_browser=self.challenge is not None and self.challenge.concerns(user_agent),
            cells=client.cells,
            begin_download=self._begins(client.cells),
        )

    def _begins(self, cells: Cells | None) -> Callable[[], Callable[[], None]] | None:
        if self._downloads is None or cells is None:
            return None
        return functools.partial(self._downloads.begin, cells)

    def _look_at_client(self, text: str) -> Client:
        address = parse_address(text)
        if address is None:
            return UNKNOWN
        subnet = self._subnets.find(address)
        network = around(address, *self._prefix_lengths)
        return Client(None if subnet is None else str(subnet), self._ledger.cells(str(network)))


class Guard:
    """WSGI middleware that lets requests in, or refuses them.

    :param app: gets those that are let in.
    :param policies: have the rules, which may change.
    :param refused: called with the label of the rule by which a request is refused.
    :param challenged: called with what becomes of a browser's download.
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        policies: Policies,
        refused: Callable[[str], None],
        challenged: Callable[[str], None],
    ):
        self._app = app
        self._policies = policies
        self._refused = refused
        self._challenged = challenged

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        admission = self._policies.admission
        try:
            visitor = admission.admit(environ)
            if visitor.is_browser:
                assert admission.challenge is not None
                return self._ask(admission.challenge, environ, start_response)
            return self._app(environ, start_response)
        except Refused as refusal:
            return self._refuse(refusal, environ, start_response)

    def _ask(
        self, challenge: Challenge, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Let a browser pass that has run the script of the page."""
        verdict = challenge.judge(environ)
        if verdict is None:
            return self._app(environ, start_response)
        self._challenged(verdict.value)
        if verdict is Verdict.SHOWN:
            return _show(challenge, environ, start_response)
        if verdict is Verdict.SLOWED:
            start_response = _slowly(start_response, challenge.fallback_rate)
        return self._app(environ, start_response)

    def _refuse(
        self, refusal: Refused, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        kind = meaning(refusal)
        self._refused(kind.label)
        exchange = environ[EXCHANGE]
        exchange.route = ROUTE
        exchange.failed(refusal)
        content_type, body = problems.body(kind.status, kind.title, refusal.message, environ.get("HTTP_ACCEPT"))
        start_response(f"{kind.status} {kind.title}", _headers(refusal, content_type, len(body)))
        return () if environ["REQUEST_METHOD"] == "HEAD" else (body,)


def _show(challenge: Challenge, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The page instead of the file: an error, so that nobody takes it for the file, or for the rest of one."""
    body = challenge.page(environ["PATH_INFO"], environ["QUERY_STRING"])
    environ[EXCHANGE].route = CHALLENGE_ROUTE
    headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Content-Security-Policy", POLICY),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
        NOSNIFF,
        *CORS_HEADERS,
    ]
    start_response("403 Forbidden", headers)
    return () if environ["REQUEST_METHOD"] == "HEAD" else (body,)


def _slowly(start_response: Callable[..., Any], rate: int) -> Callable[..., Any]:
    """Have nginx, in front, send a response at so many bytes per second.

    It keeps no rate for what it does not buffer, so it is told to do that.
    """
    slowly = [("X-Accel-Limit-Rate", str(rate)), ("X-Accel-Buffering", "yes")]

    def start(status: str, headers: Headers, *exc_info: Any) -> Any:
        return start_response(status, [*headers, *slowly], *exc_info)

    return start


def _headers(refusal: Refused, content_type: str, size: int) -> Headers:
    headers = [("Content-Type", content_type), ("Content-Length", str(size)), ("Cache-Control", "no-store"), NOSNIFF]
    if refusal.retry_after is not None:
        headers.append(("Retry-After", str(refusal.retry_after)))
    return [*headers, *CORS_HEADERS]
