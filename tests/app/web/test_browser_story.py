"""What a person does, from five photos to pictures, in a real browser: minutes, on the embedded models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

import lora_diffusion as ld
from tests.app.web.browser import PHONE, Visit, album, chromium
from tests.app.web.drawing import put_adapter
from tests.app.web.served import Served, served
from train import pocket

__all__ = ["album", "chromium"]
pytestmark = pytest.mark.slow
PHOTOS = sorted((pocket.subjects_dir() / "zorp" / "photos").glob("*.png"))
STEPS = 60


@pytest.fixture(scope="module")
def app(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("story") / "app"
    for number, name in enumerate(("rex", "ink")):
        put_adapter(root / "adapters", name, "pocket", number)
    with served(root) as running:
        yield running


@pytest.fixture
def visit(chromium: Any, app: Served, album: Path) -> Iterator[Callable[..., Visit]]:
    opened: list[Visit] = []

    def make(**options: Any) -> Visit:
        opened.append(Visit(chromium, app, album=album, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()
        assert not one.problems, one.problems


def step_of(one: Visit) -> int:
    """The step that the page says."""
    found = re.search(r"step (\d[\d,]*) of", one.page.locator("#run-status").inner_text())
    return int(found[1].replace(",", "")) if found else 0


def curve_of(one: Visit) -> str:
    """The drawn lines of the loss."""
    drawn = "e => [...e.querySelectorAll('path')].map(path => path.getAttribute('d')).join()"
    plot = one.page.locator("#loss svg.marks, #loss .vega-embed svg")
    return str(plot.first.evaluate(drawn)) if plot.count() else ""


def until(one: Visit, what: Callable[[], bool], seconds: float = 240) -> None:
    """The page is looked at until something can be seen there."""
    for _ in range(int(seconds * 4)):
        if what():
            return
        one.page.wait_for_timeout(250)
    raise AssertionError(f"not so after {seconds:g} s; the page says {one.page.locator('#run-status').inner_text()!r}")


def test_five_photos_become_an_adapter(visit: Callable[..., Visit], app: Served, tmp_path: Path) -> None:
    one = visit()
    page = one.page
    page.locator("#photos input[type=file]").set_input_files(PHOTOS)
    one.says("5 photos will be used")
    page.get_by_role("textbox", name="Class What kind").fill("creature")
    page.get_by_role("textbox", name="Name of the run").filter(visible=True).fill("zorp")
    page.get_by_role("button", name="Advanced settings").filter(visible=True).click()
    page.locator("#advanced").get_by_role("button", name="Run (").click()
    page.locator("#pictures-max_train_steps").locator("input, textarea").fill(str(STEPS))
    page.get_by_role("textbox", name="What the photos show Made").click()
    until(
        one,
        lambda: (
            page.get_by_role("textbox", name="What the photos show Made").input_value() == "a photo of sks creature"
        ),
    )
    one.button("Check again").click()
    until(one, lambda: f"{STEPS};" in page.locator("#check-card").inner_text())
    one.button("Start training").click()

    one.says("zorp: running", within="#run-status")
    until(one, lambda: step_of(one) >= 3)
    first_curve, first_step = curve_of(one), step_of(one)
    until(one, lambda: step_of(one) >= first_step + 5)
    until(one, lambda: curve_of(one) != first_curve)
    one.shoot("run-goes-on-1280-light")

    one.load()  # in the middle
    one.open("Runs")
    one.says("zorp: running", within="#run-status")
    assert step_of(one) >= first_step and app.workers()
    until(one, lambda: curve_of(one) != "" and curve_of(one) != first_curve, 60)
    phone = visit(size=PHONE, dark=True)  # and in another browser
    phone.open("Runs")
    phone.says("zorp: running", within="#run-status")
    until(phone, lambda: curve_of(phone) != "", 60)
    assert phone.overflow() <= 0
    phone.shoot("run-goes-on-390-dark")

    one.button("Stop, keeping what was learned").click()
    one.says("zorp: stopped", within="#run-status")
    stopped = step_of(one)
    assert first_step < stopped < STEPS and (app.root / "runs" / "zorp" / "adapter.safetensors").is_file()
    one.button("Resume").click()
    one.says("zorp: done", within="#run-status", milliseconds=400_000)
    assert step_of(one) == STEPS
    losses = [json.loads(line) for line in (app.root / "runs" / "zorp" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in losses if event.get("event") == "step"] == list(range(1, STEPS + 1))
    one.page.locator("#run-samples img").first.wait_for()
    with page.expect_download() as download:
        one.button("Download the adapter").click()
    learned = tmp_path / "adapter.safetensors"
    download.value.save_as(learned)
    assert learned.read_bytes() == (app.root / "runs" / "zorp" / "adapter.safetensors").read_bytes()
    ld.read_adapter(learned)
    one.shoot("run-is-done-1280-light")


def test_two_adapters_draw_and_are_compared_on_the_slider(visit: Callable[..., Visit], app: Served) -> None:
    one = visit(dark=True)
    page = one.page
    one.open("Draw")
    page.locator("#prompt textarea").fill("a photo of a creature in a forest <lora:ink:0.4>")
    one.choose("Adapter 1", "rex")
    page.get_by_role("textbox", name="Seed").filter(visible=True).fill("7")
    one.button("Draw").click()
    one.says("1 picture, seed 7")
    drawn = next((app.root / "gallery").glob("*.png"))
    request = json.loads(_settings_in(drawn))
    assert {(item["name"], item["weight"]) for item in request["adapters"]} == {("rex", 1.0), ("ink", 0.4)}
    one.button("Compare with the base").click()
    one.says("Both from the noise of seed 7")
    pictures = page.locator("#slider img[data-testid=imageslider-image], #slider img.fixed, #slider .content img")
    pictures.nth(1).wait_for()
    addresses = {pictures.nth(0).get_attribute("src"), pictures.nth(1).get_attribute("src")}
    assert len(addresses) == 2
    wrap = page.locator("#slider .slider-wrap")
    wrap.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    before, box = wrap.screenshot(), wrap.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_timeout(300)
    assert wrap.screenshot() != before, "the line does not move"
    one.shoot("compared-1280-dark")
    page.locator("#prompt textarea").fill("")
    page.get_by_role("textbox", name="Seed").filter(visible=True).fill("")
    page.locator("#restore input[type=file]").set_input_files(drawn)
    one.says("are back, seed 7")
    assert page.get_by_role("textbox", name="Seed").filter(visible=True).input_value() == "7"
    assert page.locator("#prompt textarea").input_value().startswith("a photo of a creature in a forest")


def test_a_foreign_file_is_taken_and_a_hostile_one_is_refused(
    visit: Callable[..., Visit], app: Served, tmp_path: Path
) -> None:
    foreign = tmp_path / "from_elsewhere.safetensors"
    ld.write_adapter(ld.read_adapter(app.root / "adapters" / "rex.safetensors"), foreign, format="kohya")
    hostile = tmp_path / "hostile.safetensors"
    header = json.dumps({"__metadata__": {"name": "<script>alert(1)</script>"}, "unet.x.lora_A.weight": {
        "dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}}).encode()  # fmt: skip
    hostile.write_bytes(len(header).to_bytes(8, "little") + header)
    one = visit()
    page = one.page
    one.open("Library")
    page.locator("#cards article").nth(1).wait_for()
    page.locator("#import-file input[type=file]").set_input_files(foreign)
    page.locator("#import-file").get_by_text("from_elsewhere").first.wait_for()
    one.button("Import").click()
    told = page.locator("#library-told textarea")
    until(one, lambda: "is in the library" in told.input_value())
    assert "kohya" in told.input_value()
    page.locator("#cards").get_by_text("from_elsewhere", exact=True).wait_for()
    one.shoot("imported-1280-light")
    one.load()
    one.open("Library")
    page.locator("#import-file input[type=file]").set_input_files(hostile)
    page.locator("#import-file").get_by_text("hostile").first.wait_for()
    one.button("Import").click()
    toast = page.get_by_test_id("toast-body").first
    toast.wait_for()
    assert "impossible offsets" in toast.inner_text()
    one.shoot("refused-1280-light")
    assert not list((app.root / "adapters").glob("hostile*")) and page.locator("#cards script").count() == 0


def test_rows_become_a_text_adapter(visit: Callable[..., Visit], app: Served) -> None:
    one = visit()
    page = one.page
    one.open("Train on text")
    one.choose("Or example rows", "Sentiment: good or bad")
    page.locator("#rows-seen pre").first.wait_for()
    page.get_by_role("textbox", name="Steps").filter(visible=True).fill("12")
    page.get_by_role("textbox", name="Name of the run").filter(visible=True).fill("mood")
    one.button("Show the rows as the model will see them").click()
    until(one, lambda: "Before the start" in page.locator("#text-card").inner_text())
    one.shoot("rows-1280-light")
    one.button("Start training").click()
    one.says("mood: done", within="#run-status", milliseconds=400_000)
    assert step_of(one) == 12
    one.open("Write")
    one.choose("Text adapter 1", "mood")
    page.locator("#text-prompt textarea").fill("what a wonderful day")
    one.button("Write").click()
    answer = page.locator("#adapted-text textarea")
    until(one, lambda: "good" in answer.input_value() or "bad" in answer.input_value(), 60)
    assert "%" in one.page.locator("#written-told").inner_text()
    one.button("Compare with the base").click()  # which cannot be asked this, and the page says why
    one.page.get_by_test_id("toast-body").get_by_text("has no head").wait_for()
    one.shoot("judged-1280-light")


def _settings_in(path: Path) -> str:
    from train.pictures import read_settings

    return json.dumps(read_settings(path))
