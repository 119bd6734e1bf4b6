"""PreLayer: virtual tokens whose activations are learned behind every block."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import lora_diffusion as ld
from tests.lora_diffusion.methods.prefix_models import CAUSAL, TWO_STACKS, batch, model


def prompted(family: str, **fields: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with three virtual tokens, and a batch that has them in front."""
    target = model(family)
    g = torch.Generator().manual_seed(3)
    ld.add_adapter(target, ld.PreLayerConfig(prefix_length=3, **fields), generator=g)
    for parameter in ld.adapter_parameters(target)["model"]:
        parameter.data.copy_(torch.randn(parameter.shape, generator=g))
    return target, batch(family)


def part(target: Any) -> Any:
    return next(module for module in target.modules() if type(module).__name__ == "LayerVectors")


def answer(target: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = target(**inputs).logits
    return found


class ByHand(nn.Module):
    """A block whose outputs at the first n positions are overwritten, one position after the other."""

    def __init__(self, block: nn.Module, learned: torch.Tensor) -> None:
        super().__init__()
        self.block, self.learned = block, learned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for position, vector in enumerate(self.learned):
            hidden[:, position] = vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def blocks_of(target: Any) -> nn.ModuleList:
    return next(module for module in target.modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "roberta", "t5"])
def test_it_is_the_papers_forward(family: str) -> None:
    """Against blocks rewritten by hand: what comes out of them at virtual tokens is thrown away for what is learned."""
    target, inputs = prompted(family)
    full = ld.prepend_prompt(target, inputs)
    found = answer(target, full)
    learned = part(target)
    by_hand = model(family)
    embedding = by_hand.get_input_embeddings()
    virtual = full["input_ids"] >= embedding.num_embeddings
    embeds = embedding(full["input_ids"].masked_fill(virtual, 0)).detach()
    embeds[:, :3] = learned.vectors
    stack = blocks_of(by_hand)
    for number, vectors in enumerate(learned.activations.detach()):
        stack[number] = ByHand(stack[number], vectors)
    given = {name: value for name, value in full.items() if name != "input_ids"}
    if family == "roberta":  # counts positions by its padding id, which embeddings do not show
        given["position_ids"] = by_hand.roberta.embeddings.create_position_ids_from_input_ids(full["input_ids"], 1)
    expected = answer(by_hand, {"inputs_embeds": embeds, **given})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_number_of_parameters_is_the_papers() -> None:
    """L · d · (l_p + l_i)."""
    with torch.device("meta"):
        target = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=1024, n_layer=24, n_head=16, vocab_size=100))
    ld.add_adapter(target, ld.PreLayerConfig(prefix_length=8, infix_length=8))
    parameters = ld.adapter_parameters(target)["model"]
    assert sum(parameter.numel() for parameter in parameters) == 24 * 1024 * 16
    assert all(parameter.is_meta for parameter in parameters)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_everything_learns_with_gradient_checkpointing_too(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        target, inputs = prompted(family)
        for module in target.modules():
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        target.train()
        if checkpointing:
            target.gradient_checkpointing_enable()
        target(**ld.prepend_prompt(target, inputs), use_cache=False).logits.square().sum().backward()
        found.append([parameter.grad for parameter in ld.adapter_parameters(target)["model"]])
    for plain, checkpointed in zip(*found):
        assert plain is not None and bool(plain.flatten(1).abs().sum(1).all())
        torch.testing.assert_close(checkpointed, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", *TWO_STACKS])
def test_it_generates_with_a_cache_without_one_and_with_beams(family: str) -> None:
    target, inputs = prompted(family)
    given = {name: value for name, value in inputs.items() if name != "labels"}
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        found = ld.prompted_generate(target, given, num_beams=beams, **settings)
        assert torch.equal(found, ld.prompted_generate(target, given, num_beams=beams, use_cache=False, **settings))
    with ld.disable_adapters(target):
        base = ld.prompted_generate(target, given, **settings)
    assert torch.equal(base, model(family).generate(**given, **settings))


def test_an_infix_stands_where_the_template_says() -> None:
    """In front of the answer: `prepend_prompt` leaves it to whoever writes the ids."""
    target, inputs = prompted("gpt2", infix_length=2)
    ids = ld.prompt_ids(target)
    assert len(ids) == 5
    assert torch.equal(ld.prepend_prompt(target, inputs)["input_ids"], inputs["input_ids"])
    row = [*ids[:3], 7, 8, *ids[3:], 9]
    before = answer(target, {"input_ids": torch.tensor([row])})
    with torch.no_grad():
        part(target).activations[0, 4].neg_()
    after = answer(target, {"input_ids": torch.tensor([row])})
    assert torch.equal(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 7], before[:, 7])
    assert ld.PreLayerConfig(prefix_length=0, infix_length=2).template == "{x} {P:2}"


def test_rows_with_their_own_tokens_are_what_each_is_alone() -> None:
    target, inputs = prompted("gpt2")
    ld.add_adapter(target, ld.PreLayerConfig(prefix_length=5), "other")
    mask = torch.ones_like(inputs["input_ids"])
    names = ["default", "other", None]
    full = ld.prepend_prompt(target, {"input_ids": inputs["input_ids"], "attention_mask": mask}, names)
    mixed = answer(target, full)
    for row, name in enumerate(names):
        one = {"input_ids": inputs["input_ids"][row : row + 1]}
        alone = answer(target, ld.prepend_prompt(target, one, name) if name else one)
        length = alone.shape[1]
        places = full["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row][places], alone[0], rtol=1e-5, atol=1e-5)
        assert int(places.sum()) == length


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_disabled_and_unloaded_it_is_the_base_bit_for_bit(
    family: str, bits: Callable[[nn.Module], dict[str, bytes]]
) -> None:
    def anatomy(module: nn.Module) -> dict[str, Any]:
        return {p: (type(m), sorted(m.__dict__), len(m._forward_hooks)) for p, m in module.named_modules()}

    base = model(family)
    before, state, expected = anatomy(base), bits(base), answer(base, batch(family))
    target, inputs = prompted(family)
    with ld.disable_adapters(target):
        assert torch.equal(answer(target, ld.prepend_prompt(target, inputs)), expected)
    ld.unload(target)
    assert torch.equal(answer(target, inputs), expected)
    assert anatomy(target) == before and bits(target) == state


def test_copies_pickles_and_files(tmp_path: Path) -> None:
    target, inputs = prompted("llama")
    full = ld.prepend_prompt(target, inputs)
    expected, stream = answer(target, full), io.BytesIO()
    torch.save(target, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(target), torch.load(stream, weights_only=False)):
        assert torch.equal(answer(twin, full), expected)
        with torch.no_grad():
            part(twin).activations.zero_()
        assert not torch.equal(answer(twin, full), expected)
        assert torch.equal(answer(target, full), expected)
        ld.unload(twin)
        assert torch.equal(answer(twin, inputs), answer(model("llama"), inputs))
    ld.save_adapter(target, tmp_path / "a.safetensors")
    other = model("llama")
    ld.load_adapter(other, tmp_path / "a.safetensors", "again")
    assert torch.equal(answer(other, ld.prepend_prompt(other, inputs)), expected)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prefix_length": 0}, "together they are 0"),
        ({"prefix_length": -1}, "prefix_length=-1"),
        ({"prefix_length": 10**6}, "prefix_length=1000000"),
        ({"prefix_length": 4000, "infix_length": 4000}, "together they are 8000"),
    ],
)
def test_settings_out_of_range(fields: dict[str, int], said: str) -> None:
    with pytest.raises(ld.ConfigError, match=said):
        ld.PreLayerConfig(**fields)  # type: ignore[arg-type]


def test_a_model_without_known_blocks_is_refused_and_untouched() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    target = Odd()
    with pytest.raises(ld.AdapterMismatchError, match="Odd has no blocks of a known kind"):
        ld.add_adapter(target, ld.PreLayerConfig(prefix_length=2))
    assert type(target.table) is nn.Embedding and not target.table._forward_hooks
