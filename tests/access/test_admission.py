# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access control: crawlers, blocked networks, and limits for each client (docs/access.md)."""

from __future__ import annotations

import http.client
import itertools
import os
import re
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from werkzeug.exceptions import NotFound
from werkzeug.test import Client

from kci_storage.access import crawlers
from kci_storage.access.crawlers import UserAgents
from kci_storage.access.limits import DownloadLimit, Ledger, RateLimit
from kci_storage.app import middleware
from kci_storage.config.reading import load
from kci_storage.errors import TooManyRequests
from kci_storage.http.networks import Subnets, parse_address
from kci_storage.services import build_services
from tests.support.cold import Bench, in_background
from tests.support.faultproxy import CONTENT, PROPERTIES, Hold
from tests.support.harness import Server, running, toml, wait_until
from tests.support.wire import (
    SECONDS,
    Wire,
    access,
    assert_error,
    get,
    new_folder,
    put,
    request,
    stored_by_another_program,
)

MIB = 1 << 20

CRAWLERS = [
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://openai.com/gptbot)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; ClaudeBot/1.0; +claudebot@anthropic.com)",
    "CCBot/2.0 (https://commoncrawl.org/faq/)",
    (
        "Mozilla/5.0 (Linux; Android 5.0) AppleWebKit/537.36 (KHTML, like Gecko) Mobile Safari/537.36 "
        "(compatible; Bytespider; spider-feedback@bytedance.com)"
    ),
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; PerplexityBot/1.0; +https://perplexity.ai/bot)",
    "meta-externalagent/1.1 (+https://developers.facebook.com/docs/sharing/webmasters/crawler)",
    "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)",
    "Mozilla/5.0 (compatible; SemrushBot/7~bl; +http://www.semrush.com/bot.html)",
    "Mozilla/5.0 (compatible; MJ12bot/v1.4.8; http://mj12bot.com/)",
    "Mozilla/5.0 (compatible; DotBot/1.2; +https://opensiteexplorer.org/dotbot; help@moz.com)",
    "Mozilla/5.0 (compatible; BLEXBot/1.0; +https://help.seranking.com/en/blex-crawler)",
    "Mozilla/5.0 (compatible; DataForSeoBot/1.0; +https://dataforseo.com/dataforseo-bot)",
    "Mozilla/5.0 (compatible; YandexBot/3.0; +http://yandex.com/bots)",
    "Mozilla/5.0 (compatible; Baiduspider/2.0; +http://www.baidu.com/search/spider.html)",
    "DuckDuckBot/1.1; (+http://duckduckgo.com/duckduckbot.html)",
    "Mozilla/5.0 (compatible; Yahoo! Slurp; http://help.yahoo.com/help/us/ysearch/slurp)",
    "Sogou web spider/4.0(+http://www.sogou.com/docs/help/webmasters.htm#07)",
    "Mozilla/5.0 (compatible; SeznamBot/4.0; +http://napoveda.seznam.cz/seznambot-intro/)",
    "Mozilla/5.0 (compatible; PetalBot;+https://webmaster.petalsearch.com/site/petalbot)",
    "Mozilla/5.0 (compatible; Qwantify/2.4w; +https://www.qwant.com/)/2.4w",
    "Mozilla/5.0 (compatible; Amazonbot/0.1; +https://developer.amazon.com/support/amazonbot)",
]
WELCOME = [
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    (
        "Mozilla/5.0 (Linux; Android 6.0.1; Nexus 5X Build/MMB29P) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/126.0.6478.126 Mobile Safari/537.36 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"
    ),
    "Googlebot-Image/1.0",
    "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)",
    "msnbot/2.0b (+http://search.msn.com/msnbot.htm)",
    "curl/8.14.1",
    "Wget/1.25.0",
    "Wget2/2.2.0",
    "python-requests/2.32.4",
    "python-urllib3/2.5.0",
    "Python-urllib/3.11",
    "Python/3.12 aiohttp/3.12.13",
    "python-httpx/0.28.1",
    "Go-http-client/1.1",
    "Go-http-client/2.0",
    "okhttp/4.12.0",
    "libwww-perl/6.78",
    "Java/17.0.15",
    "aria2/1.37.0",
    "lava-dispatcher",
    "lava 2025.06",
    "LAVA/2025.04 (https://lavasoftware.org)",
    "KernelCI/kci",
    "tuxrun/1.2.3",
    "Debian APT-HTTP/1.3 (2.6.1)",
    "U-Boot/2025.04 wget",
    "Prometheus/2.53.5",
    "Blackbox Exporter/0.27.0",
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) HeadlessChrome/138.0.0.0 Safari/537.36",
    (
        "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 "
        "Safari/605.1.15"
    ),
    (
        "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) "
        "Version/18.5 Mobile/15E148 Safari/604.1"
    ),
    (
        "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 "
        "Safari/537.36 Edg/138.0.0.0"
    ),
    (
        "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) SamsungBrowser/28.0 "
        "Chrome/130.0.0.0 Mobile Safari/537.36"
    ),
    "Lynx/2.9.2 libwww-FM/2.14 SSL-MM/1.4.1 GNUTLS/3.8.9",
    "",
]


