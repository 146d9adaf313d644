# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to a service: with or without TLS, directly or through an HTTP proxy.

The proxy and the trusted certificates come from the environment variables that requests and curl know. They are read
once per process. ``~/.netrc`` is not read.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
from base64 import b64encode
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi

from kci_storage.drivers.azure.errors import Unanswered, breakage, silence

# A dead peer is noticed 30 + 3 * 10 seconds after its last word, and no firewall on the way forgets the connection.
KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}  # seconds, seconds, probes


class Connector:
    """Makes connections to one service.

    :param url: the service's; its path is not used.
    :param proxy: the URL of an HTTP proxy to go through, maybe with a user and a password; None: directly.
    :param authorities: a file or folder of the certificates to trust; None: OpenSSL's own, which ``SSL_CERT_FILE``
        and ``SSL_CERT_DIR`` replace.
    :param connect_timeout: seconds to wait for a connection.
    """

    def __init__(self, url: str, proxy: str | None, authorities: str | None, connect_timeout: float):
        self._url = urlsplit(url)
        self._proxy = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        self._tls = _trusting(authorities) if self._url.scheme == "https" else None
        self.connect_timeout = connect_timeout
        self.target_prefix = ""  # of each request's target
        self.headers = {"Host": self._url.netloc}  # of each request
        if self._proxy is not None and self._tls is None:  # the proxy forwards what it understands (RFC 9112, 3.2.2)
            self.target_prefix = f"http://{self._url.netloc}"
            self.headers |= _authorization(self._proxy)

    @classmethod
    def from_environment(cls, url: str, connect_timeout: float) -> Connector:
        """A connector with the proxy and the certificates that the environment names."""
        return cls(url, proxy_for(url), authorities(), connect_timeout)

    def connect(self) -> socket.socket:
        """A new connection, on which a request can be sent.

        :raises BackendTimeout: it took too long.
        :raises Unanswered: the service or the proxy refused it, or the certificate is not trusted.
        """
        try:
            connection = self._new_connection()
            connection.connect()
            _keep_alive(connection.sock)
        except TimeoutError:
            raise silence("no connection") from None
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise breakage(repr(exc), Unanswered) from exc
        return connection.sock

    def _new_connection(self) -> http.client.HTTPConnection:
        if self._proxy is not None and self._proxy.scheme != "http":
            raise ValueError("a proxy must be one of http://")
        peer = self._proxy or self._url
        host, timeout = peer.hostname or "", self.connect_timeout
        if self._tls is None:
            return http.client.HTTPConnection(host, peer.port or 80, timeout=timeout)
        port = peer.port or (80 if self._proxy else 443)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._tls)
        if self._proxy is not None:
            connection.set_tunnel(self._url.hostname or "", self._url.port or 443, _authorization(self._proxy))
        return connection


def proxy_for(url: str) -> str | None:
    """The proxy for a URL: ``HTTPS_PROXY``, ``HTTP_PROXY`` or ``ALL_PROXY``, unless ``NO_PROXY`` covers its host.

    Lower-case names have precedence. ``NO_PROXY`` may have host names, domains, ports, addresses and networks.
    """
    parts, proxies = urlsplit(url), getproxies()
    host = parts.hostname or ""
    if proxy_bypass(f"{host}:{parts.port}" if parts.port else host) or _in_networks(host, proxies.get("no", "")):
        return None
    return proxies.get(parts.scheme) or proxies.get("all") or None


def _in_networks(host: str, networks: str) -> bool:
    """Whether a host is an address in one of some networks.

    >>> _in_networks("10.1.2.3", "example.com, 10.0.0.0/8"), _in_networks("example.com", "10.0.0.0/8")
    (True, False)
    """
    with contextlib.suppress(ValueError):
        address = ip_address(host)
        for network in networks.split(","):
            with contextlib.suppress(ValueError):
                if address in ip_network(network.strip(), strict=False):
                    return True
    return False


def authorities() -> str | None:
    """The certificates that the environment names, else certifi's, as :class:`Connector` takes them."""
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not named and (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        return None
    return named or certifi.where()


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _trusting(authorities: str | None) -> ssl.SSLContext:
    if authorities is not None and Path(authorities).is_dir():
        return ssl.create_default_context(capath=authorities)
    return ssl.create_default_context(cafile=authorities)


def _authorization(proxy: SplitResult) -> dict[str, str]:
    """The header that authenticates us to a proxy (RFC 9110, 11.7.2)."""
    if proxy.username is None:
        return {}
    credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(credentials.encode()).decode()}"}
