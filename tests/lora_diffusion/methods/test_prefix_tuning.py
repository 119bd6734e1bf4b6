"""Prefixes in models: what they do to a batch, how they are switched, mixed, trained, copied and taken out."""

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
from tests.lora_diffusion.methods.prefix_models import CAUSAL, ENCODERS, FAMILIES, batch, generated, logits, model

ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def config(**fields: Any) -> ld.PrefixTuningConfig:
    return ld.PrefixTuningConfig(**{"num_virtual_tokens": 3, **fields})


def two_prefixes(family: str, attention: str = "sdpa") -> Any:
    """A model with prefixes "a" of 3 and "b" of 6, the latter through a network."""
    target = model(family, attention)
    g = torch.Generator().manual_seed(2)
    ld.add_adapter(target, config(), "a", generator=g)
    ld.add_adapter(
        target, config(num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=8), "b", generator=g
    )
    return target


def anatomy(module: nn.Module) -> dict[str, Any]:
    """{path: class, attributes, numbers of hooks} of everything in a module."""
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_backward_hooks")
    return {
        path: (type(part), sorted(part.__dict__), [len(part.__dict__[name]) for name in hooks])
        for path, part in module.named_modules()
    }


@ATTENTION
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_their_own_prefix_are_what_each_is_alone(family: str, attention: str) -> None:
    """Prefixes of different lengths and none in one batch, with and without a mask, forward and in generation."""
    target, inputs = two_prefixes(family, attention), batch(family)
    rows = ["a", "b", None]

    def alone(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = []
        for k, name in enumerate(rows):
            ld.set_adapters(target, [] if name is None else name)
            found.append(run()[k])
        return torch.stack(found)

    for given in (inputs, {name: value for name, value in inputs.items() if name != "attention_mask"}):
        expected = alone(lambda given=given: logits(target, given))  # type: ignore[misc]
        with ld.adapters_per_sample(target, rows):
            torch.testing.assert_close(logits(target, given), expected, rtol=1e-5, atol=2e-6)
    if family not in ENCODERS:
        expected = alone(lambda: generated(target, inputs))
        with ld.adapters_per_sample(target, rows):
            assert torch.equal(generated(target, inputs), expected)


def test_a_mixed_batch_of_another_size_is_refused_unless_it_repeats_the_rows() -> None:
    target, inputs = two_prefixes("llama"), batch("llama")
    twice = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    with ld.adapters_per_sample(target, ["a", "b", None]):
        once = logits(target, inputs)
        torch.testing.assert_close(logits(target, twice), once.repeat_interleave(2, dim=0))
        with pytest.raises(ld.ConfigError, match="told 3 adapters and the batch has 2 rows"):
            target(input_ids=inputs["input_ids"][:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_unloaded_and_weighed_zero_it_is_the_base_bit_for_bit(
    family: str, bits: Callable[[nn.Module], dict[str, bytes]]
) -> None:
    base, inputs = model(family), batch(family)
    before, state, expected = anatomy(base), bits(base), logits(base, inputs)
    target = two_prefixes(family)
    assert not torch.allclose(logits(target, inputs), expected, atol=1e-4)
    assert {name: value for name, value in bits(target).items() if name in state} == state
    with ld.disable_adapters(target):
        assert torch.equal(logits(target, inputs), expected)
    ld.set_adapters(target, ["a", "b"], 0.0)
    assert torch.equal(logits(target, inputs), expected)
    ld.delete_adapter(target, "a")
    assert torch.equal(logits(target, inputs), expected)
    ld.unload(target)
    assert torch.equal(logits(target, inputs), expected)
    assert anatomy(target) == before and bits(target) == state
    assert all(parameter.requires_grad for parameter in target.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "deberta", "t5"])
def test_copies_and_pickles_are_models_of_their_own(family: str) -> None:
    target, inputs = two_prefixes(family), batch(family)
    expected, stream = logits(target, inputs), io.BytesIO()
    torch.save(target, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(target), torch.load(stream, weights_only=False)):
        assert torch.equal(logits(twin, inputs), expected)
        with torch.no_grad():
            twin.prefix_tuning_b.embedding.zero_()
        assert not torch.equal(logits(twin, inputs), expected)
        assert torch.equal(logits(target, inputs), expected)
        ld.unload(twin)
        assert torch.equal(logits(twin, inputs), logits(model(family), inputs))


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "deberta", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, projection: bool) -> None:
    """With dropout of the prefix, whose mask has to come back when a layer is computed again. PEFT raises here."""
    found = []
    for checkpointing in (False, True):
        target, inputs = model(family), batch(family)
        made = config(prefix_projection=projection, prefix_dropout=0.3)
        ld.add_adapter(target, made, generator=torch.Generator().manual_seed(4))
        target.train()
        for module in target.modules():
            for name in ("p", "attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float) and "Prefix" not in type(module).__name__:
                    setattr(module, name, 0.0)
        if checkpointing:
            target.gradient_checkpointing_enable()
        torch.manual_seed(5)
        target(**inputs, use_cache=False).logits.square().sum().backward()
        found.append([parameter.grad for parameter in ld.adapter_parameters(target)["model"]])
    for plain, checkpointed in zip(*found):
        assert plain is not None and checkpointed is not None and plain.abs().sum() > 0
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


def test_dropout_is_of_the_training_step_and_differs_by_row() -> None:
    target = model("gpt2")
    ld.add_adapter(target, config(prefix_dropout=0.5))
    inputs = {"input_ids": batch("gpt2")["input_ids"][1:2].repeat(2, 1)}
    assert torch.equal(logits(target, inputs), logits(target, inputs))
    target.prefix_tuning_default.train()
    first = logits(target, inputs)
    assert not torch.allclose(first[0], first[1], atol=1e-4)
    assert not torch.allclose(first, logits(target, inputs), atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_with_static_caches_without_one_and_in_two_parts(family: str) -> None:
    target, inputs = two_prefixes(family), batch(family)
    ld.set_adapters(target, "b")
    expected = generated(target, inputs)
    assert torch.equal(generated(target, inputs, cache_implementation="static"), expected)
    assert torch.equal(generated(target, inputs, use_cache=False), expected)
    ids, mask = inputs["input_ids"][1:], inputs["attention_mask"][1:]
    whole = target(input_ids=ids, attention_mask=mask).logits
    head = target(input_ids=ids[:, :4], use_cache=True)
    tail = target(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=head.past_key_values)
    assert head.past_key_values.get_seq_length() == 7, "real tokens only"
    torch.testing.assert_close(torch.cat([head.logits, tail.logits], dim=1), whole, rtol=1e-5, atol=1e-6)


def test_each_generation_sees_the_prefix_as_it_is_now() -> None:
    """The network runs once for a generation's steps; a change behind autograd's back still counts for the next."""
    target, inputs = two_prefixes("gpt2"), batch("gpt2")
    ld.set_adapters(target, "b")
    before = generated(target, inputs)
    target.prefix_tuning_b.output_bias.data.add_(3.0)
    after = generated(target, inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, generated(target, inputs, use_cache=False))


@pytest.mark.parametrize("with_mask", [True, False])
def test_layers_share_their_widened_mask(with_mask: bool) -> None:
    target, seen = model("llama", layers=3), []
    ld.add_adapter(target, config())
    for layer in target.model.layers:
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    inputs = batch("llama")
    for _ in range(2):
        target(**inputs) if with_mask else target(input_ids=inputs["input_ids"])
    first, second = seen[0], seen[3]
    assert first.shape[-1] == 10 and all(mask is first for mask in seen[:3])
    assert second is not first and all(mask is second for mask in seen[3:])


def test_packed_sequences_do_not_see_each_other() -> None:
    """Positions that start again tell the model where a sequence begins; each of them has the prefix in front."""
    target = model("llama")
    ld.add_adapter(target, config())
    ids = batch("llama")["input_ids"][1:]
    places = torch.arange(7).repeat(2)[None]
    packed = target(input_ids=ids.reshape(1, 14), position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed.view(2, 7, -1), target(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_a_sliding_window_does_not_hide_the_prefix() -> None:
    target = model("mistral", layers=1, sliding_window=2)
    inputs = batch("mistral")
    base = logits(target, inputs)
    ld.add_adapter(target, config())
    assert (logits(target, inputs) - base).abs().amax(dim=(0, 2)).min() > 1e-3


def test_two_at_once_stand_one_behind_the_other() -> None:
    target, inputs = two_prefixes("bert"), batch("bert")
    ld.set_adapters(target, ["a", "b"])
    both = logits(target, inputs)
    joined = torch.cat([_flat(target, "a"), _flat(target, "b")])
    ld.add_adapter(target, config(num_virtual_tokens=9), "c")
    with torch.no_grad():
        target.prefix_tuning_c.embedding.copy_(joined)
    ld.set_adapters(target, "c")
    torch.testing.assert_close(logits(target, inputs), both)


def _flat(target: Any, name: str) -> torch.Tensor:
    from lora_diffusion.methods.prefix_tuning import to_prompt

    return to_prompt(ld.get_adapter(target, name).methods["model"]["prefix_tuning"]).embeddings


def test_with_lora_in_one_adapter_trained_saved_and_loaded(tmp_path: Path) -> None:
    """And a run that stops goes on: network, LoRA and all."""
    target, inputs = model("llama"), batch("llama")
    both: list[Any] = [ld.LoraConfig(r=2, target_modules="all-linear"), config(prefix_projection=True)]
    assert not any("prefix" in path for path in ld.add_adapter(target, both)["model"])
    parameters = ld.adapter_parameters(target)["model"]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(3):
        target(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        optimizer.zero_grad()
    ld.save_adapter(target, tmp_path / "a.safetensors")
    other = model("llama")
    ld.load_adapter(other, tmp_path / "a.safetensors", "again")
    assert torch.equal(logits(other, inputs), logits(target, inputs))
    resumed = model("llama")
    ld.add_adapter(resumed, both)
    ld.put_adapter(resumed, ld.get_adapter(target).flat())
    assert torch.equal(logits(resumed, inputs), logits(target, inputs))


def test_a_base_in_bfloat16_learns_in_float32() -> None:
    target, inputs = model("llama").to(torch.bfloat16), batch("llama")
    ld.add_adapter(target, config())
    assert target.prefix_tuning_default.embedding.dtype is torch.float32
    out = target(**inputs).logits
    assert out.dtype is torch.bfloat16
    out.float().sum().backward()
    assert target.prefix_tuning_default.embedding.grad.dtype is torch.float32


def test_parameter_counts_are_the_papers() -> None:
    """P-tuning v2 on RoBERTa-large: n · 2 · L · d, and its prefix encoder of 512; grouped queries take fewer."""
    with torch.device("meta"):
        roberta = tf.RobertaForSequenceClassification(
            tf.RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=50265
            )
        )
        llama = tf.LlamaForCausalLM(
            tf.LlamaConfig(
                hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, vocab_size=128
            )
        )
    for target, made, count in (
        (roberta, config(num_virtual_tokens=128), 128 * 2 * 24 * 1024),
        (
            roberta,
            config(num_virtual_tokens=8, prefix_projection=True, encoder_hidden_size=512),
            8 * 1024 + (1024 + 1) * 512 + (512 + 1) * 2 * 24 * 1024,
        ),
        (llama, config(num_virtual_tokens=50), 50 * 2 * 28 * 1024),  # 2.9 million in PEFT's comparison of methods
    ):
        ld.add_adapter(target, made)
        assert sum(parameter.numel() for parameter in ld.adapter_parameters(target)["model"]) == count
        assert all(parameter.is_meta for parameter in ld.adapter_parameters(target)["model"])
        ld.unload(target)


@pytest.mark.parametrize("made", [config(prefix_projection=True), ld.PreLayerConfig(prefix_length=3)])
def test_the_memory_of_a_step_can_be_planned(made: Any) -> None:
    target, inputs = model("llama"), batch("llama")
    inputs["labels"] = inputs["input_ids"]
    asked = ld.plan(target, made, inputs, device="cpu")
    ld.add_adapter(target, made)
    assert ld.plan(target, None, inputs, device="cpu").peak == asked.peak > 0


def test_zero_start() -> None:
    target = model("gpt2")
    ld.add_adapter(target, config(init_weights="zero"), "a")
    ld.add_adapter(target, config(init_weights="zero", prefix_projection=True), "b")
    assert not _flat(target, "a").any() and not _flat(target, "b").any()
    assert target.prefix_tuning_b.embedding.any()


@pytest.mark.parametrize("shared", [True, False])
def test_deberta_sees_keys_as_of_tokens_in_front(shared: bool) -> None:
    """One layer against its formula (He et al. 2021, equation 4), a query and a key at a time, distances and all."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    target = model("deberta", share_att_key=shared)
    ld.add_adapter(target, config(), generator=torch.Generator().manual_seed(1))
    layer, n, length = target.deberta.encoder.layer[1].attention.self, 3, 7
    hidden = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(2))
    far = target.deberta.encoder.get_rel_embedding()
    found = layer(hidden, torch.ones(1, 1, length, length, dtype=torch.bool), rel_embeddings=far)[0][0]

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (4, 8))

    front = target.prefix_tuning_default.layer(1)
    keys = torch.cat([front[:, 0], heads(layer.key_proj(hidden[0]))])
    values = torch.cat([front[:, 1], heads(layer.value_proj(hidden[0]))])
    queries, span = heads(layer.query_proj(hidden[0])), layer.pos_ebd_size
    far_keys, far_queries = (
        heads(projection(far))
        for projection in ((layer.key_proj, layer.query_proj) if shared else (layer.pos_key_proj, layer.pos_query_proj))
    )
    for i in range(length):
        scores = []
        for j in range(n + length):
            distance = torch.tensor([n + i - j])
            bucket = (
                int(make_log_bucket_position(distance, layer.position_buckets, layer.max_relative_positions)) + span
            )
            near = min(max(bucket, 0), 2 * span - 1)
            score = queries[i] * keys[j] + queries[i] * far_keys[near] + keys[j] * far_queries[near]
            scores.append(score.sum(-1) / (3 * 8) ** 0.5)
        expected = torch.einsum("jh,jhd->hd", torch.stack(scores).softmax(0), values).flatten()
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_alone_takes_one_too() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    target = tf.T5EncoderModel(tf.T5Config(**sizes)).eval()
    ids = batch("t5")["input_ids"]
    before = target(input_ids=ids).last_hidden_state
    ld.add_adapter(target, config())
    after = target(input_ids=ids).last_hidden_state
    assert after.shape == before.shape and not torch.allclose(after, before, atol=1e-3)


def test_weights_are_one_or_zero() -> None:
    target = two_prefixes("gpt2")
    with pytest.raises(ld.ConfigError, match=r"weight 0\.5 for adapter 'a'"):
        ld.set_adapters(target, "a", 0.5)
    ld.set_adapters(target, "a", 1.0)


def test_models_that_cannot_take_one_are_refused_by_name() -> None:
    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    for target, said in ((bloom, "BloomForCausalLM"), (nn.Sequential(nn.Linear(3, 3)), "Sequential")):
        before = anatomy(target)
        with pytest.raises(ld.AdapterMismatchError, match=f"^{said} cannot take a prefix"):
            ld.add_adapter(target, config())
        assert anatomy(target) == before


def test_settings_that_are_not_the_models_are_refused() -> None:
    target = model("llama")
    for field, value in (("token_dim", 32), ("num_layers", 3), ("num_attention_heads", 4)):
        with pytest.raises(ld.AdapterMismatchError, match=f"{field}={value}"):
            ld.add_adapter(target, config(**{field: value}))
    ld.add_adapter(target, config(token_dim=16, num_layers=2, num_attention_heads=2))


def test_texts_and_attention_that_a_prefix_does_not_fit() -> None:
    target = model("gpt2")
    ld.add_adapter(target, config())
    with pytest.raises(ld.ConfigError, match="62 tokens and a prefix of 3 are more than the model's 64 positions"):
        target(input_ids=torch.ones(1, 62, dtype=torch.long))
    target.config._attn_implementation = "flex_attention"
    with pytest.raises(ld.ConfigError, match="'flex_attention' cannot have a prefix"):
        target.transformer.h[0].attn(torch.zeros(1, 2, 32))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_virtual_tokens": 0},
        {"num_virtual_tokens": 10**6},
        {"prefix_dropout": 1.0},
        {"encoder_hidden_size": 8},
        {"encoder_hidden_size": 10**6, "prefix_projection": True},
        {"prefix_projection": "yes"},
        {"init_weights": "ones"},
        {"token_dim": -1},
    ],
)
def test_settings_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ld.ConfigError, match=next(iter(fields))):
        config(**fields)


def test_the_config_goes_through_json() -> None:
    from lora_diffusion.methods.registry import config_from_dict

    made = config(prefix_projection=True, encoder_hidden_size=8, prefix_dropout=0.1, modules_to_save=["score"])
    assert config_from_dict(made.to_dict()) == made