@pytest.fixture(scope="module")
def proxied_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server behind a proxy, so that a test can send requests from any address."""
    document = {
        "server": {"trusted_proxies": 1},
        "useragent": {"ban": ["NastyBot"]},
        "block_subnets": ["192.0.2.0/24", "2001:db8::/32"],
        "limits": {"downloads_per_client": 4},
    }
    with running(Server(tmp_path_factory.mktemp("proxied"), document)) as server:
        yield server


@pytest.fixture(scope="module")
def limited_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same, with a limit of 20 requests per client and a very low rate."""
    limits = {"requests_per_second": 0.001, "burst": 20, "ipv4_prefix_length": 24}
    document = {"server": {"trusted_proxies": 1}, "limits": limits}
    with running(Server(tmp_path_factory.mktemp("limited"), document)) as server:
        yield server


# User agents


@pytest.fixture(scope="module")
def known() -> UserAgents:
    """The rules for user agents of the default configuration."""
    return UserAgents([], defaults=True)


@pytest.mark.parametrize("user_agent", CRAWLERS)
def test_crawlers_are_known(known: UserAgents, user_agent: str) -> None:
    assert known.find(user_agent)
    assert known.find(user_agent.lower())
    assert known.find(user_agent.upper())


@pytest.mark.parametrize("user_agent", WELCOME)
def test_people_and_their_programs_are_not_taken_for_crawlers(known: UserAgents, user_agent: str) -> None:
    assert known.find(user_agent) is None


def instances(kind: Callable[[dict[str, object]], bool]) -> Iterator[str]:
    """The user agents that the public list has for the entries of a kind."""
    return (str(agent) for entry in crawlers.entries() if kind(entry) for agent in entry.get("instances", ()))


def test_those_of_the_public_list_that_are_to_be_refused_are(known: UserAgents) -> None:
    found = [known.find(agent) for agent in instances(crawlers.is_refused)]
    assert len(found) > 500
    assert found.count(None) < 0.01 * len(found)  # the list counts some whose names only have another name's ending


def test_google_and_bing_are_let_through(known: UserAgents) -> None:
    theirs = list(instances(lambda entry: re.search("(?i)google|bingbot|bingpreview|msnbot", str(entry["pattern"]))))
    assert len(theirs) > 50
    refused = [agent for agent in theirs if known.find(agent)]
    assert all("Daumoa" in agent for agent in refused), refused  # which says that it follows one of Google's


def test_programs_and_previews_of_the_public_list_are_let_through(known: UserAgents) -> None:
    kinds = {"http-library", "browser-automation", "social-preview"}
    theirs = instances(lambda entry: kinds >= set(entry["tags"]))  # type: ignore[arg-type]
    assert [agent for agent in theirs if known.find(agent)] == []


