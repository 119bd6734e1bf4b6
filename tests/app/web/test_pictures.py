"""Drawing for a page: the same bytes from a request, alone or among ten, and nothing left of anybody's adapters."""

from __future__ import annotations

import json
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import lora_diffusion as ld
from app.web.limits import PUBLIC
from app.web.picture_settings import checked, request_in
from app.web.pictures import Pictures, Request, Stopped
from app.web.places import Workspace
from lora_diffusion.errors import AdapterMismatchError, ConfigError, DatasetError, ModelNotFoundError
from tests.app.web.drawing import LIMITS, model, pictures, pixels, put_adapter, request_, shelf
from train.models import load_pipeline
from train.pictures import read_settings
from train.sampling import generate

__all__ = ["model", "pictures", "request_", "shelf"]  # fixtures


def test_a_picture_is_what_the_sampler_draws(pictures: Pictures, request_: Request) -> None:
    drawn = pictures.draw(replace(request_, count=2))
    expected = generate(load_pipeline(request_.model), "a dog", [7, 8], steps=2, batch_size=1)
    assert [pixels(path) for path in drawn.paths] == [one.tobytes() for one in expected]
    assert drawn.seed == 7 and not drawn.stopped and all(path.parent.name == "gallery" for path in drawn.paths)
    again = pictures.draw(replace(request_, count=2))
    assert again.paths == drawn.paths
    other = pictures.draw(replace(request_, steps=3))
    assert other.paths[0] not in drawn.paths and pixels(other.paths[0]) != pixels(drawn.paths[0])


def test_adapters_act_with_their_weights_and_leave_nothing(pictures: Pictures, request_: Request, shelf: Path) -> None:
    base = pixels(pictures.draw(request_).paths[0])
    both = replace(request_, adapters=[("rex", 0.8), ("ink", 0.5)])
    pipe = load_pipeline(request_.model)
    ld.load_adapter(pipe, shelf / "adapters" / "ink.safetensors", "ink", 0.5)
    ld.load_adapter(pipe, shelf / "adapters" / "rex.safetensors", "rex", 0.8)
    [expected] = generate(pipe, "a dog", [7], steps=2)
    drawn = pictures.draw(both)
    assert pixels(drawn.paths[0]) == expected.tobytes() != base
    tagged = pictures.draw(replace(request_, prompt="a dog <lora:rex:0.8> <lora:INK:0.5>"))
    assert pixels(tagged.paths[0]) == expected.tobytes() and tagged.settings == drawn.settings
    turned = pictures.draw(replace(request_, adapters=[("ink", 0.5), ("rex", 0.8)]))
    assert pixels(turned.paths[0]) == expected.tobytes()
    assert pixels(pictures.draw(request_).paths[0]) == base
    assert pixels(pictures.draw(replace(request_, adapters=[("rex", 0.0)])).paths[0]) == base
    over = pictures.draw(replace(both, prompt="a dog <lora:ink:0.9>"))
    assert over.notes == ["ink: the prompt's weight is used, 0.9"]


@pytest.mark.parametrize("before", [("rex",), ("ink",), ("rex", "ink"), ("ink", "rex")])
def test_a_picture_does_not_depend_on_what_was_drawn_before(
    pictures: Pictures, request_: Request, before: tuple[str, ...]
) -> None:
    both = replace(request_, adapters=[("rex", 0.5), ("ink", 0.5)])
    expected = Pictures(pictures.workspace, LIMITS, device="cpu").draw(both).paths[0].read_bytes()
    for name in before:
        pictures.draw(replace(request_, adapters=[(name, 1.0)]))
    assert [pictures.draw(both).paths[0].read_bytes() for _ in range(2)] == [expected] * 2


