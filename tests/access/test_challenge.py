# SPDX-License-Identifier: LGPL-2.1-or-later
"""The browser challenge: a browser gets a file once it has run a page's script (docs/access.md)."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import re
import signal
import time
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from playwright.sync_api import Browser

from kci_storage.access.challenge import Challenge
from kci_storage.config.settings import DownloadChallengeConfig
from tests.deploy.nginx import nginx
from tests.support.chromium import Visit, is_installed, running_chromium
from tests.support.harness import Server, running, toml, wait_until
from tests.support.wire import SECONDS, access, get, put

SECRET = "s" * 32
BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
CURL = "curl/8.14.1"
KEY = "lab/a b/<i>Image.bin"
CONTENT = bytes(range(256)) * 4096
LOG = "Booting\n"
RATE = 500_000  # bytes per second
ASK = "/v1/download-challenge"
SETTINGS = {
    "user_agents": ["mozilla"],
    "secret": SECRET,
    "secure_cookie": False,
    "fallback_bytes_per_second": RATE,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server behind a proxy, so that a test can send requests from any address."""
    document = {"server": {"trusted_proxies": 1}, "download_challenge": SETTINGS}
    with running(Server(tmp_path_factory.mktemp("site"), document)) as server:
        assert put(server, quote(KEY), CONTENT).status_code == 201
        assert put(server, "lab/boot.log.gz", gzip.compress(LOG.encode())).status_code == 201
        yield server


def ask(server: Server, path: str = quote(KEY), agent: str = BROWSER, **headers: str) -> requests.Response:
    return get(server, path, {"User-Agent": agent, **named(headers)})


def solve(server: Server, **headers: str) -> requests.Response:
    return requests.post(server.url + ASK, headers={"User-Agent": BROWSER, **named(headers)}, timeout=SECONDS)


def named(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): text for name, text in headers.items()}


def cookie(answer: requests.Response) -> str:
    return answer.headers["Set-Cookie"].partition(";")[0]


# Over HTTP


def test_a_browser_gets_a_page_instead_of_the_file(site):
    answer = ask(site)
    assert answer.status_code == 403
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert len(answer.content) < 8192
    assert "ETag" not in answer.headers
    assert access(site, answer)["status"] == "403"


def test_the_page_is_no_part_of_a_file(site):
    """A download that is resumed with an expired cookie must not append the page."""
    assert ask(site, Range="bytes=1000-").status_code == 403
    etag = ask(site, agent=CURL).headers["ETag"]
    assert ask(site, Range="bytes=1000-", If_Range=etag).status_code == 403
    assert ask(site, If_None_Match=etag).status_code == 403


def test_head_gets_the_head_of_the_page(site):
    answer = requests.head(f"{site.url}/{quote(KEY)}", headers={"User-Agent": BROWSER}, timeout=SECONDS)
    assert (answer.status_code, answer.content) == (403, b"")
    assert answer.headers["Content-Length"] == str(len(ask(site).content))


@pytest.mark.parametrize("agent", [CURL, "python-requests/2.32", ""])
def test_other_programs_are_not_asked(site, agent):
    assert ask(site, agent=agent).content == CONTENT


@pytest.mark.parametrize(
    ("path", "status"),
    [("", 200), ("lab/", 200), ("v1/browse/", 200), ("v1/health", 200), ("robots.txt", 200), ("favicon.ico", 200)],
)
def test_what_is_no_download_needs_no_cookie(site, path, status):
    assert ask(site, path).status_code == status


def test_a_browser_may_upload(site):
    assert put(site, "lab/by-hand", b"1", **{"User-Agent": BROWSER}).status_code == 201