def test_a_ban_is_a_text_in_whatever_case_and_no_pattern() -> None:
    agents = UserAgents(["Nasty.Bot", "Робот"], defaults=False)
    assert agents.find("x nasty.BOT/1")
    assert agents.find("Робот/1".encode().decode("latin-1"))  # as WSGI passes it
    assert agents.find("NastyxBot/1") is None
    assert agents.find(CRAWLERS[0]) is None


def test_an_endless_user_agent_is_searched_and_not_kept() -> None:
    agents = UserAgents(["nasty"], defaults=False)
    assert agents.find("x" * 8000 + "nasty")
    assert agents._find_remembered.cache_info().currsize == 0


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
def test_a_crawler_is_refused_before_any_work(local_server: Server, method: str) -> None:
    key = f"{new_folder()}/file"
    headers = {"User-Agent": CRAWLERS[0], "Expect": "100-continue", **local_server.headers()}
    if method != "PUT":
        headers.pop("Expect")
    with Wire(local_server) as wire:
        wire.send(request(method, f"/{key}", {**headers, "Content-Length": 4 if method == "PUT" else 0}))
        answer = wire.answer(method)  # the final response, not 100 Continue
    if method == "HEAD":
        assert answer.status == 403
    else:
        assert_error(answer, 403, local_server, ["user agent"])
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    line = access(local_server, answer)
    assert (line["status"], line["error"]) == ("403", "useragent: GPTBot")
    assert get(local_server, key).status_code == 404


def test_a_crawler_that_prefers_json_gets_problem_details(local_server: Server) -> None:
    headers = {"User-Agent": CRAWLERS[0], "Accept": "application/json"}
    answer = requests.get(local_server.url, headers=headers, timeout=SECONDS)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.json()["status"], answer.json()["title"]) == (403, "Forbidden")


def test_a_crawler_that_was_refused_may_keep_its_connection(local_server: Server) -> None:
    with Wire(local_server) as wire:
        for _ in range(2):
            wire.send(request("GET", "/", {"User-Agent": CRAWLERS[0]}))
            assert wire.answer().status == 403


def test_refusals_are_counted(local_server: Server) -> None:
    def refused() -> float:
        page = requests.get(f"{local_server.url}/metrics", timeout=SECONDS).text
        (value,) = re.findall(r'^kci_storage_refused_total\{rule="useragent"\} (\S+)$', page, flags=re.MULTILINE)
        return float(value)

    before = refused()
    get(local_server, "x", {"User-Agent": CRAWLERS[0]})
    assert refused() == before + 1


@pytest.mark.parametrize("user_agent", ["curl/8.14.1", CRAWLERS[0]], ids=["curl", "crawler"])
def test_robots_txt_keeps_all_away(local_server: Server, user_agent: str) -> None:
    answer = get(local_server, "robots.txt", {"User-Agent": user_agent})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert answer.text == "User-agent: *\nDisallow: /\n"


def test_the_icon_is_one(local_server: Server) -> None:
    answer = get(local_server, "favicon.ico")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/x-icon")
    assert "max-age" in answer.headers["Cache-Control"]
    reserved, kind, count = struct.unpack_from("<3H", answer.content)
    assert (reserved, kind, count) == (0, 1, 1)
    size, offset = struct.unpack_from("<2I", answer.content, 14)
    assert offset + size == len(answer.content)


def test_bans_of_the_configuration(proxied_server: Server) -> None:
    assert get(proxied_server, "robots.txt", {"User-Agent": "a nastybot"}).status_code == 200
    assert get(proxied_server, "v1/health", {"User-Agent": "a nastybot"}).status_code == 403


# Networks


