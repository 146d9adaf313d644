# SPDX-License-Identifier: LGPL-2.1-or-later
"""Requests through trusted proxies: the client's address, host and scheme are what the proxies say."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from werkzeug.middleware.proxy_fix import ProxyFix

from kci_storage import logfmt
from kci_storage.http.networks import forwarded_address

log = logging.getLogger(__name__)

REMEMBERED_ADDRESSES = 4096
ORIGINAL = "werkzeug.proxy_fix.orig"  # the environ's key for what ProxyFix has replaced


def behind_proxies(app: Callable[..., Iterable[bytes]], proxies: int) -> Callable[..., Iterable[bytes]]:
    """The application behind this many proxies, each of which sets or extends ``X-Forwarded-For`` and the like."""
    return ProxyFix(ForwardedAddress(app), x_for=proxies, x_proto=proxies, x_host=proxies)


class ForwardedAddress:
    """WSGI middleware behind ProxyFix: reads the address that the proxy has forwarded.

    Some proxies add a port, such as Azure's Application Gateway. Where no address can be read, the proxy's own one
    counts, so that the rules for addresses hold for such clients together, rather than for none of them.

    :param app: gets the requests.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]):
        self._app = app
        self._read = functools.lru_cache(REMEMBERED_ADDRESSES)(forwarded_address)
        self._has_complained = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        own = environ[ORIGINAL]["REMOTE_ADDR"]
        if (text := environ.get("REMOTE_ADDR", "")) != own:
            environ["REMOTE_ADDR"] = self._read(text) or self._unreadable(text, own)
        return self._app(environ, start_response)

    def _unreadable(self, text: str, own: str) -> str:
        """The address to use instead. The log says so once, since each request would be a line."""
        if not self._has_complained:
            self._has_complained = True
            log.warning(logfmt.line(event="forwarded_address_unreadable", value=text[:100], counts_as=own))
        return own
