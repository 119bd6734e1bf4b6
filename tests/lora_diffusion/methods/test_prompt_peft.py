"""PEFT's folders of prompts: in and out with the same logits, and our encoder kept beside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diffusion as ld
from lora_diffusion.methods.peft_prompts import learned_of, prompt_of

IDS = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(2))
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
MADE: dict[str, Callable[[str], peft.PeftConfig]] = {
    "prompt tuning": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
}


def batch_for(family: str) -> dict[str, torch.Tensor]:
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return {**batch, "labels": IDS} if family == "t5" else batch


def answer(model: Any, family: str) -> torch.Tensor:
    """Of a model with prompts of ours, or of PEFT's."""
    batch = batch_for(family)
    with torch.no_grad():
        made = batch if isinstance(model, peft.PeftModel) else ld.prepend_prompt(model, batch)
        logits: torch.Tensor = model(**made).logits
    return logits


def theirs(model: Any, config: peft.PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        made = peft.get_peft_model(copy.deepcopy(model), config)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return made.eval()


def loaded(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize("kind", MADE)
def test_there_and_back(family: str, kind: str, text_model: Callable[[str], Any], tmp_path: Path) -> None:
    """PEFT's folder here, and from here to PEFT, heads that were learned along included."""
    base = text_model(family)
    wrapped = theirs(base, MADE[kind](TASKS[family]))
    wrapped.save_pretrained(tmp_path / "theirs")
    model = copy.deepcopy(base)
    report = ld.load_adapter(model, tmp_path / "theirs", "prompt")
    assert report.complete and list(report.methods["model"]) == [
        {"prompt tuning": "prompt_tuning", "p-tuning": "p_tuning", "prefix": "prefix_tuning"}[kind]
    ]
    wanted = answer(wrapped, family)
    torch.testing.assert_close(answer(model, family), wanted, rtol=1e-5, atol=1e-6)
    ld.save_adapter(model, tmp_path / "ours", "prompt", format="peft")
    torch.testing.assert_close(answer(loaded(base, tmp_path / "ours"), family), wanted, rtol=1e-5, atol=1e-6)
    ld.unload(model)
    with torch.no_grad():
        assert torch.equal(model(**batch_for(family)).logits, base(**batch_for(family)).logits)


@pytest.mark.parametrize(
    "config",
    [
        ld.PromptTuningConfig(num_virtual_tokens=3),
        ld.PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["classifier"], task_type="SEQ_CLS"),
        ld.PromptEncoderConfig(num_virtual_tokens=3),
        ld.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_shape="few-shot"),
    ],
)
def test_made_here(config: Any, text_model: Callable[[str], Any], tmp_path: Path) -> None:
    family = "bert" if config.modules_to_save else "gpt2"
    base = text_model(family)
    model = copy.deepcopy(base)
    ld.add_adapter(model, config)
    with torch.no_grad():
        for parameter in ld.adapter_parameters(model)["model"]:
            parameter.add_(0.1)
    ld.save_adapter(model, tmp_path / "a", format="peft")
    torch.testing.assert_close(
        answer(loaded(base, tmp_path / "a"), family), answer(model, family), rtol=1e-5, atol=1e-6
    )