def test_a_weight_for_each_component(pictures: Pictures, request_: Request, shelf: Path) -> None:
    pipe = load_pipeline(request_.model)
    ld.load_adapter(pipe, shelf / "adapters" / "rex.safetensors", "rex", {"unet": 0.8, "text_encoder": 0.0})
    [expected] = generate(pipe, "a dog", [7], steps=2)
    drawn = pictures.draw(replace(request_, prompt="a dog <lora:rex:unet=0.8>"))
    assert pixels(drawn.paths[0]) == expected.tobytes()
    restored = pictures.settings_of(drawn.paths[0])
    assert restored.adapters == [("rex", {"unet": 0.8})]
    with pytest.raises(ConfigError, match="components are"):
        pictures.draw(replace(request_, prompt="a dog <lora:rex:decoder=0.8>"))
    assert pixels(pictures.draw(request_).paths[0]) != expected.tobytes()


def test_after_a_mistake_nothing_acts(pictures: Pictures, request_: Request, shelf: Path) -> None:
    base = pixels(pictures.draw(request_).paths[0])
    other = load_pipeline("pocket")
    ld.add_adapter(other, ld.LoraConfig(r=1), "a")
    foreign = shelf / "adapters" / "foreign.safetensors"
    ld.save_adapter(other, foreign, "a")
    try:
        with pytest.raises(AdapterMismatchError):
            pictures.draw(replace(request_, adapters=[("rex", 1.0), ("foreign", 1.0)]))
    finally:
        foreign.unlink()
    with pytest.raises(Stopped):
        pictures.draw(replace(request_, adapters=[("rex", 1.0)]), should_stop=lambda: True)
    assert pixels(pictures.draw(request_).paths[0]) == base


def test_a_seed_is_chosen_and_told(pictures: Pictures, request_: Request) -> None:
    drawn = pictures.draw(replace(request_, seed=None))
    assert 0 <= drawn.seed < 2**31 and drawn.settings["seed"] == drawn.seed
    again = pictures.draw(replace(request_, seed=drawn.seed))
    assert again.paths == drawn.paths


def test_a_picture_dropped_back_gives_its_request(pictures: Pictures, request_: Request) -> None:
    asked = replace(request_, negative_prompt="blur", adapters=[("rex", 0.8)], guidance=3.5, count=2)
    drawn = pictures.draw(asked)
    restored = pictures.settings_of(drawn.paths[1])
    assert restored == replace(asked, seed=8, count=1, width=32, height=32)
    assert pictures.draw(restored).paths[0].read_bytes() == drawn.paths[1].read_bytes()


def test_compare_begins_with_the_same_noise(pictures: Pictures, request_: Request) -> None:
    base, adapted = pictures.compare(replace(request_, prompt="a dog <lora:rex:1>"))
    assert pixels(base) == pixels(pictures.draw(request_).paths[0])
    assert pixels(adapted) == pixels(pictures.draw(replace(request_, adapters=[("rex", 1.0)])).paths[0])
    assert read_settings(base)["seed"] == read_settings(adapted)["seed"] and pixels(base) != pixels(adapted)


def test_progress_is_told_and_a_wish_to_stop_heard(pictures: Pictures, request_: Request) -> None:
    told: list[tuple[int, int]] = []
    pictures.draw(replace(request_, count=2, steps=3), on_progress=lambda *step: told.append(step))
    assert told == [(n, 6) for n in range(1, 7)]
    drawn = pictures.draw(replace(request_, count=4, steps=3), should_stop=lambda: len(told) > 8,
                          on_progress=lambda *step: told.append(step))  # fmt: skip
    assert drawn.stopped and len(drawn.paths) == 1
    assert pictures.draw(request_).paths


def test_who_waits_can_stop_waiting(pictures: Pictures, request_: Request) -> None:
    with pictures._lock, ThreadPoolExecutor() as pool:
        wish = threading.Event()
        waiting = pool.submit(pictures.draw, request_, should_stop=wish.is_set)
        wish.set()
        with pytest.raises(Stopped):
            waiting.result(timeout=5)