def test_the_cookie_lets_a_browser_in(site):
    answer = solve(site)
    assert (answer.status_code, answer.content, answer.headers["Cache-Control"]) == (204, b"", "no-store")
    attributes = answer.headers["Set-Cookie"].split("; ")[1:]
    assert attributes == ["Max-Age=600", "Path=/", "HttpOnly", "SameSite=Lax"]
    let_in = ask(site, Cookie=f"theme=dark; {cookie(answer)}; x")
    assert (let_in.status_code, let_in.content) == (200, CONTENT)
    assert "X-Accel-Limit-Rate" not in let_in.headers
    assert ask(site, Cookie=cookie(answer), Range="bytes=0-9").content == CONTENT[:10]


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [
        ("198.51.100.7", "198.51.100.200", True),
        ("198.51.100.7", "::ffff:198.51.100.9", True),
        ("198.51.100.7", "198.51.101.7", False),
        ("2001:db8:0:1::7", "2001:db8:0:1:ffff::1", True),
        ("2001:db8:0:1::7", "2001:db8:0:2::7", False),
    ],
)
def test_the_cookie_is_good_in_the_network_that_it_was_made_for(site, here, there, same):
    got = cookie(solve(site, X_Forwarded_For=here))
    assert ask(site, Cookie=got, X_Forwarded_For=there).status_code == (200 if same else 403)


def changed(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


@pytest.mark.parametrize(
    "spoil",
    [
        changed,
        lambda text: text.replace("=1", "=2", 1),
        lambda text: text.replace("=", "=0", 1),
        lambda text: text.replace("kci_storage_download", "kci_storage_downloads"),
        lambda text: text.partition(".")[0],
        lambda text: text.partition(".")[0] + ".",
        lambda text: "kci_storage_download=",
        lambda text: f"kci_storage_download={'9' * 5000}.{'a' * 64}",
        lambda text: "kci_storage_download=\xb2.\xe4",
    ],
    ids=["signature", "time", "zeros", "name", "unsigned", "empty-signature", "empty", "long", "not-ascii"],
)
def test_another_cookie_does_not(site, spoil):
    assert ask(site, Cookie=spoil(cookie(solve(site)))).status_code == 403


def test_a_cookie_ends_with_its_time(monkeypatch):
    challenge = Challenge(DownloadChallengeConfig(("Mozilla",), SECRET, cookie_ttl_seconds=30))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    got = challenge.set_cookie("192.0.2.1").partition(";")[0]
    for later, good in ((0, True), (28, True), (31, False), (-10, False)):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        assert challenge.has_passed(got, "192.0.2.1") is good, later


def test_a_cookie_of_another_secret_is_none():
    challenges = [Challenge(DownloadChallengeConfig(("Mozilla",), secret * 32)) for secret in "ab"]
    got = challenges[0].set_cookie("192.0.2.1").partition(";")[0]
    assert [challenge.has_passed(got, "192.0.2.1") for challenge in challenges] == [True, False]


def test_a_secure_cookie_says_so():
    assert Challenge(DownloadChallengeConfig(("x",), SECRET)).set_cookie("").endswith("; SameSite=Lax; Secure")


def test_without_a_script_the_file_comes_at_a_limited_rate(site):
    page = ask(site, f"{quote(KEY)}?a=%22%3Cb&view=1").text
    (link,) = re.findall(r'<p id="fallback"><a href="([^"]*)"', page)
    assert unescape(link) == "?a=%22%3Cb&view=1&challenge_fallback=1"
    answer = ask(site, f"{quote(KEY)}{unescape(link)}")
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["X-Accel-Limit-Rate"] == str(RATE)
    assert ask(site, f"{quote(KEY)}?challenge_fallback=0").status_code == 403
    assert "X-Accel-Limit-Rate" not in ask(site, f"{quote(KEY)}?challenge_fallback=1", agent=CURL).headers
    missing = ask(site, "lab/missing?challenge_fallback=1")
    assert (missing.status_code, missing.headers["X-Accel-Limit-Rate"]) == (404, str(RATE))


def test_an_address_full_of_markup_is_text_in_the_page(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=SECONDS)  # sends it as it stands
    with contextlib.closing(connection):
        connection.request("GET", '/<b>"/a?"><b>', headers={"User-Agent": BROWSER})
        page = connection.getresponse().read().decode()
    assert 'href="?&quot;&gt;&lt;b&gt;&amp;challenge_fallback=1"' in page
    assert 'href="/%3Cb%3E%22/"' in page
    assert "<b>" not in page


def test_the_metric_counts_what_became_of_them(site):
    def counts() -> dict[str, float]:
        page = get(site, "metrics", {"User-Agent": CURL}).text
        found = re.findall(r'kci_storage_challenges_total{result="(\w+)"} (\S+)', page)
        return {result: float(value) for result, value in found}

    before = counts()
    got = cookie(solve(site))
    ask(site)
    ask(site)
    ask(site, Cookie=got)
    ask(site, f"{quote(KEY)}?challenge_fallback=1")
    more = {name: value - before[name] for name, value in counts().items()}
    assert more == {"shown": 2, "solved": 1, "passed": 1, "slowed": 1}


def test_without_a_fallback_there_is_none_and_without_a_challenge_no_cookie(start_server):
    settings = {**SETTINGS, "fallback_bytes_per_second": 0}
    server = start_server(server={"workers": 1}, download_challenge=settings)
    put(server, "a", b"1")
    assert "Download slowly" not in ask(server, "a").text
    assert ask(server, "a?challenge_fallback=1").status_code == 403
    server.document["download_challenge"] = {}
    server.config_path.write_text(toml(server.document))
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: ask(server, "a").content == b"1", SECONDS, "the new configuration")
    wait_until(lambda: solve(server).status_code == 404, SECONDS, "the end of the worker that had the old one")


