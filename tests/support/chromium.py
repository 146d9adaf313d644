# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real browser for tests: Debian's Chromium, without a window, driven by Playwright."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Error, Page, sync_playwright

SECONDS = 60  # the time-out of every wait; a loaded machine needs a few
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


def is_installed() -> bool:
    """Whether Chromium is installed."""
    return shutil.which("chromium") is not None


@contextlib.contextmanager
def running_chromium() -> Iterator[Browser]:
    """A browser during the block: Debian's, since Playwright's own would have to be downloaded."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--disable-dev-shm-usage"],  # containers have a small /dev/shm
            timeout=SECONDS * 1000,
        )
        yield browser
        browser.close()


class Visit:
    """A browser's visit to a site: the page, and the errors that the browser reported.

    :param settings: of Playwright's context, such as ``color_scheme="dark"``.
    """

    def __init__(self, browser: Browser, url: str, **settings: Any):
        self._context = browser.new_context(base_url=url, **{"viewport": DESKTOP, **settings})
        self._context.set_default_timeout(SECONDS * 1000)
        self.complaints: list[str] = []
        self.expected = "(?!)"  # a pattern of complaints that are no fault
        self.asked: list[str] = []
        self.page: Page = self._context.new_page()
        self.page.on("console", self._on_message)
        self.page.on("pageerror", self._on_error)
        self.page.on("dialog", self._on_dialog)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _on_message(self, message: ConsoleMessage) -> None:
        """Note errors and warnings; violations of the Content-Security-Policy are among them."""
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.text} ({message.location['url']})")

    def _on_error(self, error: Error) -> None:
        self.complaints.append(f"script: {error}")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def names(self) -> list[str]:
        """The visible names in the page's list."""
        return self.page.locator("tbody tr:visible .name a:first-of-type").all_inner_texts()

    def unexpected(self) -> list[str]:
        """The complaints that no pattern expects."""
        return [complaint for complaint in self.complaints if not re.search(self.expected, complaint)]

    def close(self) -> None:
        """End the visit."""
        self._context.close()
