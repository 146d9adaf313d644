"""Directory pages: one level of the store, for people and for programs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
import requests

from kci_storage.directory import Directory, Folder
from kci_storage.sizes import readable_size

MARKUP = '<img src=x onerror="alert(1)">&amp;.txt'
FILES = (
    "pages/v6.9/Image",
    "pages/v6.10/Image",
    "pages/v6.10/dtbs/a.dtb",
    "pages/build-2.log",
    "pages/build-10.log",
    f"pages/{MARKUP}",
    "pages/späce d/文 %41#?.bin",
)


class Links(HTMLParser):
    """The links of a page, by their text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, str] = {}
        self._url: str | None = None
        self._text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("img", "script"), "a name became markup"
        if tag == "a":
            self._url, self._text = dict(attrs)["href"], ""

    def handle_data(self, data):
        self._text += data

    def handle_endtag(self, tag):
        if tag == "a":
            self.found[self._text] = self._url


def put(server, key: str) -> None:
    url = f"{server.url}/{requests.utils.quote(key, safe='/')}"
    response = requests.put(url, data=b"12345", headers=server.headers("a@example.com"), timeout=30)
    assert response.status_code in (200, 201), response.text


@pytest.fixture
def stored(server):
    for key in FILES:
        put(server, key)
    return server


def get(server, path: str, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=30)


def test_one_level_is_listed_folders_first_in_natural_order(stored):
    page = get(stored, "/pages/", Accept="application/json").json()
    assert page["path"] == "pages/"
    assert [folder["name"] for folder in page["folders"]] == ["späce d/", "v6.9/", "v6.10/"]
    assert [file["name"] for file in page["files"]] == [MARKUP, "build-2.log", "build-10.log"]
    assert page["next"] is None


def test_json_says_of_a_file_what_its_download_says(stored):
    file = get(stored, "/pages/v6.9/", Accept="application/json").json()["files"][0]
    download = get(stored, file["url"])
    assert file["path"] == "pages/v6.9/Image"
    assert file["size"] == len(download.content) == 5
    assert file["etag"] == download.headers["ETag"]
    assert file["last_modified"] == download.headers["Last-Modified"]


def test_html_links_lead_everywhere_and_back(stored):
    response = get(stored, "/pages/")
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    links = Links(response.text).found
    assert links["../"] == "/v1/browse/"
    assert get(stored, links["build-10.log"]).content == b"12345"
    assert get(stored, links[MARKUP]).content == b"12345"
    below = Links(get(stored, links["späce d/"]).text).found
    assert get(stored, below["文 %41#?.bin"]).content == b"12345"
    assert below["../"] == "/pages/"


def test_html_shows_sizes_and_dates(stored):
    page = get(stored, "/pages/").text
    assert '<td class="size" title="5 bytes">5 B</td>' in page
    assert re.search(r'<time datetime="\d{4}-\d\d-\d\dT\d\d:\d\dZ">\d{4}-\d\d-\d\d \d\d:\d\d</time>', page)


def test_the_top_level_has_a_page_of_its_own(stored):
    assert get(stored, "/").text == "KernelCI Proxy Server"
    page = get(stored, "/v1/browse/", Accept="application/json").json()
    assert page["path"] == ""
    assert {"name": "pages/", "path": "pages/", "url": "/pages/"} in page["folders"]
    assert "../" not in Links(get(stored, "/v1/browse/").text).found


@pytest.mark.parametrize(
    "path", ["/nothing/", "/pages/build-2.log/", "/.kci/", "/v1/", "/pages//", "/%2e%2e/", "/a%00/"]
)
def test_what_is_no_folder_is_not_found(stored, path):
    with requests.Session() as session:
        request = requests.Request("GET", stored.url + "/").prepare()
        request.url = stored.url + path  # as it stands, not normalised
        response = session.send(request, timeout=30)
    assert response.status_code == 404


def test_many_files_come_in_pages_that_together_are_all(local_server):
    folder = local_server.storage_path / "many"
    folder.mkdir(parents=True)
    names = {f"file-{number}" for number in range(2_300)}
    for name in names:
        (folder / name).touch()
    url, seen, pages = "/many/", [], 0
    while url:
        page = get(local_server, url, Accept="application/json").json()
        assert len(page["files"]) <= 1_000
        seen += [file["name"] for file in page["files"]]
        url, pages = page["next"], pages + 1
    assert pages == 3
    assert sorted(seen) == sorted(names)
    assert Links(get(local_server, "/many/").text).found["more files"].startswith("/many/?marker=")


def test_head_is_get_without_the_page(stored):
    head, page = requests.head(f"{stored.url}/pages/", timeout=30), get(stored, "/pages/")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["Content-Length"] == page.headers["Content-Length"]


def test_the_way_up_is_known():
    directory = Directory("a/b/c/", [], [], None)
    assert directory.ancestors == [Folder("a/"), Folder("a/b/"), Folder("a/b/c/")]
    assert directory.parent_url == "/a/b/"
    assert unquote(Directory("a/", [], [], None).parent_url) == "/v1/browse/"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10**9, "953.7 MiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_are_readable(size, text):
    assert readable_size(size) == text