@pytest.mark.parametrize(
    ("address", "blocked"),
    [
        ("192.0.2.0", True),
        ("192.0.2.255", True),
        ("192.0.3.0", False),
        ("::ffff:192.0.2.1", True),
        ("2001:db8:ffff::1", True),
        ("2001:db9::1", False),
        ("198.51.100.7", True),
        ("198.51.100.8", False),
        ("203.0.113.130", True),  # the list has it as an IPv4 network mapped into IPv6
        ("203.0.113.127", False),
        ("::c000:201", False),  # the bits of 192.0.2.1, but no IPv4 address
    ],
)
def test_an_address_lies_in_a_subnet_or_not(address: str, blocked: bool) -> None:
    subnets = Subnets(["192.0.2.0/24", "2001:db8::/32", "198.51.100.7", "::ffff:203.0.113.128/121"])
    parsed = parse_address(address)
    assert parsed is not None
    assert (subnets.find(parsed) is not None) is blocked


@pytest.mark.parametrize(
    ("forwarded", "status"),
    [
        ("192.0.2.9", 403),
        ("2001:db8::9", 403),
        ("::ffff:192.0.2.9", 403),
        ("203.0.113.1, 192.0.2.9", 403),
        ("192.0.2.9, 203.0.113.1", 200),  # a client's own header is ignored
        ("192.0.2.9:4711", 403),  # as Azure's Application Gateway writes it
        ("[2001:db8::9]:4711", 403),
        ("[2001:db8::9]", 403),
        ("203.0.113.1, 192.0.2.9:1", 403),
        ("203.0.113.1:4711", 200),
        ("203.0.113.1", 200),
        ("unknown", 200),
        (None, 200),
    ],
)
def test_a_blocked_network_is_refused(proxied_server: Server, forwarded: str | None, status: int) -> None:
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    answer = get(proxied_server, "v1/health", headers)
    assert answer.status_code == status
    if status == 403:
        assert_error(answer, 403, proxied_server, ["network"])
        assert access(proxied_server, answer)["error"].startswith("subnet: ")


def test_a_client_whose_address_cannot_be_read_counts_as_the_proxy(start_server: Callable[..., Server]) -> None:
    """The rules hold for it, rather than fail open. The log has one line about it."""
    server = start_server(server={"trusted_proxies": 1, "workers": 1}, block_subnets=["127.0.0.2"])
    for forwarded, status in {
        "unknown": 403, "_hidden": 403, "192.0.2.9:x": 403, "192.0.2.999": 403, "[::1": 403, "192.0.2.9 evil": 403,
        "203.0.113.1, x": 403, "x" * 3000: 403, "127.0.0.2": 403, "203.0.113.1:80": 200,
    }.items():  # fmt: skip
        proxy = http.client.HTTPConnection("127.0.0.1", server.port, SECONDS, source_address=("127.0.0.2", 0))
        proxy.request("GET", "/v1/health", headers={"X-Forwarded-For": forwarded})
        answer = proxy.getresponse()
        assert answer.status == status, forwarded
        request_id = answer.headers["X-Request-ID"]
        assert access(server, request_id)["ip"] == ("127.0.0.2" if status == 403 else "203.0.113.1")
        proxy.close()
    (line,) = (line for line in server.log().splitlines() if "forwarded_address_unreadable" in line)
    assert "value=unknown counts_as=127.0.0.2" in line


def test_a_blocked_network_gets_no_robots_txt(proxied_server: Server) -> None:
    assert get(proxied_server, "robots.txt", {"X-Forwarded-For": "192.0.2.9"}).status_code == 403


def test_without_a_trusted_proxy_the_connection_counts(start_server: Callable[..., Server]) -> None:
    server = start_server(block_subnets=["192.0.2.0/24", "127.0.0.2/32"])
    assert get(server, "v1/health", {"X-Forwarded-For": "192.0.2.9"}).status_code == 200
    for address, status in (("127.0.0.1", 200), ("127.0.0.2", 403)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, SECONDS, source_address=(address, 0))
        connection.request("GET", "/v1/health", headers={"X-Forwarded-For": "203.0.113.1"})
        assert connection.getresponse().status == status
        connection.close()


