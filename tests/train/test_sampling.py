"""Drawing: a picture depends on its own seed; a PNG knows how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from lora_diffusion import AdapterFormatError, ConfigError, ModelNotFoundError, TrainingError
from train import models
from train.models import load_pipeline, resolve_model
from train.pictures import parameters_text, read_settings, readable_name, save_png
from train.sample import parse_adapter, sample
from train.sample_config import SampleConfig
from train.sampling import generate


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.fixture
def two_adapters(tiny_pipeline: Any, tmp_path: Path) -> tuple[Path, Path]:
    paths = (tmp_path / "rex.safetensors", tmp_path / "style" / "adapter.safetensors")
    paths[1].parent.mkdir()
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False), name=f"a{number}")
        ld.save_adapter(tiny_pipeline, path, name=f"a{number}")
    ld.unload(tiny_pipeline)
    return paths


def test_a_picture_depends_on_its_seed_alone(tiny_pipeline: Any) -> None:
    together = generate(tiny_pipeline, "a cat", [5, 6, 7], steps=3, batch_size=3)
    apart = generate(tiny_pipeline, ["a dog", "a cat", "a cat"], [1, 7, 5], steps=3, batch_size=2)
    assert np.abs(array(together[2]) - array(apart[1])).max() <= 1
    assert np.abs(array(together[0]) - array(apart[2])).max() <= 1
    assert np.abs(array(together[0]) - array(together[1])).max() > 1
    theirs = tiny_pipeline("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.abs(array(theirs) - array(together[0])).max() <= 1


def test_modes_are_put_back_and_counts_checked(tiny_pipeline: Any) -> None:
    tiny_pipeline.unet.train()
    seen: list[int] = []
    generate(tiny_pipeline, "x", [1, 2], steps=1, batch_size=1, on_image=lambda index, _: seen.append(index))
    assert seen == [0, 1] and tiny_pipeline.unet.training and not tiny_pipeline.vae.training
    with pytest.raises(ConfigError, match="2 prompts for 3 seeds"):
        generate(tiny_pipeline, ["x", "y"], [1, 2, 3])
    assert generate(tiny_pipeline, "x", [1, 2], steps=1, batch_size=1, should_stop=lambda: True) == []


def test_nan_is_an_error_and_not_a_black_picture(tiny_pipeline: Any) -> None:
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        generate(tiny_pipeline, "x", [1], steps=1)


def test_a_job_with_two_adapters(tiny_pipeline_dir: Path, two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    rex, style = two_adapters
    config = SampleConfig(
        str(tiny_pipeline_dir), ("sks dog", "A cat, on the moon!"), (f"{rex}:0.5", str(style)), num_images=2,
        num_inference_steps=2, output_dir=str(tmp_path / "out"), seed=7, negative_prompt="blurry",
    )  # fmt: skip
    events: list[dict[str, Any]] = []
    paths = sample(config, on_event=events.append)
    assert [path.name for path in paths] == [
        "sks-dog_rex-0.5_style_seed7.png", "sks-dog_rex-0.5_style_seed8.png",
        "a-cat-on-the-moon_rex-0.5_style_seed7.png", "a-cat-on-the-moon_rex-0.5_style_seed8.png",
    ]  # fmt: skip
    assert [event["event"] for event in events] == ["start", *["sample"] * 4, "end"]
    settings = read_settings(paths[1])
    assert settings["prompt"] == "sks dog" and settings["seed"] == 8 and settings["steps"] == 2
    assert settings["guidance"] == 7.5 and settings["model"] == str(tiny_pipeline_dir)
    assert settings["adapters"] == [
        {"name": "rex", "file": str(rex), "weight": 0.5}, {"name": "style", "file": str(style), "weight": 1.0},
    ]  # fmt: skip
    with Image.open(paths[1]) as image:
        line = image.text["parameters"]
    assert line.startswith("sks dog <lora:rex:0.5> <lora:style:1>\nNegative prompt: blurry\nSteps: 2, CFG scale: 7.5")
    assert sample(config) == paths  # the same again overwrites; other settings do not
    other = sample(SampleConfig(**{**config.__dict__, "guidance_scale": 2.0, "num_images": 1, "prompt": ("sks dog",)}))
    assert other[0].name == "sks-dog_rex-0.5_style_seed7_2.png"


def test_weights_count(tiny_pipeline: Any, two_adapters: tuple[Path, Path]) -> None:
    from train.sample import Wanted, load_adapters

    base = array(generate(tiny_pipeline, "x", [1], steps=2)[0])
    load_adapters(tiny_pipeline, [Wanted(str(two_adapters[0]), 0.0), Wanted(str(two_adapters[1]), 0.0)])
    assert np.abs(array(generate(tiny_pipeline, "x", [1], steps=2)[0]) - base).max() <= 1
    ld.set_adapters(tiny_pipeline, ["adapter_0", "adapter_1"], [1.0, 1.0])
    assert np.abs(array(generate(tiny_pipeline, "x", [1], steps=2)[0]) - base).max() > 1


def test_a_long_prompt_is_said_to_be_cut(tiny_pipeline_dir: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    config = SampleConfig(str(tiny_pipeline_dir), ("word " * 30,), num_inference_steps=1, output_dir=str(tmp_path))
    sample(config, on_event=events.append)
    assert any(event["event"] == "warning" and "first 77" in event["message"] for event in events)


def test_adapter_arguments(tmp_path: Path) -> None:
    assert (parse_adapter("a.safetensors").weight, parse_adapter("a.safetensors:0.25").weight) == (1.0, 0.25)
    assert parse_adapter("C:\\dog.safetensors").file == "C:\\dog.safetensors"
    odd = tmp_path / "a:2"
    odd.write_text("")
    assert parse_adapter(str(odd)).file == str(odd)
    for text in ("a.safetensors:much", "a.safetensors:inf", "a.safetensors:nan"):
        with pytest.raises(ConfigError):
            parse_adapter(text)


def test_a_wrong_adapter_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterFormatError):
        sample(SampleConfig("/nowhere", ("x",), (str(tmp_path / "x.safetensors"),)))


def test_names_and_texts(tmp_path: Path) -> None:
    assert readable_name("§§", 3) == "picture_seed3"
    assert len(readable_name("a very long prompt " * 20, 3)) < 80
    assert parameters_text({"prompt": "x", "seed": 1, "width": 8, "height": 9}) == "x\nSeed: 1, Size: 8x9"
    path = save_png(Image.new("RGB", (2, 2)), tmp_path / "deep" / "a.png", {"prompt": "größe", "seed": 1})
    assert read_settings(path) == {"prompt": "größe", "seed": 1}
    assert [one.name for one in path.parent.iterdir()] == ["a.png"]


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(ModelNotFoundError, match="no model folder"):
            resolve_model(name)
    with pytest.raises(ModelNotFoundError, match=r"model_index\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "one.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="single file"):
        resolve_model(str(tmp_path / "one.safetensors"))
    monkeypatch.setattr(models, "pocket_dir", lambda: tmp_path)
    assert resolve_model("pocket") == str(tmp_path)
    assert resolve_model("owner/name") == "owner/name"


def test_models_of_another_kind_or_damaged(tmp_path: Path) -> None:
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(ConfigError, match="is a 'StableDiffusion3Pipeline'"):
        load_pipeline(str(tmp_path))
    index.write_text("{")
    with pytest.raises(ModelNotFoundError, match="damaged"):
        load_pipeline(str(tmp_path))
    index.write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(ModelNotFoundError) as caught:
        load_pipeline(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_every_component_is_in_the_precision_asked_for(
    tiny_pipeline_dir: Path, precision: str, dtype: torch.dtype
) -> None:
    pipe = load_pipeline(str(tiny_pipeline_dir), precision=precision)
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {dtype}
    assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
