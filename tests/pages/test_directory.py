# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directory pages: one folder of the store, as HTML and as JSON."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from email.utils import parsedate_to_datetime
from html.parser import HTMLParser
from urllib.parse import quote, unquote

import pytest
import requests

from kci_storage.blueprints.browse import MARKS
from kci_storage.http.sizes import readable_size
from kci_storage.pages.directory import Directory, Folder
from kci_storage.pages.kinds import Kind, mark
from tests.support.faultproxy import fault_proxy
from tests.support.wire import SECONDS

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
    """The links of a page, by their text, or by what a screen reader says instead; and its tags in their order."""

    def __init__(self, page: str):
        super().__init__()
        self.found: dict[str, str] = {}
        self.tags: list[str] = []
        self._url: str | None = None
        self._label: str | None = None
        self._text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "a":
            self._label, self._url, self._text = dict(attrs).get("aria-label"), dict(attrs)["href"], ""

    def handle_data(self, data):
        self._text += data

    def handle_endtag(self, tag):
        if tag == "a":
            self.found[self._label or self._text] = self._url


def put(server, key: str) -> None:
    url = f"{server.url}/{quote(key)}"
    response = requests.put(url, data=b"12345", headers=server.headers("a@example.com"), timeout=SECONDS)
    assert response.status_code in (200, 201), response.text


@pytest.fixture
def stored(server):
    for key in FILES:
        put(server, key)
    return server


def get(server, path: str, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=SECONDS)


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
    links = Links(response.text).found
    assert links["../"] == "/v1/browse/"
    assert get(stored, links["build-10.log"]).content == b"12345"
    assert get(stored, links[MARKUP]).content == b"12345"
    below = Links(get(stored, links["späce d/"]).text).found
    assert get(stored, below["文 %41#?.bin"]).content == b"12345"
    assert below["../"] == "/pages/"


def test_html_shows_sizes_and_dates_and_exactly_what_they_are_on_hover(stored):
    page = get(stored, "/pages/").text
    assert '<td class="size" title="5 bytes">5 B</td>' in page
    (date, *_) = re.findall(r'<time datetime="(.*?)Z" title="(.*?) UTC">(.*?)</time>', page)
    listed = get(stored, "/pages/", Accept="application/json").json()["files"][0]
    changed = time.gmtime(parsedate_to_datetime(listed["last_modified"]).timestamp())
    assert date == tuple(time.strftime(form, changed) for form in ("%Y-%m-%dT%H:%M:%S", "%F %T", "%F %H:%M"))


def test_compressed_texts_and_nothing_else_can_be_read_from_the_page(server):
    for name in ("boot.log.gz", "results.json.gz", "boot.log", "Image.gz", "page.html.gz", "modules.tar.gz"):
        put(server, f"reading/{name}")
    links = Links(get(server, "/reading/").text).found
    assert {text: url for text, url in links.items() if text.startswith("read ")} == {
        "read boot.log.gz": "/reading/boot.log.gz?view=1",
        "read results.json.gz": "/reading/results.json.gz?view=1",
    }