# Limits


def statuses(server: Server, address: str, count: int) -> list[int]:
    """The statuses of this many requests of a client, each on a new connection."""
    return [get(server, "v1/health", {"X-Forwarded-For": address}).status_code for _ in range(count)]


def test_requests_are_counted_over_all_workers(limited_server: Server) -> None:
    assert statuses(limited_server, "192.0.2.1", 24) == [200] * 20 + [429] * 4
    assert statuses(limited_server, "192.0.3.1", 1) == [200]
    answer = get(limited_server, "v1/health", {"X-Forwarded-For": "192.0.2.1"})
    assert_error(answer, 429, limited_server, ["too many requests"])
    assert 900 < int(answer.headers["Retry-After"]) <= 1000
    assert access(limited_server, answer)["error"].startswith("rate: ")


def test_a_client_is_a_network(limited_server: Server) -> None:
    assert statuses(limited_server, "198.51.100.1", 20) == [200] * 20
    assert statuses(limited_server, "198.51.100.200", 1) == [429]
    assert statuses(limited_server, "::ffff:198.51.100.7", 1) == [429]
    assert statuses(limited_server, "198.51.101.1", 1) == [200]
    assert statuses(limited_server, "2001:db8::1", 20) == [200] * 20
    assert statuses(limited_server, "2001:db8::ffff", 1) == [429]
    assert statuses(limited_server, "2001:db8:0:1::1", 1) == [200]


def test_clients_whose_address_cannot_be_read_are_counted_together(limited_server: Server) -> None:
    """They count as the proxy, some of whose 20 requests were made when the server started."""
    assert statuses(limited_server, "unknown", 21)[-1] == 429
    assert statuses(limited_server, "hidden", 1) == [429]


def test_the_bucket_fills_again_with_time() -> None:
    rate = RateLimit(Ledger(rows=1), per_second=2, burst=3)

    def taken(now: float) -> int:
        """How many requests are admitted at this time."""
        for number in itertools.count():
            try:
                rate.count((1, 2), now)
            except TooManyRequests as exc:
                assert exc.retry_after == 1
                return number

    assert [taken(now) for now in (1000, 1000.4, 1000.5, 1001.5, 1060, 1060)] == [3, 0, 1, 2, 3, 0]


def test_a_stricter_limit_of_before_is_not_held_against_anybody() -> None:
    ledger = Ledger(rows=1)
    RateLimit(ledger, per_second=0.001, burst=1).count((1, 2), now=100)
    quick = RateLimit(ledger, per_second=10, burst=5)
    with pytest.raises(TooManyRequests):
        quick.count((1, 2), now=100)
    quick.count((1, 2), now=100.1)


class Clients:
    """Slow downloads of a large file."""

    def __init__(self, server: Server):
        self.server = server
        self.key = f"{new_folder()}/large"
        stored_by_another_program(server, self.key, os.urandom(MIB) * 32)

    def begin(self, address: str) -> Wire:
        """Begin a download, and read no further."""
        wire = Wire(self.server, receive_buffer=4096)
        wire.send(request("GET", f"/{self.key}", {"X-Forwarded-For": address}))
        assert wire.head().status == 200
        return wire

    def status(self, address: str, method: str = "GET") -> int:
        """The status of one more download."""
        with Wire(self.server, receive_buffer=4096) as wire:
            wire.send(request(method, f"/{self.key}", {"X-Forwarded-For": address}))
            return wire.head().status


@pytest.fixture(scope="module")
def clients(proxied_server: Server) -> Clients:
    """Clients of the server with a limit of four downloads at a time."""
    return Clients(proxied_server)


