"""A real browser on a page that is really served: Chromium through Playwright, at the sizes and in the colours that
people have. Where there is no browser the tests are skipped, and say so.

LORA_DIFFUSION_SCREENSHOTS names a folder that keeps the pictures of a test run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app.web.served import Served

TABS = ("Train on photos", "Train on text", "Runs", "Draw", "Write", "Library", "About")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LONG = 120_000  # milliseconds: what computes, on a machine that does much else
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium's own words on a resource that is not there come without its address; responses are looked at instead.
_OF_RESOURCES = "Failed to load resource"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; one for a module."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: pip install playwright")
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("no browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go."""
    named = os.environ.get("LORA_DIFFUSION_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Visit:
    """One browser's visit: its page, and what went wrong in it."""

    def __init__(
        self, browser: Any, app: Served, *, size: dict[str, int] | None = None, dark: bool = False, album: Path
    ) -> None:
        self._context = browser.new_context(
            viewport=size or DESKTOP, color_scheme="dark" if dark else "light", reduced_motion="reduce"
        )
        self._album, self.app = album, app
        self.page = self._context.new_page()
        self.page.set_default_timeout(LONG)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.page.on("console", self._hear)
        self.page.on("request", self._ask)
        self.page.on("response", self._answer)
        self.load()

    def _hear(self, message: Any) -> None:
        if message.type == "error" and _OF_RESOURCES not in message.text:
            self.problems.append(message.text)

    def _ask(self, request: Any) -> None:
        if not request.url.startswith((self.app.url, "data:", "blob:", "about:")):
            self.problems.append(f"asks elsewhere: {request.url}")

    def _answer(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status} for {response.url}")

    def load(self) -> None:
        """Load the page, or load it again."""
        self.page.goto(self.app.url)
        self.page.get_by_role("tab", name=TABS[0]).wait_for()
        self.page.get_by_role("heading", name="1. Photos").wait_for()

    def open(self, tab: str) -> Any:
        """Go to a tab; returns its panel."""
        self.page.get_by_role("tab", name=tab, exact=True).click()
        panel = self.page.get_by_role("tabpanel").filter(visible=True).first
        panel.wait_for()
        return panel

    def button(self, name: str) -> Any:
        """The button of a name that can be seen: hidden tabs have some of the same name."""
        return self.page.get_by_role("button", name=name, exact=True).filter(visible=True)

    def says(self, text: str, *, within: str = "body", milliseconds: int = LONG) -> Any:
        """Wait until a text can be seen; returns where it stands."""
        found = self.page.locator(within).get_by_text(re.compile(re.escape(text))).filter(visible=True).first
        found.wait_for(timeout=milliseconds)
        return found

    def choose(self, label: str, option: str) -> None:
        """Choose from a dropdown, as one does with the mouse."""
        box = self.page.get_by_role("combobox", name=label).filter(visible=True)
        box.click()
        self.page.get_by_role("option", name=option).first.click()

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def shoot(self, name: str) -> Path:
        """A picture of the whole page."""
        path = self._album / f"{name}.png"
        self.page.screenshot(path=path, full_page=True)
        return path

    def close(self) -> None:
        self._context.close()