class TestTheEncoderBeside:
    def saved(self, text_model: Callable[[str], Any], folder: Path, **fields: Any) -> Any:
        model = text_model("gpt2")
        ld.add_adapter(model, ld.PromptEncoderConfig(num_virtual_tokens=3, **fields))
        ld.save_adapter(model, folder, format="peft")
        return model

    def test_training_goes_on_from_it(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        model = self.saved(text_model, tmp_path / "a")
        assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == {"prompt_embeddings"}
        other = text_model("gpt2")
        ld.load_adapter(other, tmp_path / "a", "default")
        flat, again = ld.get_adapter(model).flat(), ld.get_adapter(other).flat()
        assert len(flat) == 7 and all(torch.equal(again[name], value) for name, value in flat.items())
        ld.save_adapter(other, tmp_path / "a", format="peft")  # takes its own folder's place

    def test_what_peft_has_changed_since_wins(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        self.saved(text_model, tmp_path / "a")
        path = tmp_path / "a" / "adapter_model.safetensors"
        save_file({"prompt_embeddings": load_file(path)["prompt_embeddings"] + 1}, path)
        other = text_model("gpt2")
        report = ld.load_adapter(other, tmp_path / "a", "default")
        assert any("no longer makes the embeddings" in note for note in report.notes)
        assert [p.shape for p in ld.adapter_parameters(other)["model"]] == [(3, 32)]

    def test_none_where_the_embeddings_say_it_all(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        self.saved(text_model, tmp_path / "a", encoder_reparameterization_type="NONE")
        assert not (tmp_path / "a" / "prompt_encoder.safetensors").exists()

    def test_a_broken_one_is_refused(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        self.saved(text_model, tmp_path / "a")
        (tmp_path / "a" / "prompt_encoder.safetensors").write_bytes(b"\xff" * 100)
        with pytest.raises(ld.AdapterFormatError, match="prompt_encoder"):
            ld.load_adapter(text_model("gpt2"), tmp_path / "a")

    def test_one_of_other_shapes_is_refused(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        self.saved(text_model, tmp_path / "a")
        adapter = ld.read_adapter(tmp_path / "a")
        learned = adapter.methods["model"]["p_tuning"]
        learned.tensors["embedding.weight"] = torch.zeros(2, 32)  # type: ignore[index]
        with pytest.raises(ld.AdapterMismatchError, match=r"'embedding.weight' has shape \(2, 32\)"):
            ld.load_adapter(text_model("gpt2"), adapter)


class TestWhatPeftCannotHold:
    def test_templates(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        model = text_model("gpt2")
        ld.add_adapter(model, ld.PromptEncoderConfig(template="{P:2} {x} {P}"))
        with pytest.raises(ld.AdapterFormatError, match="elsewhere than in front of the input"):
            ld.save_adapter(model, tmp_path / "a", format="peft")
        assert list(tmp_path.iterdir()) == []

    def test_a_template_that_is_a_prefix(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        base = text_model("gpt2")
        model = copy.deepcopy(base)
        ld.add_adapter(model, ld.PromptEncoderConfig(template="{P:3} {x}"))
        ld.save_adapter(model, tmp_path / "a", format="peft")
        ids = torch.tensor([ld.prompt_ids(model) + row for row in IDS.tolist()])
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
        torch.testing.assert_close(answer(loaded(base, tmp_path / "a"), "gpt2"), wanted, rtol=1e-5, atol=1e-6)
        other = text_model("gpt2")
        ld.load_adapter(other, tmp_path / "a", "default")
        config = ld.get_adapter(other).methods["model"]["p_tuning"].config
        assert config.template == "{P:3} {x}"  # type: ignore[attr-defined]

    def test_two_prompts(self, text_model: Callable[[str], Any], tmp_path: Path) -> None:
        model = text_model("gpt2")
        both = [ld.PromptTuningConfig(num_virtual_tokens=2), ld.PromptEncoderConfig(num_virtual_tokens=3)]
        ld.add_adapter(model, both)
        assert len(ld.prompt_ids(model)) == 5
        with pytest.raises(ld.AdapterFormatError, match="one prompt"):
            ld.save_adapter(model, tmp_path / "a", format="peft")


def test_fields_go_both_ways() -> None:
    fields = {"num_virtual_tokens": 3, "num_layers": 2, "num_attention_heads": 4, "task_type": "SEQ_2_SEQ_LM"}
    prompt = ld.adapter.Prompt("PROMPT_TUNING", torch.randn(6, 8), {**fields, "num_transformer_submodules": 2})
    again = prompt_of(learned_of(prompt))
    assert torch.equal(again.embeddings, prompt.embeddings)
    assert again.fields == {**prompt.fields, "token_dim": 8}


def test_an_own_file_becomes_a_folder_without_the_model(text_model: Callable[[str], Any], tmp_path: Path) -> None:
    base = text_model("gpt2")
    model = copy.deepcopy(base)
    ld.add_adapter(model, ld.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    ld.save_adapter(model, tmp_path / "own.safetensors")
    ld.write_adapter(ld.read_adapter(tmp_path / "own.safetensors"), tmp_path / "a", format="peft")
    torch.testing.assert_close(
        answer(loaded(base, tmp_path / "a"), "gpt2"), answer(model, "gpt2"), rtol=1e-5, atol=1e-6
    )
