"""Words that an adapter brings: in with it, out with it, and in its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld


@pytest.fixture
def adapter(tiny_pipeline: Any, randomise: Callable[..., None]) -> ld.Adapter:
    """An adapter of the tiny pipeline with a word of one vector and one of three."""
    ld.add_adapter(tiny_pipeline, ld.LoraConfig(r=2), components=("unet", "text_encoder"))
    randomise(tiny_pipeline)
    adapter = ld.get_adapter(tiny_pipeline)
    ld.unload(tiny_pipeline)
    g = torch.Generator().manual_seed(0)
    adapter.tokens = {
        "<s1>": {"text_encoder": torch.randn(1, 32, generator=g)},
        "<dog>": {"text_encoder": torch.randn(3, 32, generator=g)},
    }
    return adapter


def ids(pipeline: Any, prompt: str) -> list[int]:
    return pipeline.tokenizer(pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)).input_ids[1:-1]


def test_words_act_and_leave(
    tiny_pipeline: Any, adapter: ld.Adapter, bits: Callable[[nn.Module], dict[str, bytes]]
) -> None:
    before, embedding = bits(tiny_pipeline.text_encoder), tiny_pipeline.text_encoder.get_input_embeddings()
    spelled = ids(tiny_pipeline, "<s1>")
    report = ld.load_adapter(tiny_pipeline, adapter, "dog")
    assert report.tokens == ["<s1>", "<dog>"] and report.complete
    rows = tiny_pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows[ids(tiny_pipeline, "<s1>")], adapter.tokens["<s1>"]["text_encoder"])
    assert torch.equal(rows[ids(tiny_pipeline, "<dog>")], adapter.tokens["<dog>"]["text_encoder"])
    assert "<dog>" in str(report)
    ld.delete_adapter(tiny_pipeline, "dog")
    assert bits(tiny_pipeline.text_encoder) == before
    assert tiny_pipeline.text_encoder.get_input_embeddings() is embedding
    assert ids(tiny_pipeline, "<s1>") == spelled


def test_two_adapters_with_words_of_their_own(tiny_pipeline: Any, adapter: ld.Adapter) -> None:
    ld.load_adapter(tiny_pipeline, adapter, "dog")
    other = ld.Adapter(adapter.components, tokens={"<cat>": {"text_encoder": torch.ones(2, 32)}})
    ld.load_adapter(tiny_pipeline, other, "cat")
    ld.delete_adapter(tiny_pipeline, "dog")
    rows = tiny_pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows[ids(tiny_pipeline, "<cat>")], torch.ones(2, 32))
    assert len(ids(tiny_pipeline, "<s1>")) > 1
    ld.unload(tiny_pipeline)
    assert tiny_pipeline.text_encoder.get_input_embeddings().weight.shape[0] == 514


@pytest.mark.parametrize("format", ["diffusers"])
def test_they_travel_in_the_file(tiny_pipeline: Any, adapter: ld.Adapter, tmp_path: Path, format: str) -> None:
    """Saved from a pipeline and loaded again; diffusers loads the rest of the file without a word about them."""
    ld.load_adapter(tiny_pipeline, adapter, "dog")
    path = tmp_path / "dog.safetensors"
    ld.save_adapter(tiny_pipeline, path, "dog", format)
    ld.unload(tiny_pipeline)
    for word, vectors in ld.read_adapter(path).tokens.items():
        assert torch.equal(vectors["text_encoder"], adapter.tokens[word]["text_encoder"])
    tiny_pipeline.load_lora_weights(str(path))
    assert tiny_pipeline.get_list_adapters()["unet"]


@pytest.mark.parametrize(
    ("word", "shape", "words"),
    [
        ("<s1>", (1, 31), "(1, 31)"),
        ("a</w>", (1, 32), "has that word already"),
        ("<s1>", (32,), "(32,)"),
    ],
)
def test_what_cannot_go_in(
    tiny_pipeline: Any,
    adapter: ld.Adapter,
    bits: Callable[[nn.Module], dict[str, bytes]],
    word: str,
    shape: tuple[int, ...],
    words: str,
) -> None:
    before = bits(tiny_pipeline.text_encoder)
    adapter.tokens = {word: {"text_encoder": torch.ones(shape)}}
    with pytest.raises(ld.AdapterMismatchError) as caught:
        ld.load_adapter(tiny_pipeline, adapter)
    assert words in str(caught.value) and word in str(caught.value)
    assert bits(tiny_pipeline.text_encoder) == before
    report = ld.load_adapter(tiny_pipeline, adapter, strict=False)
    assert word in report.refused_tokens and not report.complete and report.unmatched == 0


def test_a_bare_module_has_no_tokenizer(tiny_pipeline: Any, adapter: ld.Adapter) -> None:
    alone = ld.Adapter({"text_encoder": adapter.components["text_encoder"]}, tokens=adapter.tokens)
    with pytest.raises(ld.AdapterMismatchError, match="needs a pipeline with a tokenizer"):
        ld.load_adapter(tiny_pipeline.text_encoder, alone)


def test_words_alone_are_no_adapter(tiny_pipeline: Any, adapter: ld.Adapter) -> None:
    with pytest.raises(ld.AdapterMismatchError, match="load_textual_inversion"):
        ld.load_adapter(tiny_pipeline, ld.Adapter({}, tokens=adapter.tokens))
