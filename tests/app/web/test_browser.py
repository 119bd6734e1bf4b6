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


def test_every_control_has_a_name(visit: Callable[..., Visit]) -> None:
    """What a screen reader is told: the accessibility tree, tab by tab."""
    one = visit()
    for tab in TABS:
        one.open(tab)
        one.page.wait_for_timeout(250)
        nameless = [node for node in controls(one) if not node[1]]
        assert not nameless, f"{tab}: {nameless}"
        assert len(controls(one)) > len(TABS)


def test_the_keyboard_reaches_every_control(visit: Callable[..., Visit]) -> None:
    """Tab goes through all that can be used, in sight, and Shift+Tab is not needed to leave anything."""
    one = visit()
    for tab in ("Train on photos", "Runs", "Draw", "Library"):
        one.open(tab)
        one.page.wait_for_timeout(250)
        expected = set(one.page.evaluate(_REACHABLE))
        one.page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
        reached: set[str] = set()
        for _ in range(3 * len(expected) + 20):
            one.page.keyboard.press("Tab")
            reached.add(one.page.evaluate("document.activeElement.dataset.reach ?? ''"))
        missed = expected - reached
        assert not missed, f"{tab}: the keyboard does not reach {sorted(missed)}"


def controls(one: Visit) -> list[tuple[str, str]]:
    """(role, name) of every control of the accessibility tree."""
    session = one.page.context.new_cdp_session(one.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    found = [(node.get("role", {}).get("value", ""), node.get("name", {}).get("value", "")) for node in nodes
             if not node.get("ignored")]  # fmt: skip
    return [(role, name.strip()) for role, name in found if role in OURS]


# Marks what can be used and seen, and gives the marks: a radio group is one stop, a tab of the list as well.
_REACHABLE = """() => {
  const seen = e => e.checkVisibility({ visibilityProperty: true, opacityProperty: true })
    && e.getBoundingClientRect().width > 1;
  const named = e => e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.innerText || e.name || e.id || '';
  const all = [...document.querySelectorAll('main button, main input, main textarea, main select')]
    .filter(e => !e.disabled && e.type !== 'file' && e.type !== 'radio' && e.role !== 'tab' && e.tabIndex >= 0)
    .filter(seen);
  return all.map((e, i) => e.dataset.reach = `${i} ${e.tagName.toLowerCase()} ${named(e).trim().slice(0, 40)}`);
}"""
