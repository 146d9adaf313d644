"""Who is let in: crawlers, blocked networks, and clients that want too much are refused before any work.

What is found out about an address or a user agent is remembered, so that a hit pays for looking that up.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from kci_storage import problems
from kci_storage.errors import Refused, SubnetRefused, UserAgentRefused, meaning
from kci_storage.guards.challenge import POLICY, Challenge, Verdict
from kci_storage.guards.crawlers import UserAgents
from kci_storage.guards.limits import Cells, Downloads, Ledger, Rate
from kci_storage.guards.networks import Subnets, around, parse_address
from kci_storage.sending import CORS_HEADERS, NOSNIFF, Headers
from kci_storage.transport import EXCHANGE

if TYPE_CHECKING:
    from kci_storage.config import Config
    from kci_storage.guards.policies import Policies

ROBOTS = "/robots.txt"  # a crawler may read that it is not wanted
ROUTE = "refused"  # for the metrics
CHALLENGE_ROUTE = "challenge"  # the same, of the page that a browser gets instead of a file
REMEMBERED_CLIENTS = 16_384  # addresses, about 500 bytes each


class Client(NamedTuple):
    """What the rules say of an address."""

    blocked_by: str | None  # the subnet
    cells: Cells | None  # where it is counted; None: nowhere, since it has no address


class Admission:
    """The rules of one configuration.

    :param ledger: where clients are counted.
    """

    def __init__(self, config: Config, ledger: Ledger):
        limits = config.limits
        self._user_agents = UserAgents(config.useragent.ban, config.useragent.defaults)
        self._subnets = Subnets(config.block_subnets)
        self._ledger = ledger
        self._prefix_lengths = limits.ipv4_prefix_length, limits.ipv6_prefix_length
        per_second, downloads = limits.requests_per_second, limits.downloads_per_client
        self._rate = Rate(ledger, per_second, limits.burst) if per_second else None
        self._downloads = Downloads(ledger, downloads) if downloads else None
        self._looks_at_clients = bool(config.block_subnets or per_second or downloads)
        self._client = functools.lru_cache(REMEMBERED_CLIENTS)(self._look_at)

    def admit(self, environ: dict[str, Any]) -> Callable[[], None] | None:
        """Let a request in; what is to be called at its end, if anything.

        :raises Refused: it is not let in.
        """
        self._check_user_agent(environ)
        if not self._looks_at_clients:
            return None
        client = self._client(environ.get("REMOTE_ADDR", ""))
        if client.blocked_by is not None:
            raise SubnetRefused("this network is not served here", detail=client.blocked_by)
        return self._count(client.cells, environ["REQUEST_METHOD"]) if client.cells is not None else None

    def _check_user_agent(self, environ: dict[str, Any]) -> None:
        found = self._user_agents.find(environ.get("HTTP_USER_AGENT", ""))
        if found is not None and environ["PATH_INFO"] != ROBOTS:
            raise UserAgentRefused("this user agent is not served here", detail=found)

    def _count(self, cells: Cells, method: str) -> Callable[[], None] | None:
        if self._rate is not None:
            self._rate.count(cells, time.monotonic())
        if self._downloads is not None and method == "GET":
            return self._downloads.begin(cells)
        return None

    def _look_at(self, text: str) -> Client:
        address = parse_address(text)
        if address is None:
            return Client(None, None)
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
        try:
            environ[EXCHANGE].release = self._policies.admission.admit(environ)
        except Refused as refusal:
            return self._refuse(refusal, environ, start_response)
        challenge = self._policies.challenge
        if challenge is not None:
            return self._ask(challenge, environ, start_response)
        return self._app(environ, start_response)

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