def test_nginx_limits_the_rate_and_hides_its_header(start_server, tmp_path):
    document = {"trusted_proxies": 1, "accel_redirect": "/_cache/"}
    server = start_server("azure", server=document, download_challenge=SETTINGS)
    answer = put(server, quote(KEY), CONTENT)
    with nginx(tmp_path, server) as frontend:
        for sent_by_server in ({}, {"If-Unmodified-Since": answer.headers["Date"]}):  # and by nginx itself
            begun = time.monotonic()
            answer = ask(frontend, f"{quote(KEY)}?challenge_fallback=1", **sent_by_server)
            took = time.monotonic() - begun
            assert answer.content == CONTENT
            assert "X-Accel-Limit-Rate" not in answer.headers
            assert took > 1.5, f"{len(CONTENT)} bytes came faster than they may"
        fast = ask(frontend, Cookie=cookie(solve(frontend)))
        assert fast.content == CONTENT


# In a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not is_installed():
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser, site: Server) -> Iterator[Callable[..., Visit]]:
    """Begins a visit, during which the browser must report nothing but the page's own status."""
    visits: list[Visit] = []

    def begin(**settings: object) -> Visit:
        visits.append(Visit(browser, site.url, **settings))
        visits[-1].expected = "status of 403"
        return visits[-1]

    yield begin
    for each in visits:
        each.close()
        assert each.unexpected() == []


def test_a_browser_solves_it_and_saves_the_file(visit, tmp_path):
    visitor = visit()
    page = visitor.page
    page.goto("/lab/a b/")
    with page.expect_download() as download:
        page.get_by_role("link", name="<i>Image.bin").click()
    assert Path(download.value.path()).read_bytes() == CONTENT
    assert download.value.suggested_filename == "_i_Image.bin"
    assert page.get_by_role("status").inner_text() == "Your file comes now."
    page.get_by_role("link", name="All files of this folder").click()  # the page is still there
    page.wait_for_url("**/lab/a%20b/")
    with page.expect_download() as download:
        page.get_by_role("link", name="<i>Image.bin").click()
    assert Path(download.value.path()).read_bytes() == CONTENT
    assert sum(url.endswith(ASK) for url in visitor.asked) == 1, "the cookie lasts"


def test_a_browser_solves_it_and_shows_a_text(visit):
    page = visit().page
    page.goto("/lab/boot.log.gz?view=1")
    page.wait_for_selector("pre")
    assert page.inner_text("pre") == LOG


def test_a_browser_that_keeps_no_cookies_is_told_so_and_does_not_go_round_in_circles(visit):
    visitor = visit()
    page = visitor.page
    page.route(f"**{ASK}", lambda route: route.fulfill(status=204))
    page.goto("/lab/boot.log.gz?view=1")
    page.get_by_text("does not keep the cookie").wait_for()
    assert sum(url.endswith(ASK) for url in visitor.asked) == 1


def test_a_browser_without_scripts_is_shown_the_slow_way(visit):
    page = visit(java_script_enabled=False).page
    page.goto(f"/{quote(KEY)}")
    assert page.get_by_role("status").inner_text().startswith("The check needs JavaScript")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download slowly").click()
    assert Path(download.value.path()).read_bytes() == CONTENT