def test_downloads_at_a_time_are_counted_over_all_workers(clients: Clients) -> None:
    begun = [clients.begin("203.0.113.1") for _ in range(4)]
    for _ in range(4):  # any worker may accept it
        assert clients.status("203.0.113.1") == 429
    assert clients.status("203.0.113.2") == 200
    assert clients.status("203.0.113.1", "HEAD") == 200
    answer = get(clients.server, clients.key, {"X-Forwarded-For": "203.0.113.1"})
    assert_error(answer, 429, clients.server, ["4 downloads"])
    assert int(answer.headers["Retry-After"]) > 0
    begun.pop().close()
    wait_until(lambda: clients.status("203.0.113.1") == 200, SECONDS, "a free slot")
    for wire in begun:
        wire.close()


def test_a_client_at_its_limit_gets_no_small_file_either(clients: Clients) -> None:
    """It is not counted, but a client at its limit gets none."""
    assert put(clients.server, "small/file", b"x").status_code in (200, 201)
    client = {"X-Forwarded-For": "203.0.113.4"}
    begun = [clients.begin("203.0.113.4") for _ in range(4)]
    for _ in range(4):  # any worker may accept it
        assert get(clients.server, "small/file", client).status_code == 429
    assert get(clients.server, "small/file", {"X-Forwarded-For": "203.0.113.5"}).status_code == 200
    begun.pop().close()
    wait_until(
        lambda: get(clients.server, "small/file", client).status_code == 200,
        SECONDS,
        "a free slot",
    )
    assert clients.status("203.0.113.4") == 200
    for wire in begun:
        wire.close()


@pytest.mark.parametrize("kind", [CONTENT, PROPERTIES], ids=["cold", "to be checked"])
def test_a_small_file_that_has_to_be_waited_for_counts(new_bench: Callable[..., Bench], kind: str) -> None:
    bench = new_bench(limits={"downloads_per_client": 1}, cache={"revalidate_after": 1})
    key, other = bench.store(b"first"), bench.store(b"other")
    if kind == PROPERTIES:
        assert get(bench.server, key).content == b"first"
        time.sleep(1.1)
    rule = bench.proxy.inject(Hold(), kind=kind, key=key)
    waiting = in_background(get, bench.server, key)
    rule.wait_until_reached()
    for _ in range(3):  # any worker may accept it
        assert get(bench.server, other).status_code == 429
        assert get(bench.server, "").status_code == 429
    assert bench.proxy.count(CONTENT, other) == bench.proxy.count(PROPERTIES, other) == 0
    rule.release()
    assert waiting.result().content == b"first"
    wait_until(lambda: get(bench.server, other).content == b"other", SECONDS, "a free slot")


