# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directory pages and files in a real browser."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser

import kci_storage
from tests.support.chromium import PHONE, Visit, is_installed, running_chromium
from tests.support.faultproxy import Cut, FaultProxy
from tests.support.harness import Server, running
from tests.support.wire import put
from tools import screenshots

pytestmark = pytest.mark.skipif(not is_installed(), reason="Chromium is not installed: apt-get install chromium")

MIB = 1 << 20
ROOT = Path(kci_storage.__file__).parent.parent
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)<&amp;.txt"
LONG = f"{'long-' * 40}name.tar.gz"
LOG = "[    0.000000] Booting Linux – ä 文 <b>\n" * 50
KERNEL = bytes(range(256)) * (2 * MIB // 256)
FILES = {
    "build/v6.9/Image": b"old",
    "build/v6.10/Image": KERNEL,
    "build/v6.10/build.log": LOG.encode(),
    "build/v6.10/build.log.gz": gzip.compress(LOG.encode()),
    "build/v6.10/dtbs/sm8250.dtb": b"dtb",
    "build/v6.10/job-2/lava.log": b"2",
    "build/v6.10/job-10/lava.log": b"10",
    "build/v6.10/lava-7.log": b"lava",
    "build/v6.10/modules.tar.xz": b"modules",
    f"strange/{MARKUP}": b"harmless",
    "strange/<b>bold<b>/a": b"a",
    "strange/a  b%41#?ü.txt": b"text",
    f"strange/{LONG}": b"long",
}
MANY = 1_200


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests; each visit has its own profile."""
    with running_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with some files."""
    with running(Server(tmp_path_factory.mktemp("site"), {"driver": "local"})) as server:
        for key, content in FILES.items():
            assert put(server, quote(key), content).status_code == 201
        folder = server.storage_path / "many"
        folder.mkdir()
        for number in range(MANY):
            (folder / f"{number}.log").touch()
        yield server


@pytest.fixture
def visit(browser: Browser, site: Server) -> Iterator[Callable[..., Visit]]:
    """Begins a visit, during which the browser must report no error."""
    visits: list[Visit] = []

    def begin(url: str = site.url, **settings: object) -> Visit:
        visits.append(Visit(browser, url, **settings))
        return visits[-1]

    yield begin
    for each in visits:
        each.close()
        assert each.unexpected() == []


def test_folders_are_walked_through_by_clicking(visit):
    visitor = visit()
    page = visitor.page
    page.goto("/v1/browse/")
    assert visitor.names() == ["build/", "many/", "strange/"]
    page.get_by_role("link", name="build/", exact=True).click()
    page.get_by_role("link", name="v6.10/").click()
    page.wait_for_url("**/build/v6.10/")
    assert visitor.names() == [
        "../", "dtbs/", "job-2/", "job-10/", "build.log", "build.log.gz", "Image", "lava-7.log", "modules.tar.xz"
    ]  # fmt: skip
    assert page.get_by_role("navigation").inner_text().split() == ["Files", "build", "v6.10"]
    page.get_by_role("link", name="dtbs/").click()
    page.get_by_role("navigation").get_by_role("link", name="build", exact=True).click()
    page.wait_for_url("**/build/")
    page.get_by_role("link", name="../").click()
    page.wait_for_url("**/v1/browse/")


def test_a_page_loads_nothing_else(visit, site):
    visitor = visit()
    visitor.page.goto("/build/v6.10/")
    visitor.page.wait_for_load_state("networkidle")
    assert [url for url in visitor.asked if not url.startswith("data:")] == [f"{site.url}/build/v6.10/"]


def test_a_file_is_downloaded_by_a_click(visit, tmp_path):
    page = visit().page
    page.goto("/build/v6.10/")
    with page.expect_download() as download:
        page.get_by_role("link", name="Image", exact=True).click()
    assert download.value.suggested_filename == "Image"
    download.value.save_as(tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == KERNEL


def test_a_download_that_is_cut_off_is_resumed(visit, site, tmp_path):
    """What the browser does by itself when a connection ends too early: it asks for the rest of that version.

    A key of the proxy is what follows the second slash.
    """
    proxy = FaultProxy(site.url)
    try:
        rule = proxy.inject(Cut(after=MIB), key="Image", times=1)
        page = visit(proxy.endpoint).page
        page.goto("/build/v6.10/")
        with page.expect_download() as download:
            page.get_by_role("link", name="Image", exact=True).click()
        download.value.save_as(tmp_path / "saved")
        assert rule.hits == 1
        first, second = (request for request in proxy.requests if request.key == "Image")
    finally:
        proxy.close()
    assert (tmp_path / "saved").read_bytes() == KERNEL
    assert (first.start, first.body_bytes) == (0, MIB)
    assert 0 < second.start <= MIB, "it was asked for from the start again"
    assert second.body_bytes == len(KERNEL) - second.start


def test_names_full_of_markup_are_text(visit, tmp_path):
    visitor = visit()
    page = visitor.page
    page.goto("/strange/")
    assert visitor.names()[1:] == ["<b>bold<b>/", MARKUP, "a  b%41#?ü.txt", LONG]
    assert page.locator("img, b, body script:not(:last-child)").count() == 0
    page.get_by_role("link", name=MARKUP).click()
    assert page.inner_text("pre") == "harmless"
    page.go_back()
    page.get_by_role("link", name="<b>bold<b>/").click()
    page.wait_for_url("**/%3Cb%3Ebold%3Cb%3E/")
    assert page.get_by_role("heading").inner_text() == "<b>bold<b>"
    assert page.title() == "strange/<b>bold<b>/"


def test_the_policy_blocks_scripts_that_are_not_the_page_s_own(visit):
    """The script is inserted as if a file's name had got into the page as markup."""
    visitor = visit()
    visitor.page.goto("/strange/")
    with visitor.page.expect_console_message(lambda message: "script-src" in message.text):
        visitor.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=alert(1)>')")
    visitor.expected = "Content Security Policy"


def test_a_filter_narrows_the_page(visit):
    visitor = visit()
    page = visitor.page
    page.goto("/build/v6.10/")
    everything = visitor.names()
    summary = page.get_by_role("status")
    whole = summary.inner_text()
    assert whole.startswith("3 folders · 5 files · 2.0 MiB")
    page.keyboard.press("/")
    page.keyboard.type("LOG gz")
    assert visitor.names() == ["../", "build.log.gz"]
    assert summary.inner_text() == "1 of 8 shown"
    page.get_by_role("link", name="read").click()
    page.wait_for_url("**?view=1")
    page.go_back()
    assert visitor.names() == ["../", "build.log.gz"], "Back forgets what was typed"
    page.get_by_role("searchbox").press("Escape")
    assert visitor.names() == everything
    assert summary.inner_text() == whole


def test_a_compressed_log_is_read_in_the_browser(visit):
    page = visit().page
    page.goto("/build/v6.10/")
    page.get_by_role("link", name="read build.log.gz").click()
    page.wait_for_url("**/build.log.gz?view=1")
    assert page.inner_text("pre") == LOG
    assert page.evaluate("[document.contentType, document.characterSet]") == ["text/plain", "UTF-8"]


def test_a_log_is_read_in_the_browser(visit):
    page = visit().page
    page.goto("/build/v6.10/")
    page.get_by_role("link", name="build.log", exact=True).click()
    assert page.inner_text("pre") == LOG


def test_a_compressed_log_is_saved_as_it_is_by_its_own_link(visit, tmp_path):
    page = visit().page
    page.goto("/build/v6.10/")
    with page.expect_download() as download:
        page.get_by_role("link", name="build.log.gz", exact=True).click()
    assert download.value.suggested_filename == "build.log.gz"
    assert Path(download.value.path()).read_bytes() == FILES["build/v6.10/build.log.gz"]


BRIGHTNESS = """(name) => {
    const [red, green, blue] = getComputedStyle(document.body)[name].match(/[0-9]+/g).map(Number);
    return (red + green + blue) / 3;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_browser_s_colours(visit, scheme):
    page = visit(color_scheme=scheme).page
    page.goto("/build/v6.10/")
    back, text = (page.evaluate(BRIGHTNESS, name) for name in ("backgroundColor", "color"))
    assert (back < 64 and text > 192) if scheme == "dark" else (back > 192 and text < 64)


@pytest.mark.parametrize("path", ["/v1/browse/", "/build/v6.10/", "/strange/", "/many/"])
@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_the_page_without_scrolling_sideways(visit, path, width):
    visitor = visit(viewport={**PHONE, "width": width}, is_mobile=True, has_touch=True)
    visitor.page.goto(path)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") == width
    outside = visitor.page.evaluate(
        "[...document.querySelectorAll('a, td, input, h1')].filter(e => e.getBoundingClientRect().right > innerWidth)"
        ".length"
    )
    assert outside == 0


def test_a_finger_hits_the_whole_row_on_a_phone(visit):
    page = visit(viewport=PHONE, is_mobile=True, has_touch=True).page
    page.goto("/build/v6.10/")
    row = page.get_by_role("row").or_(page.locator("tr")).filter(has_text="lava-7.log").bounding_box()
    assert row["height"] >= 44
    page.touchscreen.tap(row["x"] + row["width"] - 5, row["y"] + row["height"] - 5)
    page.wait_for_url("**/lava-7.log")
    page.go_back()
    page.get_by_role("link", name="read").tap()
    page.wait_for_url("**/build.log.gz?view=1")


def test_without_scripts_everything_but_the_filter_is_there(visit):
    visitor = visit(java_script_enabled=False)
    page = visitor.page
    page.goto("/v1/browse/")
    assert page.locator("#filter").is_hidden()
    page.get_by_role("link", name="many/").click()
    page.wait_for_url("**/many/")  # all of it: rows are shown as they arrive
    seen = visitor.names()[1:]
    assert len(seen) == 1_000
    assert seen == sorted(seen, key=lambda name: int(name[:-4])), "numbers are in natural order"
    page.get_by_role("link", name="Next page").click()
    page.wait_for_url(re.compile("marker="))
    seen += visitor.names()[1:]
    assert sorted(seen) == sorted(f"{number}.log" for number in range(MANY))
    page.get_by_role("link", name="First page").click()
    page.wait_for_url("**/many/")


FETCH = """async ([url, headers]) => {
    const answer = await fetch(url, {headers, cache: "no-store"}); // else it makes a 206 of what it has
    await answer.arrayBuffer();
    const names = ["ETag", "Content-Range", "X-Cache", "Repr-Digest", "X-Request-ID"];
    return [answer.status, ...names.map((name) => answer.headers.get(name) !== null)];
}"""


def test_scripts_of_other_sites_may_read_every_response(visit, site):
    """The page's origin is localhost, the file's is 127.0.0.1."""
    visitor = visit(site.url.replace("127.0.0.1", "localhost"))
    page = visitor.page
    page.goto("/build/v6.10/build.log")
    image = f"{site.url}/build/v6.10/Image"
    tag = page.evaluate("async (url) => (await fetch(url)).headers.get('ETag')", image)

    def fetched(url: str, **headers: str) -> list[object]:
        return page.evaluate(FETCH, [url, {name.replace("_", "-"): value for name, value in headers.items()}])

    assert fetched(image) == [200, True, False, True, True, True]
    assert fetched(image, Range="bytes=0-9") == [206, True, True, True, True, True]
    assert fetched(image, If_None_Match=tag) == [304, True, False, True, False, True]
    assert fetched(image, Range="bytes=9999999-") == [416, True, True, True, False, True]
    assert fetched(f"{image}-not") == [404, False, False, False, False, True]
    assert fetched(f"{site.url}/build/") == [200, False, False, False, False, True]
    visitor.expected = "status of 4(04|16)"


def test_what_is_not_there_is_said_in_words(visit):
    visitor = visit()
    for path, words in (("/nothing/", "no such folder"), ("/build/nothing", "no such file")):
        answer = visitor.page.goto(path)
        assert answer.status == 404
        assert visitor.page.inner_text("p >> nth=0").strip().startswith(words)
    visitor.expected = "status of 404"


@pytest.mark.skipif(shutil.which("pngquant") is None, reason="pngquant is not installed: apt-get install pngquant")
def test_the_pictures_in_the_docs_can_be_taken_again(browser, site, tmp_path):
    picture = screenshots.Picture("build", "/build/v6.10/", typed="log")
    screenshots.take(browser, site.url, picture, tmp_path / "build.png")
    assert (tmp_path / "build.png").read_bytes().startswith(b"\x89PNG")
    kept = {path.stem: path.stat().st_size for path in (ROOT / "docs/pictures").glob("directory*")}
    assert set(kept) == {picture.name for picture in screenshots.PICTURES}
    assert max(kept.values()) <= 150 * 1024
