"""The page in a real browser: it comes up whole, fits a phone, and can be used from a keyboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from tests.app.web.browser import DESKTOP, PHONE, TABS, Visit, album, chromium
from tests.app.web.served import Served, served
from train import pocket

__all__ = ["album", "chromium"]
PHOTOS = sorted((pocket.subjects_dir() / "zorp" / "photos").glob("*.png"))
OURS = ("button", "combobox", "textbox", "slider", "spinbutton", "checkbox", "radio", "listbox", "tab", "searchbox")


@pytest.fixture(scope="module")
def app(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page") / "app") as running:
        yield running


@pytest.fixture
def visit(chromium: Any, app: Served, album: Path) -> Iterator[Callable[..., Visit]]:
    """Opens the page; whatever goes wrong in the browser fails the test."""
    opened: list[Visit] = []

    def make(**options: Any) -> Visit:
        opened.append(Visit(chromium, app, album=album, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
        assert not one.problems, one.problems


def test_photos_are_dropped_and_the_card_says_what_a_run_will_take(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.page.locator("#photos input[type=file]").set_input_files(PHOTOS)
    one.says("5 photos will be used")
    assert one.page.locator("#previews img").count() >= 5
    card = one.page.locator("#check-card")
    card.get_by_text("Before the start").wait_for()
    said = card.inner_text()
    assert "5 photos" in said and "100" in said and "GiB" in said
    one.shoot("photos-1280-light")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "390"])
def test_every_tab_fits_its_window(visit: Callable[..., Visit], size: dict[str, int], dark: bool) -> None:
    one = visit(size=size, dark=dark)
    for tab in TABS:
        one.open(tab)
        one.page.wait_for_timeout(250)
        assert one.overflow() <= 0, f"{tab} is {one.overflow()} px too wide at {size['width']}"
        one.shoot(f"{tab.lower().replace(' ', '-')}-{size['width']}-{'dark' if dark else 'light'}")
