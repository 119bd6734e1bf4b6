"""Prompts inside models: in and out, together and beside LoRA, learned on, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_diffusion as ld

IDS = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(2))
KINDS: dict[str, Any] = {
    "prompt tuning": ld.PromptTuningConfig(num_virtual_tokens=4),
    "p-tuning": ld.PromptEncoderConfig(template="{P:2} {x} {P:2}"),
    "p-tuning MLP": ld.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8),
}
FAMILIES = ["bert", "roberta", "deberta", "gpt2", "llama", "t5", "bloom"]


def forward(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    more = {"labels": IDS} if model.config.is_encoder_decoder else {}
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    return logits


def around(model: Any, name: str = "default") -> torch.Tensor:
    """IDS with two virtual tokens before and two after."""
    ids = torch.tensor(ld.prompt_ids(model, name)).expand(3, -1)
    return torch.cat([ids[:, :2], IDS, ids[:, 2:]], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out(family: str, kind: str, text_model: Callable[[str], Any], bits: Callable[..., Any]) -> None:
    """The base's logits bit for bit beside a prompt, without it, and after it; and gradients in all that learns."""
    model = text_model(family)
    weights, modules = bits(model), [(path, type(m), set(vars(m))) for path, m in model.named_modules()]
    base = {n for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        wanted = forward(model)
    ld.add_adapter(model, KINDS[kind])
    assert {name: bits(model)[name] for name in weights} == weights
    with ld.disable_adapters(model):
        assert torch.equal(forward(model), wanted)
        assert ld.prepend_prompt(model, {"input_ids": IDS})["input_ids"] is IDS
    with torch.no_grad():
        assert torch.equal(forward(model), wanted)
    ids = around(model)
    answer = forward(model, ids)
    assert not torch.allclose(answer[:, :1], wanted[:, :1], atol=1e-4)
    answer.square().mean().backward()
    parameters = ld.adapter_parameters(model)["model"]
    assert all(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in parameters)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    ld.unload(model)
    with torch.no_grad():
        assert torch.equal(forward(model), wanted)
    assert bits(model) == weights
    assert [(path, type(m), set(vars(m))) for path, m in model.named_modules()] == modules
    assert {n for n, p in model.named_parameters() if p.requires_grad} == base


class TestSideBySide:
    def test_each_has_ids_of_its_own(self, text_model: Callable[[str], Any]) -> None:
        """They hold when another one goes, and a freed place is not given away below one in use."""
        model = text_model("gpt2")
        for name in "abc":
            ld.add_adapter(model, KINDS["prompt tuning"], name)
        ids = {name: ld.prompt_ids(model, name) for name in "abc"}
        assert [*ids["a"], *ids["b"], *ids["c"]] == list(range(99, 111))
        with torch.no_grad():
            before = forward(model, around(model, "c"))
            ld.delete_adapter(model, "a")
            assert ld.prompt_ids(model, "c") == ids["c"]
            assert torch.equal(forward(model, around(model, "c")), before)
            ld.add_adapter(model, KINDS["p-tuning"], "d")
            assert ld.prompt_ids(model, "d") == list(range(111, 115))
            assert torch.equal(forward(model, around(model, "c")), before)

    def test_explicit_ids_are_always_answered(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, KINDS["p-tuning"])
        ids = around(model)
        with torch.no_grad():
            wanted = forward(model, ids)
            ld.set_adapters(model, [])
            assert torch.equal(forward(model, ids), wanted)

    @pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
    def test_a_prompt_is_there_or_not(self, weight: float, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, KINDS["prompt tuning"])
        with pytest.raises(ld.ConfigError, match="there or not"):
            ld.set_adapters(model, ["default"], weight)
        ld.set_adapters(model, ["default"], 0.0)

    def test_the_tied_head_has_no_new_outputs(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, KINDS["prompt tuning"])
        assert model.lm_head.weight is model.transformer.wte.weight
        assert forward(model, around(model)).shape == (3, 11, 99)


class TestWithLora:
    @pytest.mark.parametrize("together", [True, False])
    def test_both_learn_and_both_are_saved(
        self, together: bool, text_model: Callable[[str], Any], randomise: Callable[..., None], tmp_path: Path
    ) -> None:
        model = text_model("llama")
        lora, prompt = ld.LoraConfig(r=2), KINDS["p-tuning"]
        names = ["default"] if together else ["lora", "prompt"]
        if together:
            ld.add_adapter(model, [lora, prompt])
        else:
            ld.add_adapter(model, lora, "lora")
            ld.add_adapter(model, prompt, "prompt")
        for name in names:
            randomise(model, name)
        ids = around(model, names[-1])
        answer = forward(model, ids)
        answer.square().mean().backward()
        learned = [p for name in names for p in ld.adapter_parameters(model, name)["model"]]
        assert all(bool(p.grad is not None and p.grad.abs().sum() > 0) for p in learned)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learned}
        other = text_model("llama")
        for name in names:
            path = tmp_path / f"{name}.safetensors"
            ld.save_adapter(model, path, name)
            ld.load_adapter(other, path, name)
        assert ld.prompt_ids(other, names[-1]) == ld.prompt_ids(model, names[-1])
        with torch.no_grad():
            assert torch.equal(forward(other, ids), forward(model, ids))

    def test_one_file_holds_both(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        model = text_model("llama")
        ld.add_adapter(model, [ld.LoraConfig(r=2), KINDS["p-tuning"]])
        ld.save_adapter(model, tmp_path / "both.safetensors")
        adapter = ld.read_adapter(tmp_path / "both.safetensors")
        assert adapter.layer_count() == 8 and list(adapter.methods["model"]) == ["p_tuning"]
        with pytest.raises(ld.AdapterFormatError, match="either low-rank layers or a prompt"):
            ld.save_adapter(model, tmp_path / "folder", format="peft")


class TestLearning:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_goes_on_as_if_never_stopped(self, kind: str, text_model: Callable[[str], Any]) -> None:
        """Encoder and optimizer, from what `get_adapter` and `state_dict` give; to the bit."""

        def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            model(input_ids=around(model), labels=around(model).clamp(max=98)).loss.backward()
            optimizer.step()

        def start(flat: Any = None) -> tuple[Any, torch.optim.Optimizer]:
            model = text_model("gpt2")
            ld.add_adapter(model, KINDS[kind], generator=torch.Generator().manual_seed(0))
            if flat is not None:
                ld.put_adapter(model, flat)
            return model, torch.optim.AdamW(ld.adapter_parameters(model)["model"], lr=1e-2)

        whole, optimizer = start()
        for k in range(4):
            step(whole, optimizer)
            if k == 1:
                flat, state = ld.get_adapter(whole).flat(), copy.deepcopy(optimizer.state_dict())
        again, optimizer = start(flat)
        optimizer.load_state_dict(state)
        for _ in range(2):
            step(again, optimizer)
        for a, b in zip(ld.adapter_parameters(whole)["model"], ld.adapter_parameters(again)["model"]):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
    def test_gradient_checkpointing(self, family: str, reentrant: bool, text_model: Callable[[str], Any]) -> None:
        grads = []
        for checkpointing in (False, True):
            model = text_model(family)
            ld.add_adapter(model, KINDS["p-tuning"], generator=torch.Generator().manual_seed(0))
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.train()
                for module in model.modules():
                    if isinstance(module, nn.Dropout):
                        module.p = 0.0
                    elif isinstance(getattr(module, "dropout", None), float):
                        module.dropout = 0.0
            forward(model, around(model)).square().mean().backward()
            grads.append([p.grad for p in ld.adapter_parameters(model)["model"]])
        for a, b in zip(*grads):
            assert float(b.abs().sum()) > 0
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

    def test_a_base_of_few_bits_and_autocast(self, text_model: Callable[[str], Any]) -> None:
        """The encoder computes in float32, whatever the base does; what it makes is cast."""
        model = text_model("llama").to(torch.bfloat16)
        ld.add_adapter(model, KINDS["p-tuning"])
        parameters = ld.adapter_parameters(model)["model"]
        assert {p.dtype for p in parameters} == {torch.float32}
        host = model.get_input_embeddings()
        part = next(module for name, module in host.named_children())
        exact = part()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(part(), exact) and part().dtype == torch.float32
            answer = forward(model, around(model))
        answer.float().square().mean().backward()
        assert host(around(model)).dtype == torch.bfloat16
        assert all(bool(p.grad.isfinite().all()) for p in parameters)

    def test_initial_values(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        config = ld.PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")
        ld.add_adapter(model, config)
        table, rows = model.transformer.wte.weight, ld.adapter_parameters(model)["model"][0]
        assert all(bool((table == row).all(dim=1).any()) for row in rows)

    def test_an_initial_text(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        """Cut or repeated to the number of tokens, and PEFT's values."""
        import peft

        from tests.lora_diffusion.methods.prompt_tokenizers import bert_tokenizer

        tokenizer = bert_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        fields: dict[str, Any] = {
            "num_virtual_tokens": 7,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "Anna lives in Rome",
            "tokenizer_name_or_path": str(tmp_path),
        }
        model = text_model("bert")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.PromptTuningConfig(task_type="SEQ_CLS", **fields))
        ld.add_adapter(model, ld.PromptTuningConfig(**fields))
        wanted = theirs.prompt_encoder["default"].embedding.weight
        assert torch.equal(ld.adapter_parameters(model)["model"][0], wanted)

    def test_a_tokenizer_that_is_not_there(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        model = text_model("bert")
        config = ld.PromptTuningConfig(
            num_virtual_tokens=4,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="a",
            tokenizer_name_or_path=str(tmp_path),
        )
        with pytest.raises(ld.ConfigError, match="no tokenizer could be loaded") as caught:
            ld.add_adapter(model, config)
        assert "\n" not in str(caught.value) and ld.list_adapters(model) == {}
        assert type(model.get_input_embeddings()) is nn.Embedding


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("family", ["gpt2", "t5"])
    def test_deepcopy_and_pickle(self, kind: str, family: str, text_model: Callable[[str], Any]) -> None:
        model = text_model(family)
        ld.add_adapter(model, KINDS[kind])
        ids = around(model)
        with torch.no_grad():
            wanted = forward(model, ids)
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            for parameter in ld.adapter_parameters(model)["model"]:
                parameter.zero_()
            for twin in twins:
                assert torch.equal(forward(twin, ids), wanted)
                assert ld.prompt_ids(twin) == ld.prompt_ids(model)
                ld.unload(twin)
                assert "default" not in ld.list_adapters(twin)
                assert type(twin.get_input_embeddings()) is nn.Embedding

    def test_on_its_way_to_another_dtype(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, KINDS["p-tuning"])
        model.to(torch.float64)
        assert forward(model, around(model)).dtype == torch.float64


class TestFreezing:
    def test_the_encoder_goes_and_its_rows_stay(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, KINDS["p-tuning"])
        ids = around(model)
        with torch.no_grad():
            wanted = forward(model, ids)
        ld.freeze_prompt(model)
        assert torch.equal(forward(model, ids), wanted)
        assert [p.shape for p in ld.adapter_parameters(model)["model"]] == [(4, 32)]
        ld.freeze_prompt(model)
        ld.save_adapter(model, tmp_path / "bare.safetensors")
        learned = ld.read_adapter(tmp_path / "bare.safetensors").methods["model"]["p_tuning"]
        assert list(learned.tensors) == ["vectors"] and learned.config.template == "{P:2} {x} {P:2}"
        other = text_model("gpt2")
        ld.load_adapter(other, tmp_path / "bare.safetensors", "default")
        assert torch.equal(forward(other, ids), wanted)

    def test_only_prompts(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, ld.LoraConfig(r=2))
        for ask in (ld.freeze_prompt, ld.prompt_ids):
            with pytest.raises(ld.ConfigError, match="has no virtual tokens"):
                ask(model)
            with pytest.raises(ld.ConfigError, match="no adapter 'other'"):
                ask(model, "other")


class TestWhatTakesNoPrompt:
    def test_a_model_without_tokens(self, tiny_pipeline: Any) -> None:
        with pytest.raises(ld.AdapterMismatchError, match="no token embedding"):
            ld.add_adapter(tiny_pipeline.unet, KINDS["prompt tuning"])

    def test_another_width(self, text_model: Callable[[str], Any]) -> None:
        model = text_model("gpt2")
        with pytest.raises(ld.AdapterMismatchError, match="token_dim=16"):
            ld.add_adapter(model, ld.PromptTuningConfig(num_virtual_tokens=4, token_dim=16))
        assert ld.list_adapters(model) == {}

    def test_words_and_prompts_keep_apart(self, tiny_pipeline: Any) -> None:
        """The tokenizer gives words the next ids, which are a prompt's."""
        word = ld.TextualInversionConfig("<sks>")
        ld.add_adapter(tiny_pipeline, KINDS["prompt tuning"], "prompt", components=["text_encoder"])
        with pytest.raises(ld.AdapterMismatchError, match="carries a prompt"):
            ld.add_adapter(tiny_pipeline, None, "word", tokens=[word])
        ld.delete_adapter(tiny_pipeline, "prompt")
        ld.add_adapter(tiny_pipeline, None, "word", tokens=[word])
        with pytest.raises(ld.AdapterMismatchError, match="has learned words"):
            ld.add_adapter(tiny_pipeline, KINDS["prompt tuning"], "prompt", components=["text_encoder"])

    def test_a_file_for_another_model(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        """Refused before anything of the size that it names is allocated."""
        model, path = text_model("gpt2"), tmp_path / "a.safetensors"
        huge = ld.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=2**16)
        learned = ld.adapter.Learned(huge, {"vectors": torch.zeros(2, 32)})
        ld.write_adapter(ld.Adapter({}, methods={"model": {"p_tuning": learned}}), path)
        with pytest.raises(ld.AdapterMismatchError, match=r"'embedding.weight' has shape none"):
            ld.load_adapter(model, path)
        bare = ld.PromptTuningConfig(num_virtual_tokens=2)
        learned = ld.adapter.Learned(bare, {"vectors": torch.zeros(2, 16)})
        ld.write_adapter(ld.Adapter({}, methods={"model": {"prompt_tuning": learned}}), path)
        with pytest.raises(ld.AdapterMismatchError, match=r"needs \(2, 32\)"):
            ld.load_adapter(model, path)
        assert ld.list_adapters(model) == {} and type(model.get_input_embeddings()) is nn.Embedding

    def test_a_file_loads_no_tokenizer(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        """What a file says of its initial text is not followed."""
        config = ld.PromptTuningConfig(
            num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a",
            tokenizer_name_or_path="http://nowhere.invalid/x",
        )  # fmt: skip
        learned = ld.adapter.Learned(config, {"vectors": torch.ones(2, 32)})
        ld.write_adapter(ld.Adapter({}, methods={"model": {"prompt_tuning": learned}}), tmp_path / "a.safetensors")
        model = text_model("gpt2")
        ld.load_adapter(model, tmp_path / "a.safetensors", "a")
        assert torch.equal(ld.adapter_parameters(model, "a")["model"][0], torch.ones(2, 32))