def test_only_so_many_adapters_and_models_are_kept(shelf: Path, request_: Request) -> None:
    small = Pictures(Workspace(shelf), LIMITS, device="cpu", models_kept=1, adapters_kept=1)
    first = small.draw(replace(request_, adapters=[("rex", 1.0)])).paths[0].read_bytes()
    both = small.draw(replace(request_, adapters=[("ink", 1.0), ("rex", 1.0)])).paths[0].read_bytes()
    base = small._get(request_.model)
    small.draw(replace(request_, adapters=[("zorp", 1.0)]))
    assert len(ld.list_adapters(base.pipe)) == 1
    assert small.draw(replace(request_, adapters=[("rex", 1.0)])).paths[0].read_bytes() == first
    assert small.draw(replace(request_, adapters=[("ink", 1.0), ("rex", 1.0)])).paths[0].read_bytes() == both
    assert small._get(request_.model) is base


def test_a_file_that_has_changed_is_read_again(model: str, tmp_path: Path, request_: Request) -> None:
    pictures = Pictures(Workspace(tmp_path), LIMITS, device="cpu")
    put_adapter(tmp_path / "adapters", "rex", model, 1)
    asked = replace(request_, adapters=[("rex", 1.0)])
    first = pictures.draw(asked)
    put_adapter(tmp_path / "adapters", "rex", model, 2)
    second = pictures.draw(asked)
    assert pixels(first.paths[0]) != pixels(second.paths[0]) and first.paths != second.paths
    assert first.settings["adapters"][0]["sha256"] != second.settings["adapters"][0]["sha256"]


def test_words_of_one_request_are_not_read_in_another(model: str, tmp_path: Path, request_: Request) -> None:
    pipe = load_pipeline(model)
    ld.add_adapter(pipe, ld.LoraConfig(r=1), "a", tokens=[ld.TextualInversionConfig("<zorp>", num_vectors=2)])
    (tmp_path / "adapters").mkdir()
    ld.save_adapter(pipe, tmp_path / "adapters" / "word.safetensors", "a")
    pictures = Pictures(Workspace(tmp_path), LIMITS, device="cpu")
    asked = replace(request_, prompt="a <zorp> dog")
    plain = pixels(pictures.draw(asked).paths[0])
    assert pixels(pictures.draw(replace(asked, adapters=[("word", 1.0)])).paths[0]) != plain
    assert pixels(pictures.draw(asked).paths[0]) == plain


def test_a_sampler_for_zero_snr_is_given_back(model: str, tmp_path: Path, request_: Request) -> None:
    put_adapter(tmp_path / "adapters", "zero", model, 1, settings={"rescale_betas_zero_snr": True})
    put_adapter(tmp_path / "adapters", "plain", model, 1)
    pictures = Pictures(Workspace(tmp_path), LIMITS, device="cpu")
    pictures._get(model).pipe.scheduler.register_to_config(prediction_type="v_prediction")
    zero = pixels(pictures.draw(replace(request_, adapters=[("zero", 1.0)])).paths[0])
    plain = pixels(pictures.draw(replace(request_, adapters=[("plain", 1.0)])).paths[0])
    assert zero != plain
    assert pixels(pictures.draw(replace(request_, adapters=[("zero", 1.0)])).paths[0]) == zero


