"""The pictures of a run as a whole: what is refused before a model is loaded, and what reaches the loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from lora_diffusion import ConfigError, DatasetError
from train.dreambooth import resolve, train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.dreambooth_data import Data, encode_data, read_photos
from train.dreambooth_learn import text_states
from train.randomness import Draws
from train.record import RunFolder, read_events

Make = Callable[..., DreamBoothConfig]


def encoded(config: DreamBoothConfig, pipe: Any) -> tuple[Data, list[dict[str, Any]]]:
    photos = read_photos(config)
    events: list[dict[str, Any]] = []
    full = resolve(config, pipe, len(photos.paths))
    return encode_data(full, pipe, photos, [], RunFolder(config.output_dir, events.append)), events


def test_captions_are_found_and_the_instance_prompt_stands_in_where_there_are_none(
    make_config: Make, rich: Path, photos: Path
) -> None:
    assert read_photos(make_config()).texts == [("a photo of sks dog",)] * 3
    config = make_config(instance_data_dir=str(rich))
    found = read_photos(config)
    assert found.texts[1] == ("sks dog, grass, number 1, sun",) and found.sources[1] == str(rich / "1.txt")
    assert read_photos(replace(config, ignore_captions=True)).texts == [("a photo of sks dog",)] * 5
    (rich / "1.txt").unlink()
    with pytest.raises(DatasetError, match=r"1\.png has no caption"):
        read_photos(config)
    assert read_photos(replace(config, caption_fallback=True)).texts[1] == ("a photo of sks dog",)


def test_captions_from_metadata_with_a_column_of_another_name(make_config: Make, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    folder.mkdir()
    lines = []
    for path in sorted(photos.glob("*.png")):
        (folder / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"file_name": path.name, "long": f"sks in {path.stem}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    found = read_photos(make_config(instance_data_dir=str(folder), caption_column="long"))
    assert found.texts == [("sks in 0",), ("sks in 1",), ("sks in 2",)] and found.remarks == []


def test_templates_and_tags_multiply(make_config: Make, rich: Path, tmp_path: Path) -> None:
    (tmp_path / "templates").write_text("{caption}, photo\n{caption} as {subject}\n")
    config = make_config(
        instance_data_dir=str(rich), caption_template_file=str(tmp_path / "templates"), subject_token="sks dog",
        shuffle_caption=True, keep_tokens=1,
    )  # fmt: skip
    texts = read_photos(config).texts[0]
    assert len(texts) > 4 and all(text.startswith("sks dog, ") for text in texts)
    assert {text.endswith((", photo", " as sks dog")) for text in texts} == {True}
    with pytest.raises(ConfigError, match=r"the pictures have captions .*0\.txt\), and the caption templates do not"):
        read_photos(replace(config, caption_template_file=None, caption_template="object"))
    plain = read_photos(replace(config, caption_template_file=None, caption_template="object", ignore_captions=True))
    assert "a photo of sks dog" in plain.texts[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_tokens": 1}, "--keep_tokens needs --shuffle_caption"),
        ({"caption_template": "photo of {name}"}, r"holds \{name\}"),
        ({"caption_template": "a {subject}"}, "--subject_token"),
        ({"caption_template": "{caption}", "caption_template_file": "x"}, "exclude each other"),
        ({"caption_dropout_rate": 1.5}, "at most 1"),
        ({"mask_dir": "x", "alpha_mask": True}, "exclude each other"),
        ({"unmasked_weight": 0.5}, "--unmasked_weight needs --mask_dir or --alpha_mask"),
    ],
)
def test_settings_that_contradict_each_other(make_config: Make, changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(make_config(**changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "2.txt").write_bytes(b"sks caf\xe9"), r"2\.txt is not UTF-8"),
        (lambda folder: (folder / "2.txt").write_text("sks " + "dog " * 40), r"2\.txt: the prompt 'sks dog.* tokens"),
        (
            lambda folder: (folder / "2.jpg").write_bytes((folder / "2.png").read_bytes()),
            r"2\.txt could belong to 2\.jpg",
        ),
        (lambda folder: (folder / "2.png").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(99)), r"2\.png cannot be read"),
        (lambda folder: (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:99]), r"2\.png cannot be read"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "there is no image in"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    make_config: Make, rich: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    spoil(rich)
    with pytest.raises(DatasetError, match=said) as caught:
        train(make_config(instance_data_dir=str(rich)))
    assert "\n" not in str(caught.value)
    assert not Path(make_config().output_dir).exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda masks: (masks / "1.png").unlink(), r"1\.png has no mask; add "),
        (
            lambda masks: Image.new("L", (9, 9), 255).save(masks / "1.png"),
            r"1\.png has 9×9 pixels, its picture .*48×36",
        ),
        (lambda masks: Image.new("L", (48, 36)).save(masks / "1.png"), r"1\.png leaves nothing to learn"),
        (lambda masks: [path.unlink() for path in masks.iterdir()], "there is no image in"),
    ],
)
def test_bad_masks_are_refused_before_a_model_is_loaded(
    make_config: Make, rich: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    masks = rich.parent / "masks"
    spoil(masks)
    with pytest.raises(DatasetError, match=said):
        train(make_config(instance_data_dir=str(rich), mask_dir=str(masks), pretrained_model_name_or_path="nowhere"))


def test_alpha_masks_need_alpha(make_config: Make, photos: Path) -> None:
    with pytest.raises(DatasetError, match=r"0\.png has no transparency"):
        read_photos(make_config(alpha_mask=True))


def test_what_is_odd_but_no_error_is_told(make_config: Make, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (12, 12), "green").save(folder / "b.png")
    for name, caption in (("a", "a dog"), ("b", "sks dog"), ("old", "sks dog")):
        (folder / f"{name}.txt").write_text(caption)
    (folder / "c.heic").write_bytes(b"")
    result = train(make_config(instance_data_dir=str(folder), max_train_steps=1))
    events = read_events(result.output_dir / "events.jsonl")
    warnings = " | ".join(event["message"] for event in events if event["event"] == "warning")
    for said in (
        "1 file is not used, since its kind cannot be read: ",
        "1 text file is not used, since no picture has its name: ",
        "a.gif holds several pictures (GIF); the first one is used",
        "1 of 2 captions do not hold the subject's word (sks)",
        "1 of 2 pictures are much smaller than they are trained at",
    ):
        assert said in warnings
    assert not [event for event in read_events(train(make_config("plain")).output_dir / "events.jsonl")
                if event["event"] == "warning"]  # fmt: skip


@pytest.mark.parametrize("kind", ["mask_dir", "alpha_mask"])
def test_masks_follow_their_pictures_into_buckets(make_config: Make, rich: Path, tiny_pipeline: Any, kind: str) -> None:
    masks: Any = True if kind == "alpha_mask" else str(rich.parent / "masks")
    config = make_config(
        instance_data_dir=str(rich),
        aspect_ratio_buckets="auto",
        random_flip=True,
        unmasked_weight=0.25,
        **{kind: masks},
    )
    data, events = encoded(config, tiny_pipeline)
    shapes = [tuple(views[0].mean.shape[1:]) for views in data.instance.pictures]
    assert shapes == [(8, 8), (7, 9), (9, 7), (7, 9), (8, 8)]  # 32×32, 36×28 and 28×36 pixels
    assert [event["message"] for event in events if event["event"] == "note"] == [
        "photos encoded in 3 of 17 buckets: 1 at 28×36, 2 at 32×32, 2 at 36×28"
    ]
    for position in range(20):
        sample = data.instance.draw(Draws(3), position, 1000)
        assert sample.mask is not None and sample.mask.shape == (1, *sample.latents.shape[1:])
        height = sample.mask.shape[1]
        assert torch.all(sample.mask[:, : height // 2 - 1] == 1.0)  # the upper half is white
        assert torch.all(sample.mask[:, height // 2 + 2 :] == 0.25)
        assert sample.sizes[4:] == (4 * sample.mask.shape[1], 4 * sample.mask.shape[2])


def test_only_what_is_white_is_learned(make_config: Make, rich: Path, tiny_pipeline: Any, monkeypatch: Any) -> None:
    """The lower halves are masked out: what the loss is told to weigh there is nothing."""
    from train import dreambooth_learn

    told: list[torch.Tensor] = []
    original = dreambooth_learn.losses

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        told.append(kwargs["masks"])
        return original(*args, **kwargs)

    monkeypatch.setattr(dreambooth_learn, "losses", watched)
    settings = {"instance_data_dir": str(rich), "max_train_steps": 1, "train_batch_size": 2}
    masked = train(make_config("masked", alpha_mask=True, **settings))
    plain = train(make_config("plain", **settings))
    assert told[0].shape == (2, 1, 8, 8) and float(told[0][:, :, 6:].max()) == 0.0 and told[1] is None
    assert masked.adapter and plain.adapter and masked.adapter.read_bytes() != plain.adapter.read_bytes()


def test_accumulation_equals_a_bigger_batch_with_everything_on(make_config: Make, rich: Path) -> None:
    settings = {
        "instance_data_dir": str(rich), "aspect_ratio_buckets": "auto", "random_flip": True, "alpha_mask": True,
        "shuffle_caption": True, "caption_dropout_rate": 0.2, "caption_template": "{caption}, photo",
        "max_train_steps": 3, "adam_epsilon": 1e-3, "train_text_encoder": True,
    }  # fmt: skip
    big = train(make_config("big", train_batch_size=4, **settings))
    small = train(make_config("small", gradient_accumulation_steps=4, **settings))
    assert big.adapter and small.adapter
    left, right = (ld.read_adapter(result.adapter).flat() for result in (big, small))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-6)


def test_square_pictures_do_not_notice_buckets(make_config: Make, rich: Path) -> None:
    for number in (1, 2, 3):
        for ending in ("png", "txt"):
            (rich / f"{number}.{ending}").unlink()
    config = make_config("plain", instance_data_dir=str(rich), train_batch_size=2)
    plain, bucketed = (
        train(config),
        train(replace(config, output_dir=config.output_dir + "2", aspect_ratio_buckets="auto")),
    )
    assert plain.adapter and bucketed.adapter
    left, right = (ld.read_adapter(result.adapter).flat() for result in (plain, bucketed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_captions_and_masks_are_part_of_what_a_run_is_trained_on(
    make_config: Make, rich: Path, tiny_pipeline: Any
) -> None:
    config = make_config(instance_data_dir=str(rich), mask_dir=str(rich.parent / "masks"))
    prints = [encoded(config, tiny_pipeline)[0].fingerprint]
    (rich / "0.txt").write_text("sks dog in another place")
    prints.append(encoded(config, tiny_pipeline)[0].fingerprint)
    Image.new("L", (32, 32), 255).save(rich.parent / "masks" / "0.png")
    prints.append(encoded(config, tiny_pipeline)[0].fingerprint)
    prints.append(encoded(replace(config, mask_dir=None), tiny_pipeline)[0].fingerprint)
    prints.append(encoded(replace(config, mask_dir=None, ignore_captions=True), tiny_pipeline)[0].fingerprint)
    assert len(set(prints)) == 5


def test_all_texts_of_a_run_are_known_before_it_starts(make_config: Make, rich: Path, tiny_pipeline: Any) -> None:
    config = make_config(
        instance_data_dir=str(rich), shuffle_caption=True, caption_dropout_rate=0.5, caption_template="{caption} x"
    )
    data, _ = encoded(config, tiny_pipeline)
    texts = text_states(config, tiny_pipeline, read_photos(config))
    texts.cache()
    said = {data.instance.draw(Draws(3), position, 1000).caption for position in range(60)}
    assert "" in said and len(said) > 10
    assert texts.states(sorted(said))["encoder_hidden_states"].shape[0] == len(said)


def test_a_list_of_buckets_must_suit_the_model(make_config: Make) -> None:
    with pytest.raises(ConfigError, match="the sides of 32,30 must be multiples of 4"):
        train(make_config(aspect_ratio_buckets="32,30"))
    assert not Path(make_config().output_dir).exists()
