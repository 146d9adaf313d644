# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make dashboard-picture``: the pictures of Grafana's dashboard in docs/, without Grafana itself.

    take.py [MINUTES | FILE]

For this many minutes (default: 30), a server has traffic, and Prometheus scrapes it. The results of the dashboard's
queries are stored as .tools/dashboard_picture/measured.json, and drawn in a browser by Grafana's own components, from
npm. With a FILE of such results, only the drawing is done.

Needs the Debian packages chromium, pngquant and prometheus, and Node.js 20.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]

import measure  # noqa: E402
from playwright.sync_api import FloatRect, Page  # noqa: E402
from screenshots import with_a_palette  # noqa: E402

from tests.support.chromium import running_chromium  # noqa: E402

BUILD = ROOT / ".tools" / "dashboard_picture"
PICTURES = ROOT / "docs" / "pictures"
WIDTH = 1600  # pixels
MINUTES = 30.0
ESBUILD = (
    "node_modules/.bin/esbuild", "page.jsx", "--bundle", "--format=iife", "--jsx=automatic", "--minify",
    '--define:process.env.NODE_ENV="production"', "--loader:.ttf=file", "--loader:.svg=text", "--log-level=error",
)  # fmt: skip
FONTS = {"Regular": 400, "Medium": 500}  # the weights, by their names in Grafana's style
INDEX = """\
<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="page.css"><body><div id="page"></div>
<script src="measured.js"></script><script src="page.js"></script>
"""


def main() -> int:
    """Measure if necessary, and draw; returns the exit code."""
    if missing := [name for name in ("chromium", "pngquant", "prometheus", "npm") if shutil.which(name) is None]:
        print(f"dashboard-picture: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    BUILD.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1] if len(sys.argv) > 1 else str(MINUTES)
    kept = Path(given) if given.endswith(".json") else BUILD / "measured.json"
    if not given.endswith(".json"):
        kept.write_text(json.dumps(measure.measured(60 * float(given))))
    site = build(kept.read_text())
    with served(site) as url, running_chromium() as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        complaints = draw(page, url)
        take(page, PICTURES)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def build(measured: str) -> Path:
    """Build a page that draws the results; returns its folder."""
    for name in ("package.json", "page.jsx"):
        shutil.copy(HERE / name, BUILD)
    npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    subprocess.run(npm, cwd=BUILD, check=True)
    site, modules = BUILD / "site", BUILD / "node_modules"
    shutil.rmtree(site, ignore_errors=True)
    subprocess.run([*ESBUILD, f"--outdir={site}"], cwd=BUILD, check=True)
    shutil.copytree(modules / "@grafana/ui/dist/public/img/icons", site / "public/build/img/icons")
    fonts = site / "public/fonts/inter"
    fonts.mkdir(parents=True)
    for name, weight in FONTS.items():
        font = modules / f"@fontsource/inter/files/inter-latin-{weight}-normal.woff2"
        shutil.copy(font, fonts / f"Inter-{name}.woff2")
    (site / "measured.js").write_text(f"window.measured = {measured};")
    (site / "index.html").write_text(INDEX)
    return site


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder during the block; yields the page's URL. From file://, the page could not fetch its icons."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/index.html"
        server.shutdown()


def draw(page: Page, url: str) -> list[str]:
    """Have the browser draw the page; returns what went wrong."""
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"dashboard-picture: {error}"))
    page.goto(url, wait_until="networkidle")
    page.wait_for_selector("#dashboard canvas")
    page.evaluate("document.fonts.ready")
    page.wait_for_load_state("networkidle")
    graphs = page.locator("[data-type=timeseries]").count()
    drawn = page.locator("[data-type=timeseries] canvas").count()
    if drawn != graphs:
        complaints.append(f"dashboard-picture: {drawn} of {graphs} graphs are drawn")
    return complaints


def take(page: Page, folder: Path) -> None:
    """Take a picture of the whole dashboard, and one of its first rows."""
    third = page.locator("[data-type=row]").nth(2).bounding_box()
    assert third is not None, "the dashboard has at least three rows"
    whole = page.locator("#dashboard").bounding_box()
    assert whole is not None, "the dashboard is visible"
    for name, bottom in (("dashboard", third["y"]), ("dashboard-whole", whole["height"])):
        clip: FloatRect = {"x": 0, "y": 0, "width": WIDTH, "height": bottom}
        path = folder / f"{name}.png"
        path.write_bytes(with_a_palette(page.screenshot(clip=clip, full_page=True, animations="disabled")))
        print(f"dashboard-picture: {path}, {path.stat().st_size >> 10} KiB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