@pytest.mark.parametrize("which", ["tiny", pytest.param("pocket", marks=pytest.mark.slow)])
def test_ten_threads_get_what_each_gets_alone(which: str, model: str, tmp_path: Path) -> None:
    """Byte for byte, whatever the others ask for."""
    name_of_model = "pocket" if which == "pocket" else model
    for number, name in enumerate(("rex", "ink")):
        put_adapter(tmp_path / "adapters", name, name_of_model, number)
    base = Request(name_of_model, "a photo of a dog", steps=3, seed=1)
    asked = [
        base, replace(base, adapters=[("rex", 1.0)]), replace(base, adapters=[("ink", 1.0)]),
        replace(base, adapters=[("rex", 0.5), ("ink", 0.5)]), replace(base, adapters=[("ink", 0.5), ("rex", 0.5)]),
        replace(base, prompt="a dog <lora:rex:unet=1>"), replace(base, seed=2, count=2),
        replace(base, adapters=[("rex", -1.0)], negative_prompt="rain"), replace(base, guidance=1.0),
        replace(base, adapters=[("rex", 1.0)]),
    ]  # fmt: skip
    alone = []
    for part in (asked[:3], asked[3:]):
        fresh = Pictures(Workspace(tmp_path), LIMITS, device="cpu")
        alone += [[path.read_bytes() for path in fresh.draw(one).paths] for one in part]
    assert len({pages[0] for pages in alone}) == 9
    for path in (tmp_path / "gallery").iterdir():
        path.unlink()
    together = Pictures(Workspace(tmp_path), LIMITS, device="cpu", adapters_kept=1)
    with ThreadPoolExecutor(10) as pool:
        drawn = list(pool.map(together.draw, asked))
    assert [[path.read_bytes() for path in one.paths] for one in drawn] == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 41}, "steps 41: give a whole number from 1 to 40"),
        ({"steps": 2.5}, "steps 2.5"),
        ({"steps": 10**400}, "steps 1000"),
        ({"count": 5}, "count 5"),
        ({"count": True}, "count True"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": "7"}, "guidance 7"),
        ({"width": 72}, "width 72"),
        ({"height": 33}, "multiple of 8"),
        ({"width": 0}, "width 0"),
        ({"prompt": "x" * 4001}, "4,001 characters"),
        ({"prompt": 3}, "no text"),
        ({"prompt": "a\0b"}, "no text"),
        ({"negative_prompt": "\ud800"}, "no text"),
        ({"model": ""}, "empty"),
        ({"adapters": [("rex",)]}, "its weight"),
        ({"adapters": [("rex", float("inf"))]}, "no finite number"),
        ({"adapters": [("rex", 1.0)] * 17}, "at most 16"),
        ({"adapters": "rex"}, "its weight"),
        ({"adapters": [("rexx", 1.0)]}, "did you mean rex"),
        ({"adapters": [("../../etc/passwd", 1.0)]}, "no adapter"),
        ({"adapters": [("/etc/passwd", 1.0)]}, "no adapter"),
        ({"adapters": [("zorp@15", 1.0)]}, "it has 10, 20"),
        ({"adapters": [("zorp@" + "9" * 150, 1.0)]}, "it has 10, 20"),
        ({"adapters": [("zorp", 1.0), ("runs/zorp", 1.0)]}, "chosen twice"),
        ({"prompt": "<lora:nobody:1>"}, "no adapter 'nobody'"),
    ],
)
def test_limits_are_kept_here(pictures: Pictures, request_: Request, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        pictures.draw(replace(request_, **changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_names_of_checkpoints_and_models(pictures: Pictures, request_: Request, shelf: Path) -> None:
    found = pictures.draw(replace(request_, adapters=[("zorp@10", 1.0)]))
    assert pixels(found.paths[0]) != pixels(pictures.draw(replace(request_, adapters=[("zorp@20", 1.0)])).paths[0])
    by_path = replace(request_, adapters=[(str(shelf / "adapters" / "rex.safetensors"), 1.0)])
    assert pictures.draw(by_path).settings["adapters"][0]["name"] == "rex"
    with pytest.raises(ModelNotFoundError):
        pictures.draw(replace(request_, model="/nowhere"))
    public = Pictures(Workspace(shelf), PUBLIC, device="cpu")
    with pytest.raises(ConfigError, match="not offered here; choose from pocket"):
        public.draw(request_)


def test_visitors_of_a_space_see_their_own_only(shelf: Path, request_: Request) -> None:
    limits = replace(LIMITS, private_runs=True)
    (shelf / "runs" / "zorp" / "job.json").write_text(json.dumps({"owner": "anna"}))
    try:
        pictures = Pictures(Workspace(shelf), limits, device="cpu")
        asked = replace(request_, adapters=[("zorp@10", 1.0)])
        drawn = pictures.draw(asked, "anna")
        assert pictures.gallery("anna") == drawn.paths and pictures.gallery("tom") == []
        assert "anna" not in str(drawn.paths[0].relative_to(shelf))
        for name in ("zorp@10", "zorp", "runs/zorp"):
            with pytest.raises(ConfigError, match="no adapter"):
                pictures.draw(replace(request_, adapters=[(name, 1.0)]), "tom")
    finally:
        (shelf / "runs" / "zorp" / "job.json").unlink()


def png(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_pictures_of_other_programs(tmp_path: Path) -> None:
    text = "a dog <lora:rex:0.8>,\nbig\nNegative prompt: blur\nSteps: 12, Sampler: Euler a, CFG scale: 5.5, Seed: 9, " \
           "Size: 64x48, Model hash: abc"  # fmt: skip
    found = request_in(png(tmp_path / "a.png", parameters=text), LIMITS, "pocket")
    assert found == Request("pocket", "a dog <lora:rex:0.8>,\nbig", "blur", [], 9, 12, 5.5, 64, 48)
    plain = request_in(png(tmp_path / "b.png", parameters="only words"), LIMITS)
    assert plain.prompt == "only words" and plain.seed is None


def test_strangers_pictures_are_not_believed(tmp_path: Path) -> None:
    def refused(message: str, path: Path) -> None:
        with pytest.raises((ConfigError, DatasetError), match=message) as caught:
            request_in(path, LIMITS)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    def ours(**values: Any) -> Path:
        return png(tmp_path / "x.png", lora_diffusion=json.dumps({"model": "pocket", "prompt": "x", **values}))

    refused("steps 100", ours(steps=100))
    refused("steps", ours(steps="5"))
    refused("seed", ours(seed=1e300))
    refused("count|width", ours(width=10**9))
    refused("list of adapters", ours(adapters="rex"))
    refused("list of adapters", ours(adapters=[1]))
    refused("no text", ours(adapters=[{"weight": 1}]))
    refused("no finite number", ours(adapters=[{"name": "rex", "weight": "strong"}]))
    refused("at most 16", ours(adapters=[{"name": "rex", "weight": 1}] * 1_000))
    refused("characters", ours(prompt="x" * 50_000))
    refused("no text", ours(prompt={"a": 1}))
    refused("damaged", png(tmp_path / "x.png", lora_diffusion="{"))
    refused("damaged", png(tmp_path / "x.png", lora_diffusion="[1]"))
    refused("damaged", png(tmp_path / "x.png", lora_diffusion="[" * 50_000))
    refused("does not say how", png(tmp_path / "x.png"))
    refused("does not say how", png(tmp_path / "x.png", lora_diffusion=json.dumps({"prompt": "x" * 200_000})))
    refused("no PNG", put(tmp_path / "y.png", b"GIF89a" + bytes(100)))
    refused("does not say how", put(tmp_path / "y.png", b"\x89PNG\r\n\x1a\n" + b"\xff" * 8))
    refused("cannot be read", tmp_path / "nobody.png")
    bomb = zlib.compress(b"x" * 100_000_000)
    chunk = b"lora_diffusion\0\0" + bomb
    head = len(chunk).to_bytes(4, "big") + b"zTXt" + chunk + bytes(4)
    refused("does not say how", put(tmp_path / "bomb.png", b"\x89PNG\r\n\x1a\n" + head))
    with pytest.raises(DatasetError, match="larger than 1 MiB"):
        request_in(put(tmp_path / "y.png", bytes(2**20 + 1)), replace(LIMITS, image_bytes=2**20))


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_checked_request_stays_as_it_is(request_: Request) -> None:
    once = checked(replace(request_, adapters=(("rex", 1),)), LIMITS)
    assert once.adapters == [("rex", 1.0)] and checked(once, LIMITS) == once
