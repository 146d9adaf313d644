# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make screenshots``: the pictures of directory pages in docs/, of files like those of a build.

    screenshots.py [FOLDER]

The default folder is docs/pictures/. Needs the Debian packages chromium, fonts-noto-core and pngquant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.chromium import DESKTOP, PHONE, running_chromium  # noqa: E402
from tests.support.harness import Server, running  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
BUILT = 1_763_800_000  # the files' time, in seconds since the epoch; the same in every picture
TREE = "mainline/master/v6.18-rc7/arm64/defconfig/gcc-14/"
FILES = {
    "Image": 42_109_440,
    "Image.gz": 13_871_204,
    "bzImage": 14_205_952,
    "System.map": 9_132_770,
    "config": 312_876,
    "metadata.json": 7_412,
    "build.log": 1_248_119,
    "build.log.gz": 96_341,
    "modules.tar.xz": 38_420_112,
    "rootfs.cpio.gz": 27_391_455,
    "rootfs.ext4.zst": 212_330_901,
    "kselftest.tar.zst": 18_002_417,
    "linux-image-6.18.0-rc7_arm64.deb": 31_022_944,
    "0001-arm64-dts-fix-regulator.patch": 2_318,
    "lava-1843.log": 482_113,
    "lava-1843.yaml": 5_120,
    "lava-20117.log": 1_902_455,
    "boot-chart.svg": 61_240,
    **{f"dtbs/qcom/sm{number}.dtb": 96 * KIB + number for number in (8250, 8350, 8450, 8550)},
    **{f"job-{number}/lava.log.gz": 40 * KIB for number in (1, 2, 3, 9, 10, 11, 12)},
    "logs/console.log": 12_000,
}
SHARDS = {f"ltp-{number:04}.log.gz": 3 * KIB + 37 * number for number in range(1, 5_001)}


class Picture(NamedTuple):
    """A picture: the page, and how it is shown."""

    name: str
    path: str
    viewport: Mapping[str, int] = DESKTOP
    dark: bool = False
    typed: str = ""  # into the filter box
    bottom: bool = False  # whether it shows the page's end


PICTURES = (
    Picture("directory", f"/{TREE}"),
    Picture("directory-dark", f"/{TREE}", dark=True),
    Picture("directory-phone", f"/{TREE}", PHONE),
    Picture("directory-filtered", f"/{TREE}", typed="lava log"),
    Picture("directory-pages", "/mainline/ltp/", bottom=True),
)


def main() -> int:
    """Take all pictures; returns the exit code."""
    if missing := [command for command in ("chromium", "pngquant") if shutil.which(command) is None]:
        print(f"screenshots: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="kci-storage-pictures-") as work,
        running_chromium() as browser,
        running(Server(Path(work), {"driver": "local", "server": {"workers": 1}})) as server,
    ):
        store(server.storage_path)
        for picture in PICTURES:
            path = folder / f"{picture.name}.png"
            take(browser, server.url, picture, path)
            print(f"screenshots: {path}, {path.stat().st_size // KIB} KiB", flush=True)
    return 0


def store(storage: Path) -> None:
    """Store files with the names, sizes and dates of a build. They are sparse, and take no space."""
    everything = {TREE + name: size for name, size in FILES.items()}
    everything |= {f"mainline/ltp/{name}": size for name, size in SHARDS.items()}
    for number, (key, size) in enumerate(everything.items()):
        path = storage / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        os.utime(path, (BUILT, BUILT + 31 * (number % 180)))


def take(browser: Browser, url: str, picture: Picture, path: Path) -> None:
    """Take a picture, as PNG."""
    context = browser.new_context(**look(picture))
    page = context.new_page()
    page.goto(url + picture.path)
    if picture.typed:
        page.get_by_role("searchbox").fill(picture.typed)
    if picture.bottom:
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    path.write_bytes(with_a_palette(page.screenshot(animations="disabled", caret="hide")))
    context.close()


def with_a_palette(png: bytes) -> bytes:
    """The picture with a palette, in a third of the bytes: a page has few colours."""
    command = ["pngquant", "--quality", "90-100", "--speed", "1", "-"]
    return subprocess.run(command, input=png, stdout=subprocess.PIPE, check=True).stdout


def look(picture: Picture) -> dict[str, Any]:
    """The browser's settings for a picture."""
    is_phone = picture.viewport is PHONE
    return {
        "viewport": picture.viewport,
        "color_scheme": "dark" if picture.dark else "light",
        "device_scale_factor": 2 if is_phone else 1,
        "is_mobile": is_phone,
        "has_touch": is_phone,
    }


if __name__ == "__main__":
    sys.exit(main())