def test_nothing_but_the_page_s_own_style_and_script_is_allowed(stored):
    response = get(stored, "/pages/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert Links(response.text).tags.count("script") == 1
    assert "img" not in Links(response.text).tags


def test_a_page_is_sent_compressed_to_whoever_understands_that(stored):
    plain = get(stored, "/pages/", **{"Accept-Encoding": "identity"})
    small = get(stored, "/pages/", **{"Accept-Encoding": "gzip"})
    unwanted = get(stored, "/pages/", **{"Accept-Encoding": "gzip;q=0, br"})
    assert "Content-Encoding" not in {*plain.headers, *unwanted.headers}
    assert small.headers["Content-Encoding"] == "gzip"
    assert int(small.headers["Content-Length"]) < int(plain.headers["Content-Length"]) / 2
    assert plain.text == small.text == unwanted.text
    assert small.headers["Vary"] == "Accept, Accept-Encoding"


def test_a_page_costs_azure_one_listing(azurite, start_server):
    with fault_proxy(azurite) as proxy:
        server = start_server("azure", server={"workers": 1}, azure={"endpoint": proxy.endpoint})
        for key in ("a/1.log", "a/2.log", "a/b/3.log", "a/b/c/4.log"):
            put(server, key)
        before = len(proxy.requests)
        assert get(server, "/a/", Accept="application/json").json()["folders"]
        asked = [request.operation for request in proxy.requests[before:]]
    assert asked == ["GET list"]


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
        response = session.send(request, timeout=SECONDS)
    assert response.status_code == 404


def test_the_top_of_an_empty_store_is_an_empty_page(start_server):
    answer = get(start_server(server={"workers": 1}), "/v1/browse/")
    assert (answer.status_code, "empty" in answer.text) == (200, True)


def test_an_unknown_folder_is_not_found_whatever_its_query(stored):
    """A page behind the last file of a folder is an empty one."""
    for query, status in (("", 200), ("?marker=zzz", 200), ("?x=y", 200)):
        assert get(stored, f"/pages/{query}").status_code == status
        assert get(stored, f"/unknown/{query}").status_code == 404


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
        links = Links(get(local_server, url).text).found
        assert links.get("Next page") == page["next"]
        assert links.get("First page") == ("/many/" if pages else None)
        url, pages = page["next"], pages + 1
    assert pages == 3
    assert sorted(seen) == sorted(names)


def test_head_is_get_without_the_page(stored):
    head, page = requests.head(f"{stored.url}/pages/", timeout=SECONDS), get(stored, "/pages/")
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["Content-Length"] == page.headers["Content-Length"]


def test_the_way_up_is_known():
    directory = Directory("a/b/c/", [], [])
    assert directory.ancestors == [Folder("a/"), Folder("a/b/"), Folder("a/b/c/")]
    assert directory.parent_url == "/a/b/"
    assert unquote(Directory("a/", [], []).parent_url) == "/v1/browse/"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (10**9, "953.7 MiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_are_readable(size, text):
    assert readable_size(size) == text


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Kind.ARCHIVE, "modules.tar.xz modules.tgz a.zip core.gz kselftest.tar.zst rootfs.tar.gz"),
        (Kind.CONFIG, "config .config kernel.config defconfig multi_v7_defconfig metadata.json job.yaml"),
        (Kind.DEVICE_TREE, "sm8250.dtb overlay.DTBO"),
        (Kind.DISK, "rootfs.cpio.gz rootfs.ext4.zst initrd.img initrd.gz ramdisk root.squashfs"),
        (Kind.KERNEL, "Image Image.gz bzImage zImage uImage xipImage vmlinux vmlinux.xz vmlinuz-6.1.0-28-amd64"),
        (Kind.OTHER, "a imager fileImage build.id gz .gz c a.b"),
        (Kind.PACKAGE, "linux-image-6.18_arm64.deb kernel.rpm"),
        (Kind.PATCH, "0001-fix.patch sm8250.dts series.mbox"),
        (Kind.PICTURE, "chart.svg image.png"),
        (Kind.TEXT, "build.log build.log.gz lava-1.LOG.XZ vmlinux.log System.map SHA256.txt"),
    ],
    ids=lambda value: value.name if isinstance(value, Kind) else "",
)
def test_a_name_says_what_a_file_is(kind, names):
    assert {name: mark(name).kind for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_a_mark_says_in_words_how_a_file_is_compressed():
    assert [mark(name).words for name in ("a.log", "a.log.gz", "a.tar.zst", "a.txz", "a.gz")] == [
        "text", "text, gzip", "archive, zstd", "archive, xz", "archive, gzip"
    ]  # fmt: skip


def test_every_kind_has_a_mark():
    drawn = set(re.findall(r'<symbol id="(.*?)"', MARKS))
    assert drawn == {kind.value for kind in Kind} | {"folder", "up"}
