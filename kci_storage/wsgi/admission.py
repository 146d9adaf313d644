# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access control: crawlers, blocked networks and clients over their limit are refused before any work is done.

Requests that HTTP/1.1 does not allow (:mod:`kci_storage.http.heads`) are refused here, too. The rules' result for an
address and a user agent is cached, so a hit costs one look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from kci_storage.access.challenge import POLICY, Challenge, ChallengeVerdict
from kci_storage.errors import ProtocolError, Refused, StorageError, meaning
from kci_storage.http import heads, problems
from kci_storage.http.answers import NO_STORE, STATUS_LINES, Headers
from kci_storage.http.problems import Problem
from kci_storage.wsgi.exchange import EXCHANGE

if TYPE_CHECKING:
    from kci_storage.access.policies import Policies


ROUTE = "refused"  # the metrics' route of a refused request
CHALLENGE_ROUTE = "challenge"  # the metrics' route of the challenge page, which a browser gets instead of a file


class AccessControl:
    """WSGI middleware that admits requests, or refuses them.

    :param app: gets the admitted requests.
    :param policies: the rules, which a reload of the configuration may replace.
    :param refused: called with the label of the rule that refused a request.
    :param challenged: called with the challenge's verdict on a browser's download.
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
            heads.check(environ)
            visitor = admission.admit(environ, environ[EXCHANGE])
            if visitor.is_browser:
                assert admission.challenge is not None
                return self._ask(admission.challenge, environ, start_response)
            return self._app(environ, start_response)
        except Refused as refusal:
            self._refused(meaning(refusal).label)
            return _refuse(refusal, environ, start_response)
        except ProtocolError as fault:
            environ[EXCHANGE].close_connection()  # the next bytes may be a body that was not announced
            return _refuse(fault, environ, start_response)

    def _ask(
        self, challenge: Challenge, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Admit a browser that has run the challenge page's script; show the page to others."""
        verdict = challenge.judge(environ)
        if verdict is None:
            return self._app(environ, start_response)
        self._challenged(verdict.value)
        if verdict is ChallengeVerdict.SHOWN:
            return _show(challenge, environ, start_response)
        if verdict is ChallengeVerdict.SLOWED:
            start_response = _rate_limited(start_response, challenge.fallback_rate)
        return self._app(environ, start_response)


def _refuse(error: StorageError, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    exchange = environ[EXCHANGE]
    exchange.route = ROUTE
    exchange.failed(error)
    answer = exchange.answer(problems.of(error))
    start_response(answer.status, answer.headers)
    return () if environ["REQUEST_METHOD"] == "HEAD" else (answer.body,)


def _show(challenge: Challenge, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """The challenge page, with status 403, so that no client stores it as the file or as the rest of one."""
    body = challenge.page(environ["PATH_INFO"], environ["QUERY_STRING"])
    environ[EXCHANGE].route = CHALLENGE_ROUTE
    policy = ("Content-Security-Policy", POLICY), ("Referrer-Policy", "no-referrer")
    problem = Problem(403, "Forbidden", "", policy, NO_STORE)
    start_response(STATUS_LINES[403], problems.headers(problem, "text/html; charset=utf-8", len(body)))
    return () if environ["REQUEST_METHOD"] == "HEAD" else (body,)


def _rate_limited(start_response: Callable[..., Any], rate: int) -> Callable[..., Any]:
    """A ``start_response`` that makes nginx, in front, send the response at ``rate`` bytes per second.

    nginx limits the rate of buffered responses only, so buffering is switched on as well.
    """
    limit = [("X-Accel-Limit-Rate", str(rate)), ("X-Accel-Buffering", "yes")]

    def start(status: str, headers: Headers, *exc_info: Any) -> Any:
        return start_response(status, [*headers, *limit], *exc_info)

    return start
