# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access control: the rules of one configuration, in the order in which they are applied to a request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kci_storage.access.challenge import REMEMBERED_CLIENTS, Challenge
from kci_storage.access.crawlers import MAX_REMEMBERED_LENGTH, UserAgents
from kci_storage.access.limits import Cells, DownloadLimit, Ledger, RateLimit
from kci_storage.errors import SubnetRefused, UserAgentRefused
from kci_storage.http.networks import Subnets, around, parse_address

if TYPE_CHECKING:
    from kci_storage.config.settings import Config


ROBOTS = "/robots.txt"  # a refused crawler may still read that it is not wanted
REMEMBERED_VISITORS = 4096  # pairs of an address and a user agent, about 500 bytes each


class CountedRequest(Protocol):
    """A request that asks for admission: :class:`kci_storage.wsgi.exchange.Exchange`."""

    begun: float  # seconds on the monotonic clock
    count: Callable[[], Callable[[], None]] | None  # counts it as a running download; returns how to undo that


class Client(NamedTuple):
    """The rules' result for an address."""

    blocked_by: str | None  # the subnet
    cells: Cells | None  # the ledger's cells that count it; None: it is not counted


@dataclass(frozen=True, slots=True)
class Visitor:
    """The rules' result for an address and a user agent."""

    banned_for: str | None  # the matching part of the user agent
    blocked_by: str | None  # the subnet
    is_refused: bool  # for one of these
    is_browser: bool  # whether the challenge is configured for this user agent
    cells: Cells | None
    begin_download: Callable[[], Callable[[], None]] | None  # counts one; None: they are not counted


UNKNOWN = Client(None, None)  # the client has no address, or no rule depends on it


class Admission:
    """The rules of one configuration.

    :param ledger: counts the clients' requests and downloads.
    :param challenge: the browser challenge; None: it is off.
    """

    def __init__(self, config: Config, ledger: Ledger, challenge: Challenge | None):
        limits = config.limits
        self.challenge = challenge
        self._user_agents = UserAgents(config.useragent.ban, config.useragent.defaults)
        self._subnets = Subnets(config.block_subnets)
        self._ledger = ledger
        self._prefix_lengths = limits.ipv4_prefix_length, limits.ipv6_prefix_length
        per_second, downloads = limits.requests_per_second, limits.downloads_per_client
        self._rate = RateLimit(ledger, per_second, limits.burst) if per_second else None
        self._downloads = DownloadLimit(ledger, downloads) if downloads else None
        self._needs_address = bool(config.block_subnets or per_second or downloads)
        self._client = functools.lru_cache(REMEMBERED_CLIENTS)(self._judge_client)
        self._visitor = functools.lru_cache(REMEMBERED_VISITORS)(self._judge)

    def admit(self, environ: dict[str, Any], request: CountedRequest) -> Visitor:
        """Admit a request.

        :param environ: the request's WSGI environment.
        :param request: its ``count`` is set if its client's downloads are limited.
        :returns: the rules' result for its client.
        :raises Refused: a rule refuses it.
        """
        user_agent = environ.get("HTTP_USER_AGENT", "")
        judge = self._visitor if len(user_agent) <= MAX_REMEMBERED_LENGTH else self._judge
        visitor = judge(environ.get("REMOTE_ADDR", ""), user_agent)
        if visitor.is_refused:
            self._refuse(visitor, environ["PATH_INFO"])
        if visitor.cells is not None:
            if self._rate is not None:
                self._rate.count(visitor.cells, request.begun)
            if self._downloads is not None and environ["REQUEST_METHOD"] == "GET":
                self._downloads.check(visitor.cells)
                request.count = visitor.begin_download
        return visitor

    @staticmethod
    def _refuse(visitor: Visitor, path_info: str) -> None:
        """Raise the reason for the refusal; a crawler may still read :data:`ROBOTS`."""
        if visitor.banned_for is not None and path_info != ROBOTS:
            raise UserAgentRefused("this user agent is not served here", detail=visitor.banned_for)
        if visitor.blocked_by is not None:
            raise SubnetRefused("this network is not served here", detail=visitor.blocked_by)

    def _judge(self, address: str, user_agent: str) -> Visitor:
        client = self._client(address) if self._needs_address else UNKNOWN
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

    def _judge_client(self, text: str) -> Client:
        address = parse_address(text)
        if address is None:
            return UNKNOWN
        subnet = self._subnets.find(address)
        network = around(address, *self._prefix_lengths)
        return Client(None if subnet is None else str(subnet), self._ledger.cells(str(network)))