def test_a_download_that_loses_the_race_for_the_last_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both downloads pass the first check while one is free; then both count as running, and one is refused."""
    server = Server(tmp_path, {"limits": {"downloads_per_client": 1}})
    stored_by_another_program(server, "large", os.urandom(MIB))
    server.config_path.write_text(toml(server.document))
    client = Client(middleware(NotFound(), build_services(load(server.config_path, {}))))
    one, other = ({"REMOTE_ADDR": f"192.0.2.{n}"} for n in (1, 2))
    monkeypatch.setattr(DownloadLimit, "check", lambda *_: None)
    for path in ("/large", "/v1/list"):
        with client.get("/large", environ_base=one, buffered=False) as first:
            assert first.status_code == 200
            refused = client.get(path, environ_base=one)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
            assert b"no more than 1 download" in refused.data
            assert client.get(path, environ_base=other, buffered=True).status_code in (200, 404)


def test_an_ended_download_is_not_counted(clients: Clients) -> None:
    """However the download ended."""
    client = {"X-Forwarded-For": "203.0.113.9"}
    for _ in range(6):
        assert put(clients.server, "a/b", b"x", X_Forwarded_For="203.0.113.9").status_code in (200, 201)
        for path, status in (("a/b", 200), ("a/c", 404), ("a/", 200), ("v1/list", 200), ("metrics", 200)):
            assert get(clients.server, path, client).status_code == status


def test_a_worker_that_is_killed_takes_its_counts_along(clients: Clients) -> None:
    server = clients.server
    server.expected_errors.append("SIGKILL")
    begun = [clients.begin("203.0.113.3") for _ in range(4)]
    assert clients.status("203.0.113.3") == 429
    old = server.worker_pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(set(server.worker_pids()) - set(old)) == 2, SECONDS, "new workers")
    again = [clients.begin("203.0.113.3") for _ in range(4)]
    assert clients.status("203.0.113.3") == 429
    for wire in begun + again:
        wire.close()


def test_clients_that_share_a_cell_are_counted_apart() -> None:
    """Two clients that share one cell do not share the other one."""
    ledger = Ledger(rows=1)
    assert len({ledger.cells(f"192.0.2.{number}/32") for number in range(100)}) == 100
    ledger.begin((1, 2))
    ledger.begin((1, 2))
    ledger.begin((2, 3))
    assert not ledger.has_more_than((2, 3), 1)
    assert ledger.has_more_than((1, 2), 1)


def test_rows_of_dead_workers_are_used_again() -> None:
    ledger = Ledger(rows=2)
    for worker in (0, 1):
        ledger.assign(worker)
        ledger.take(worker)
        ledger.begin((1, 2))
    assert ledger.has_more_than((1, 2), 1)
    ledger.release(0)
    assert not ledger.has_more_than((1, 2), 1)
    ledger.assign(0)
    ledger.take(0)
    ledger.begin((1, 2))
    assert ledger.has_more_than((1, 2), 1)
    ledger.release(0)
    ledger.release(1)
    assert not ledger.has_more_than((1, 2), 0)


def test_a_worker_without_a_row_counts_only_its_own_downloads() -> None:
    """Two workers that wrote the same row would lose counts, or count below zero."""
    ledger = Ledger(rows=2)
    for worker in (1, 2):
        ledger.assign(worker)
        ledger.take(worker)
        ledger.begin((1, 2))
    assert ledger.has_more_than((1, 2), 1)  # as the last one sees it
    ledger.end((1, 2))
    assert ledger.has_more_than((1, 2), 0)
    assert not ledger.has_more_than((1, 2), 1)
    ledger.release(2)
    assert ledger.has_more_than((1, 2), 0)
    ledger.release(1)
    assert not ledger.has_more_than((1, 2), 0)


def test_nothing_counts_below_zero() -> None:
    """A worker whose row was cleared, and given to another worker, has nothing more to subtract."""
    ledger = Ledger(rows=1)
    ledger.assign(0)
    ledger.take(0)
    ledger.begin((1, 2))
    ledger.release(0)
    ledger.assign(0)
    ledger.take(0)
    ledger.end((1, 2))
    assert not ledger.has_more_than((1, 2), 0)
    for _ in range(3):
        ledger.end((1, 1))
    ledger.begin((1, 2))
    assert ledger.has_more_than((1, 2), 0)
    assert not ledger.has_more_than((1, 2), 1)


def test_the_counts_are_right_after_a_process_has_died() -> None:
    """Processes that begin and end downloads are killed at any point in between."""
    ledger = Ledger(rows=2)
    for round_number in range(40):
        ledger.assign(0)
        worker = os.fork()
        if worker == 0:
            ledger.take(0)
            while True:
                ledger.begin((1, 2))
                ledger.begin((3, 2))
                ledger.end((1, 2))
                ledger.end((3, 2))
        time.sleep(round_number / 10_000)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        ledger.release(0)
        assert not any(ledger.has_more_than(cells, 0) for cells in ((1, 2), (3, 2)))
        ledger.end((1, 2))  # of a process that shares the memory, whichever has that row now
    ledger.begin((1, 2))
    assert ledger.has_more_than((1, 2), 0)
