"""Words that an adapter brings: in with it, out with it, and in its file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
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


def embedded(pipeline: Any, prompt: str) -> torch.Tensor:
    return pipeline.text_encoder.get_input_embeddings()(torch.tensor(ids(pipeline, prompt)))


def test_words_act_and_leave(
    tiny_pipeline: Any, adapter: ld.Adapter, bits: Callable[[nn.Module], dict[str, bytes]]
) -> None:
    before, embedding = bits(tiny_pipeline.text_encoder), tiny_pipeline.text_encoder.get_input_embeddings()
    spelled = ids(tiny_pipeline, "<s1>")
    report = ld.load_adapter(tiny_pipeline, adapter, "dog")
    assert report.tokens == ["<s1>", "<dog>"] and report.complete
    for word in ("<s1>", "<dog>"):
        assert torch.equal(embedded(tiny_pipeline, word), adapter.tokens[word]["text_encoder"])
    assert torch.equal(embedded(tiny_pipeline, "a dog"), embedding.weight[ids(tiny_pipeline, "a dog")])
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
    assert torch.equal(embedded(tiny_pipeline, "<cat>"), torch.ones(2, 32))
    assert len(ids(tiny_pipeline, "<s1>")) > 1
    ld.unload(tiny_pipeline)
    assert type(tiny_pipeline.text_encoder.get_input_embeddings()) is nn.Embedding


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


def test_words_alone_are_an_adapter_too(tiny_pipeline: Any, adapter: ld.Adapter, tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    ld.write_adapter(ld.Adapter({}, tokens=adapter.tokens), path)
    report = ld.load_adapter(tiny_pipeline, path, "words")
    assert report.tokens == ["<dog>", "<s1>"] and "words" in ld.list_adapters(tiny_pipeline)
    ld.delete_adapter(tiny_pipeline, "words")
    assert ld.list_adapters(tiny_pipeline) == {}


def test_the_same_picture_as_with_diffusers_own_loader(tiny_pipeline_dir: Path, adapter: ld.Adapter) -> None:
    """A word of three vectors, in a prompt."""

    def pipeline() -> Any:
        made = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
        made.set_progress_bar_config(disable=True)
        return made

    def draw(pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a <dog> in <s1>", num_inference_steps=2, generator=generator, output_type="latent").images

    ours, theirs = pipeline(), pipeline()
    ld.load_adapter(ours, ld.Adapter({}, tokens=adapter.tokens))
    for word, vectors in adapter.tokens.items():
        theirs.load_textual_inversion({word: vectors["text_encoder"]})
    torch.testing.assert_close(draw(ours), draw(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(draw(ours), draw(pipeline()), atol=1e-2)


class TestLearning:
    """Textual inversion, alone and beside low-rank layers (pivotal tuning)."""

    def add(self, pipeline: Any, config: Any = None, **kwargs: Any) -> None:
        word = ld.TextualInversionConfig("<sks>", **{"initializer_token": "dog", "num_vectors": 2, **kwargs})
        ld.add_adapter(pipeline, config, "new", tokens=[word])

    def loss(self, pipeline: Any) -> torch.Tensor:
        tokens = torch.tensor([ids(pipeline, "a <sks>")])
        return pipeline.text_encoder(tokens).last_hidden_state.square().sum()

    def test_it_starts_as_the_initializer(self, tiny_pipeline: Any) -> None:
        table = tiny_pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
        self.add(tiny_pipeline)
        mean = table[ids(tiny_pipeline, "dog")].mean(dim=0)
        torch.testing.assert_close(embedded(tiny_pipeline, "<sks>").detach(), torch.stack([mean, mean]))

    @pytest.mark.parametrize("config", [None, {"text_encoder": ld.LoraConfig(r=2)}])
    def test_only_the_word_and_the_layers_learn(
        self, tiny_pipeline: Any, config: Any, bits: Callable[[nn.Module], dict[str, bytes]]
    ) -> None:
        before = bits(tiny_pipeline.text_encoder)
        self.add(tiny_pipeline, config)
        parameters = ld.adapter_parameters(tiny_pipeline, "new")["text_encoder"]
        self.loss(tiny_pipeline).backward()
        wanted = {id(p) for p in parameters}
        assert {id(p) for p in tiny_pipeline.text_encoder.parameters() if p.grad is not None} == wanted
        torch.optim.SGD(parameters, lr=1e-2).step()
        assert bool(parameters[-1].grad.abs().sum() > 0) and parameters[-1].shape == (2, 32)
        kept = ld.get_adapter(tiny_pipeline, "new")
        assert torch.equal(kept.tokens["<sks>"]["text_encoder"], parameters[-1].detach())
        ld.unload(tiny_pipeline)
        assert bits(tiny_pipeline.text_encoder) == before

    def test_it_goes_on_from_its_tensors(self, tiny_pipeline: Any) -> None:
        self.add(tiny_pipeline, {"text_encoder": ld.LoraConfig(r=2)})
        flat = {
            name: torch.full_like(tensor, 0.5) for name, tensor in ld.get_adapter(tiny_pipeline, "new").flat().items()
        }
        ld.put_adapter(tiny_pipeline, flat, "new")
        assert torch.equal(embedded(tiny_pipeline, "<sks>").detach(), torch.full((2, 32), 0.5))

    def test_copies_go_on_by_themselves(self, tiny_pipeline: Any) -> None:
        self.add(tiny_pipeline)
        twin = copy.deepcopy(tiny_pipeline.text_encoder)
        wanted = embedded(tiny_pipeline, "<sks>").detach().clone()
        with torch.no_grad():
            ld.adapter_parameters(tiny_pipeline, "new")["text_encoder"][0].zero_()
        tokens = torch.tensor(ids(tiny_pipeline, "<sks>"))
        assert torch.equal(twin.get_input_embeddings()(tokens).detach(), wanted)

    @pytest.mark.parametrize(
        ("kwargs", "error", "words"),
        [
            ({"num_vectors": 0}, ld.ConfigError, "num_vectors=0"),
            ({"initializer_token": ""}, ld.ConfigError, "has no tokens"),
        ],
    )
    def test_mistakes(self, tiny_pipeline: Any, kwargs: Any, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            self.add(tiny_pipeline, **kwargs)

    def test_no_word_twice_and_nothing_without_a_tokenizer(self, tiny_pipeline: Any) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="has that word already"):
            ld.add_adapter(tiny_pipeline, None, tokens=[ld.TextualInversionConfig("a</w>")])
        with pytest.raises(ld.AdapterMismatchError, match="pipeline with a tokenizer"):
            ld.add_adapter(tiny_pipeline.text_encoder, None, tokens=[ld.TextualInversionConfig("<x>")])
        with pytest.raises(ld.ConfigError, match="nothing would be learned"):
            ld.add_adapter(tiny_pipeline, None)


def test_the_pooled_state_is_that_of_the_real_end(tiny_pipeline: Any, adapter: ld.Adapter) -> None:
    """CLIP's configs of 2022 look for the highest id, which a new word would be."""
    encoder = tiny_pipeline.text_encoder
    encoder.eos_token_id = 2
    ld.load_adapter(tiny_pipeline, ld.Adapter({}, tokens=adapter.tokens), "dog")
    batch = tiny_pipeline.tokenizer(["a <s1> b"], return_tensors="pt")
    output = encoder(batch.input_ids)
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, -1])
    ld.unload(tiny_pipeline)
    assert encoder.eos_token_id == 2
