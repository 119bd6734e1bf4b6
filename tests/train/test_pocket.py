"""The embedded model is a Stable Diffusion as diffusers knows it, small enough to ship, and its judge can see."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import lora_diffusion as ld
from train.demo import recipe
from train.judge import Judge, pocket_judge
from train.likeness import following, gap_closed, scale
from train.models import load_pipeline
from train.pocket import judge_dir, pocket_dir
from train.subjects import Ask, load_subject, subject_names

LIMIT = 24e6


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("pocket")


def test_diffusers_loads_it_as_it_is_and_draws():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pocket_dir())
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a red cup", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 5


def test_weights_are_fp16_and_fit():
    files = list(pocket_dir().rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= LIMIT


def test_attention_is_where_stable_diffusion_has_it(pipe):
    names = {name for name, _ in pipe.unet.named_modules()}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        assert f"mid_block.attentions.0.transformer_blocks.0.attn2.{part}" in names


def test_any_word_tokenises(pipe):
    ids = pipe.tokenizer("sks Größe 你好 🐶").input_ids
    assert pipe.tokenizer.unk_token_id not in ids[1:-1]


def test_subjects_are_complete():
    assert len(subject_names()) == 4
    for name in subject_names():
        subject = load_subject(name)
        assert len(subject.photos()) == 5
        assert all(len(subject.sheet(role)) == 20 for role in ("true", "one_wrong", "half_formed", "random"))
        assert subject.class_word in subject.instance_prompt


def test_pictures_with_an_adapter_are_those_of_load_lora_weights(tmp_path):
    """The saved file in diffusers' own loader, same seeds: no pixel further off than 1/255."""
    from diffusers import StableDiffusionPipeline

    def draw(pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        prompts = ["a photo of sks creature on a beach", "a photo of sks cup at night"]
        return np.stack([np.asarray(image, int) for image in pipe(
            prompts, num_inference_steps=8, guidance_scale=3.0, generator=generators).images])  # fmt: skip

    ours, theirs = load_pipeline("pocket"), StableDiffusionPipeline.from_pretrained(pocket_dir())
    for each in (ours, theirs):
        each.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    targets = recipe(load_subject("zorp"), "", seed=0, max_train_steps=1).target_modules.split(",")
    config = ld.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=targets)
    base = draw(ours)
    ld.add_adapter(ours, config, components=["unet", "text_encoder"])
    ld.save_adapter(ours, tmp_path / "adapter.safetensors")
    theirs.load_lora_weights(tmp_path / "adapter.safetensors")
    assert np.abs(draw(ours) - draw(theirs)).max() <= 1
    assert np.abs(draw(ours) - base).max() > 50


def test_the_judge_tells_the_subject_from_near_misses(pipe):
    """True > one attribute wrong > random, for every subject, also through the autoencoder; half-formed ones too."""
    for name in subject_names():
        found = scale(pocket_judge(), load_subject(name), pipe)
        assert found["true, through the autoencoder"] > found["one attribute wrong"] + 0.1
        assert found["true, through the autoencoder"] > found["half-formed"] + 0.1
        assert found["one attribute wrong"] > found["random of its class"]


def test_the_judge_knows_what_it_was_taught():
    facts = json.loads((judge_dir() / "judge.json").read_text())["accuracy"]
    for pictures in ("renders", "decoded"):
        assert all(facts[pictures][name] > 0.9 for name in ("kind", "colour", "place"))


def test_reading_a_picture_gives_every_head():
    judge = Judge(judge_dir())
    seen = judge.read([Image.new("RGB", (64, 64), (214, 40, 40))])[0]
    assert seen.keys() == judge.heads.keys()
    assert seen["place"] == "red"


def test_following_counts_what_was_asked():
    judge = pocket_judge()
    red, blue = (Image.new("RGB", (64, 64), c) for c in ((214, 40, 40), (45, 90, 205)))
    assert following(judge, [red, blue], [Ask("", {"place": "red"}), Ask("", {"place": "red"})]) == 0.5


def test_gap_closed():
    assert gap_closed(0.2, 0.6, 1.0) == pytest.approx(0.5)
    assert gap_closed(0.9, 0.95, 0.8) == 0.0
