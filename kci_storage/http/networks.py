# SPDX-License-Identifier: LGPL-2.1-or-later
"""Client addresses and the networks that contain them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_WITH_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+))(?::[0-9]{1,5})?")
_MAPPED_BITS = 96  # bits of the prefix ::ffff:0:0 of IPv4-mapped IPv6 addresses (RFC 4291, 2.5.5.2)


def parse_address(text: str) -> Address | None:
    """A client's address; None: it has none, as on a Unix socket.

    An IPv4-mapped IPv6 address, as a dual-stack socket reports it, becomes the IPv4 address.

    >>> parse_address("::ffff:192.0.2.1")
    IPv4Address('192.0.2.1')
    >>> parse_address("") is None
    True
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def forwarded_address(text: str) -> str | None:
    """An address that a proxy forwards, without the port that some proxies add; None: it cannot be read.

    >>> forwarded_address("192.0.2.1:4711"), forwarded_address("[2001:db8::1]:443"), forwarded_address("2001:db8::1")
    ('192.0.2.1', '2001:db8::1', '2001:db8::1')
    >>> forwarded_address("unknown"), forwarded_address("192.0.2.1:x")
    (None, None)
    """
    match = _WITH_PORT.fullmatch(text.strip())
    address = text.strip() if match is None else match[1] or match[2]
    return address if parse_address(address) is not None else None


def parse_subnet(text: str) -> Network | None:
    """A subnet in CIDR notation, or a single address; None: it is neither. Bits after the prefix are ignored.

    >>> parse_subnet("192.0.2.7/24"), parse_subnet("::ffff:192.0.2.0/120")
    (IPv4Network('192.0.2.0/24'), IPv4Network('192.0.2.0/24'))
    >>> parse_subnet("192.0.2.0/33") is None
    True
    """
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is None or network.prefixlen < _MAPPED_BITS:
        return network
    return ipaddress.IPv4Network((mapped, network.prefixlen - _MAPPED_BITS))


def around(address: Address, ipv4_prefix_length: int, ipv6_prefix_length: int) -> Network:
    """The network with the given prefix length that contains an address.

    >>> around(ipaddress.ip_address("2001:db8::1"), 32, 64)
    IPv6Network('2001:db8::/64')
    """
    length = ipv4_prefix_length if address.version == 4 else ipv6_prefix_length
    network: Network = ipaddress.ip_network((address, length), strict=False)
    return network


class Subnets:
    """A set of subnets. A search takes one look-up for each different prefix length.

    >>> subnets = Subnets(["192.0.2.0/24"])
    >>> subnets.find(ipaddress.ip_address("192.0.2.1")), subnets.find(ipaddress.ip_address("192.0.3.1"))
    (IPv4Network('192.0.2.0/24'), None)
    """

    def __init__(self, subnets: Iterable[str]):
        self._networks = {network for subnet in subnets if (network := parse_subnet(subnet)) is not None}
        self._lengths = sorted({(network.version, network.prefixlen) for network in self._networks})

    def find(self, address: Address) -> Network | None:
        """The widest subnet that contains the address; None: no subnet does."""
        lengths = (length for version, length in self._lengths if version == address.version)
        networks = (around(address, length, length) for length in lengths)
        return next((network for network in networks if network in self._networks), None)
