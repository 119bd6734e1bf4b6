"""Judges: tiny DINO, DINOv2 and CLIP of random weights in local folders, pocket's own, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_diffusion import ConfigError, ModelNotFoundError
from train import metrics
from train.encoders import KNOWN, Clip, Pocket, VisionTransformer, find_encoders
from train.judge import pocket_judge
from train.likeness import through_autoencoder
from train.models import load_pipeline
from train.pocket_words import asked
from train.subjects import load_subject, subject_names


def noise(count: int, side: int = 40) -> list[Image.Image]:
    draws = np.random.default_rng(0)
    return [Image.fromarray(draws.integers(0, 255, (side, side + 8, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_a_vision_transformer_judges_pictures_and_reads_nothing(judge_folders: dict[str, Path], name: str) -> None:
    found = find_encoders(str(judge_folders[name]), "none", "some/model")
    assert isinstance(found.image, VisionTransformer) and found.text is None
    pictures = noise(20)
    embeddings = found.image.embed(pictures)
    assert embeddings.shape == (20, 32) and embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(20), atol=1e-5)
    assert torch.allclose(found.image.embed(pictures[17:18]), embeddings[17:18], atol=1e-5)  # batches do not mix
    assert found.image.follows(pictures, ["a"] * 20) is None
    assert found.names == {"image": judge_folders[name].name, "text": None}


def test_clip_reads_texts_in_the_space_of_its_pictures(judge_folders: dict[str, Path]) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    found = find_encoders(str(judge_folders["clip"]), str(judge_folders["clip"]), "some/model")
    assert isinstance(found.image, Clip) and found.text is found.image
    pictures, prompts = noise(3), ["a dog", "a red cup on a beach", "a dog"]
    scores = found.text.follows(pictures, prompts)
    model = CLIPModel.from_pretrained(judge_folders["clip"])
    tokens = CLIPTokenizer.from_pretrained(judge_folders["clip"])(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        texts = metrics.as_unit(model.text_projection(model.text_model(**tokens).pooler_output))
    assert scores is not None
    assert torch.allclose(scores, (found.image.embed(pictures) * texts).sum(-1), atol=1e-5)


def test_the_judge_that_fits_is_found(judge_folders: dict[str, Path]) -> None:
    found = find_encoders("auto", "auto", "pocket")
    assert isinstance(found.image, Pocket) and found.text is found.image
    mixed = find_encoders("auto", str(judge_folders["clip"]), "pocket")
    assert isinstance(mixed.image, Pocket) and isinstance(mixed.text, Clip)


def test_without_the_hub_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no such host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    for name, (repository, _) in KNOWN.items():
        with pytest.raises(ModelNotFoundError, match="no such host") as problem:
            find_encoders(name, "none", "some/model")
        said = str(problem.value)
        assert repository in said and "give --image_encoder a folder" in said and "'pocket'" in said
        assert "\n" not in said
    with pytest.raises(ModelNotFoundError, match="give --text_encoder a folder with a CLIP"):
        find_encoders("pocket", "auto", "some/model")


def test_folders_that_cannot_be_used(judge_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        find_encoders(str(tmp_path / "nothing"), "none", "pocket")
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        find_encoders("dinno", "none", "pocket")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        find_encoders(str(tmp_path), "none", "pocket")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert; vit, dinov2, clip are supported"):
        find_encoders(str(tmp_path), "none", "pocket")
    with pytest.raises(ConfigError, match="reads no text"):
        find_encoders("pocket", str(judge_folders["dino"]), "pocket")


def test_weights_that_are_missing_are_not_made_up(judge_folders: dict[str, Path], tmp_path: Path) -> None:
    for file in judge_folders["dino"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in sorted(tensors) if "layer" in name and name.endswith("weight"))
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lacks weights of a vit"):
        find_encoders(str(tmp_path), "none", "pocket")


def test_pickles_and_code_of_others_are_not_run(judge_folders: dict[str, Path], tmp_path: Path) -> None:
    for file in judge_folders["dino"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        find_encoders(str(tmp_path), "none", "pocket")
    (tmp_path / "config.json").write_text(
        '{"model_type": "special", "auto_map": {"AutoConfig": "special.C", "AutoModel": "special.M"}}'
    )
    (tmp_path / "special.py").write_text("raise SystemExit('was run')")
    with pytest.raises((ModelNotFoundError, ConfigError), match="cannot be loaded"):
        find_encoders(str(tmp_path), "none", "pocket")


@pytest.mark.parametrize("name", subject_names())
def test_prompts_are_read_as_the_shipped_subjects_mean_them(name: str) -> None:
    subject, heads = load_subject(name), pocket_judge().heads
    for ask in (*subject.places, *subject.company):
        assert asked(ask.prompt, heads) == ask.asks


@pytest.mark.parametrize(
    ("prompt", "asks"),
    [
        ("sks dog", {}),
        ("sks at night", {"place": "night"}),
        (
            "a big striped red and blue creature with three eyes and a green belly on the left at night",
            {"place": "night", "count": "1", "kind": "creature", "colour": "red", "colour2": "blue",
             "pattern": "striped", "size": "big", "side": "on the left"},
        ),
        (
            "a creature with horns and a red heart and a blue car",
            {"count": "2", "kind": "creature", "kind_b": "car", "colour_b": "blue"},
        ),
        ("a cup next to a pink and white house", {"count": "2", "kind": "cup", "kind_b": "house"}),
    ],
)  # fmt: skip
def test_other_prompts_that_pocket_knows(prompt: str, asks: dict[str, str]) -> None:
    assert asked(prompt, pocket_judge().heads) == asks


def test_pocket_finds_what_prompts_ask_in_the_photos_it_was_not_shown() -> None:
    subject = load_subject("zorp")
    judge = Pocket()
    pictures = subject.photos()
    right = judge.follows(pictures, ["a creature"] * 5)
    wrong = judge.follows(pictures, ["a car and a blue house in the desert"] * 5)
    silent = judge.follows(pictures, ["sks"] * 5)
    assert right is not None and wrong is not None and silent is not None
    assert float(right.mean()) == 1.0 and float(wrong.mean()) == 0.0 and bool(silent.isnan().all())


def test_copies_are_told_from_the_subject_in_other_scenes() -> None:
    """The figures in the doc of `metrics.copy_limit`."""
    pipe, judge = load_pipeline("pocket"), Pocket()
    other = copied = stricter = 0
    for name in subject_names():
        subject = load_subject(name)
        real = judge.embed(subject.photos())
        limit, closest = metrics.copy_limit(real), metrics.nearest_among(real)
        assert limit is not None and closest is not None
        elsewhere = metrics.nearest(judge.embed(subject.sheet("true")), real)
        other, stricter = other + int((elsewhere > limit).sum()), stricter + int((elsewhere > closest).sum())
        decoded = through_autoencoder(pipe, subject.photos())
        copied += int((metrics.nearest(judge.embed(decoded), real) > limit).sum())
    assert (other, stricter, copied) == (0, 38, 17)
