"""What the denoiser is told of a prompt is what diffusers' own pipelines would tell it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion import ConfigError
from train.families import family_of
from train.models import load_pipeline
from train.text_states import TextStates, token_count, token_limit

TEXTS = ["a photo of sks dog", "größe 🐶", "a photo of sks dog"]


@pytest.fixture
def sdxl(tiny_sdxl_dir: Path) -> Any:
    return load_pipeline(str(tiny_sdxl_dir))


def encoded(pipe: Any, texts: list[str], **options: Any) -> TextStates:
    states = TextStates(pipe, **options)
    states.add(texts)
    return states


@torch.no_grad()
def test_stable_diffusion(tiny_pipeline: Any) -> None:
    states = encoded(tiny_pipeline, TEXTS)
    theirs, _ = tiny_pipeline.encode_prompt(TEXTS, "cpu", 1, False)
    ours = states.states(TEXTS)
    assert list(ours) == ["encoder_hidden_states"]
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs, rtol=1e-5, atol=1e-6)
    states.cache()
    tiny_pipeline.text_encoder = None  # it has done its work
    torch.testing.assert_close(states.states(TEXTS)["encoder_hidden_states"], theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_mask_where_the_model_or_the_user_wants_one(tiny_pipeline: Any) -> None:
    plain = encoded(tiny_pipeline, TEXTS).states(TEXTS)["encoder_hidden_states"]
    asked = encoded(tiny_pipeline, TEXTS, use_mask=True).states(TEXTS)["encoder_hidden_states"]
    tiny_pipeline.text_encoder.config.use_attention_mask = True
    theirs, _ = tiny_pipeline.encode_prompt(TEXTS, "cpu", 1, False)
    torch.testing.assert_close(asked, theirs, rtol=1e-5, atol=1e-6)
    told = encoded(tiny_pipeline, TEXTS).states(TEXTS)["encoder_hidden_states"]
    torch.testing.assert_close(told, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, theirs, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_sdxl(sdxl: Any, cached: bool) -> None:
    states = encoded(sdxl, TEXTS)
    hidden, _, pooled, _ = sdxl.encode_prompt(TEXTS, do_classifier_free_guidance=False)
    sizes = [(600, 800, 0, 12, 32, 32), (48, 40, 3, 0, 32, 24), (32, 32, 0, 0, 32, 32)]
    times = [
        sdxl._get_add_time_ids(
            row[:2], row[2:4], row[4:], dtype=hidden.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        for row in sizes
    ]
    if cached:
        states.cache()
    ours = states.states(TEXTS, sizes)
    assert sorted(ours) == ["added_cond_kwargs", "encoder_hidden_states"]
    assert sorted(ours["added_cond_kwargs"]) == ["text_embeds", "time_ids"]
    assert ours["encoder_hidden_states"].shape == (3, 77, 32 + 24) and pooled.shape == (3, 20)
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["added_cond_kwargs"]["text_embeds"], pooled, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours["added_cond_kwargs"]["time_ids"], torch.cat(times))


@torch.no_grad()
def test_sdxl_reads_the_empty_prompt_as_zeros(sdxl: Any) -> None:
    _, hidden, _, pooled = sdxl.encode_prompt(["x"])  # what it is shown for guidance
    states = encoded(sdxl, ["x", ""])
    ours = states.states(["x", ""])
    assert torch.equal(ours["encoder_hidden_states"][1:], hidden)
    assert torch.equal(ours["added_cond_kwargs"]["text_embeds"][1:], pooled)
    assert float(ours["encoder_hidden_states"][0].abs().max()) > 0
    sdxl.register_to_config(force_zeros_for_empty_prompt=False)
    _, hidden, _, pooled = sdxl.encode_prompt(["x"])
    ours = states.states([""])
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden, rtol=1e-5, atol=1e-6)
    assert float(hidden.abs().max()) > 0


def test_pictures_whose_sizes_are_not_told(sdxl: Any) -> None:
    assert encoded(sdxl, ["x"]).states(["x"])["added_cond_kwargs"]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    smaller = encoded(sdxl, ["x"], resolution=16).states(["x"])
    assert smaller["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]


def test_gradients_reach_both_encoders_but_not_the_layer_that_is_passed_over(sdxl: Any) -> None:
    for encoder in family_of(sdxl).encoders_of(sdxl).values():
        encoder.requires_grad_(True)
    said = encoded(sdxl, ["x", "y"]).states(["x", "y", "x"])
    (said["encoder_hidden_states"].square().sum() + said["added_cond_kwargs"]["text_embeds"].square().sum()).backward()
    family = family_of(sdxl)
    for component, encoder in family.encoders_of(sdxl).items():
        unread = family.unread_layers(sdxl, component)
        for path, module in encoder.named_modules():
            if not path.endswith("q_proj"):
                continue
            moved = module.weight.grad is not None and float(module.weight.grad.abs().max()) > 0
            passed_over = component == "text_encoder" and ".1." in path
            assert moved is not passed_over, (component, path)
            assert (unread is not None and re.fullmatch(unread, path) is not None) is passed_over


def test_lengths(sdxl: Any, tiny_pipeline: Any) -> None:
    assert token_limit(sdxl) == token_limit(tiny_pipeline) == 77
    assert token_count(sdxl, "ab") == 4
    with pytest.raises(ConfigError, match="has 82 tokens, 77 is the limit"):
        TextStates(sdxl).add(["x" * 80])
    with pytest.raises(ConfigError, match="has 12 tokens, 8 is the limit"):
        TextStates(sdxl, max_length=8).add(["x" * 10])
    with pytest.raises(ConfigError, match="--tokenizer_max_length 100 is more than the text encoder reads, 77"):
        TextStates(sdxl, max_length=100)
    assert encoded(sdxl, ["x"], max_length=8).states(["x"])["encoder_hidden_states"].shape == (1, 8, 56)
    sdxl.tokenizer_2.add_tokens(["dog"])  # from now on the tokenizers differ
    assert token_count(sdxl, "dog") == 5
    sdxl.tokenizer_2.model_max_length = 10**30  # as some files say; the positions are the limit then
    assert token_limit(sdxl) == 77


def test_words_of_several_vectors(tiny_pipeline: Any) -> None:
    before = token_count(tiny_pipeline, "a <s> dog")
    tiny_pipeline.load_textual_inversion(torch.ones(4, 32), token="<s>")
    assert token_count(tiny_pipeline, "a <s> dog") == before + 1  # it was three letters
    theirs, _ = tiny_pipeline.encode_prompt("a <s> dog", "cpu", 1, False)
    ours = encoded(tiny_pipeline, ["a <s> dog"]).states(["a <s> dog"])["encoder_hidden_states"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
