"""Configs of prompts: the papers' shapes, PEFT's defaults, and mistakes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import lora_diffusion as ld
from lora_diffusion.methods.registry import config_from_dict


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


def count(model: nn.Module, **fields: Any) -> int:
    ld.add_adapter(model, ld.PromptEncoderConfig(**fields))
    return sum(parameter.numel() for parameter in ld.adapter_parameters(model)["model"])


def bert_base() -> nn.Module:
    return on_meta(lambda: BertForMaskedLM(BertConfig()))


class TestPapersShapes:
    """Trainable parameters at full size, on the meta device; d = 768."""

    def test_lama(self) -> None:
        assert count(bert_base(), template=(3, 3, 3)) == 8_278_272

    def test_lama_gpt2_xl(self) -> None:
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=1, n_head=25))
        assert count(model, template=(3, 3)) == 35_878_400

    def test_few_shot_lstm(self) -> None:
        """LSTM(d, d), two layers, both ways; Linear(2d, d), ReLU, Linear(d, d)."""
        d, n = 768, 9
        first = 2 * (4 * d * d + 4 * d * d + 8 * d)
        second = 2 * (4 * d * 2 * d + 4 * d * d + 8 * d)
        wanted = n * d + first + second + (2 * d * d + d) + (d * d + d)
        assert count(bert_base(), template=(3, 3, 3), encoder_shape="few-shot") == wanted

    def test_few_shot_mlp(self) -> None:
        d, n = 768, 9
        wanted = n * d + 2 * (d * d + d)
        assert count(bert_base(), template=(3, 3, 3), encoder_reparameterization_type="MLP") == wanted

    @pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
    @pytest.mark.parametrize("hidden", [None, 20])
    def test_pefts(self, encoder: str, hidden: int | None) -> None:
        """Without a template: as many as PEFT has, under the same names."""
        config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
        fields: dict[str, Any] = {"encoder_reparameterization_type": encoder, "encoder_hidden_size": hidden}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.get_peft_model(
                GPT2LMHeadModel(config), peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, **fields)
            )
        ours = GPT2LMHeadModel(config)
        ld.add_adapter(ours, ld.PromptEncoderConfig(num_virtual_tokens=7, **fields))
        shapes = {name: p.shape for name, p in theirs.prompt_encoder["default"].named_parameters()}
        tensors = ld.get_adapter(ours).methods["model"]["p_tuning"].tensors
        assert {name: tensor.shape for name, tensor in tensors.items()} == shapes

    def test_defaults_follow_the_template(self) -> None:
        paper, peft_like = ld.PromptEncoderConfig(template=(3, 3, 3)), ld.PromptEncoderConfig(num_virtual_tokens=9)
        assert (paper.encoder_reparameterization_type, paper.encoder_shape) == ("LSTM", "lama")
        assert (peft_like.encoder_reparameterization_type, peft_like.encoder_shape) == ("MLP", "peft")
        assert paper.num_virtual_tokens == 9


def test_pefts_enums_are_taken() -> None:
    from peft import PromptEncoderReparameterizationType as Encoder
    from peft import PromptTuningInit as Init

    assert (
        ld.PromptEncoderConfig(
            num_virtual_tokens=2, encoder_reparameterization_type=Encoder.LSTM
        ).encoder_reparameterization_type
        == "LSTM"
    )
    assert (
        ld.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init=Init.SAMPLE_VOCAB).prompt_tuning_init
        == "SAMPLE_VOCAB"
    )


@pytest.mark.parametrize(
    "config",
    [
        ld.PromptEncoderConfig(template=(3, 3, 3), encoder_dropout=0.1),
        ld.PromptEncoderConfig(template="{P:2} {x} {P}", encoder_reparameterization_type="MLP", task_type="CAUSAL_LM"),
        ld.PromptTuningConfig(num_virtual_tokens=4, num_transformer_submodules=2, modules_to_save=["classifier"]),
    ],
)
def test_dicts_and_back(config: Any) -> None:
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ld.PromptTuningConfig(), "num_virtual_tokens=None"),
        (lambda: ld.PromptTuningConfig(num_virtual_tokens=0), "from 1 to"),
        (lambda: ld.PromptTuningConfig(num_virtual_tokens=10**9), "from 1 to"),
        (lambda: ld.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="NOISE"), "prompt_tuning_init='NOISE'"),
        (lambda: ld.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="TEXT"), "needs prompt_tuning_init_t"),
        (
            lambda: ld.PromptTuningConfig(
                num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="a",
                tokenizer_name_or_path="b",
                tokenizer_kwargs={"trust_remote_code": True},
            ),
            "never run",
        ),
        (lambda: ld.PromptTuningConfig(num_virtual_tokens=4, tokenizer_kwargs={}), "tokenizer_kwargs"),
        (lambda: ld.PromptTuningConfig(num_virtual_tokens=4, num_transformer_submodules=3), "from 1 to 2"),
        (lambda: ld.PromptEncoderConfig(), "num_virtual_tokens=None"),
        (lambda: ld.PromptEncoderConfig(template="{P:3} {x}", num_virtual_tokens=4), "leave num_virtual_tokens out"),
        (lambda: ld.PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="GRU"), "'GRU'"),
        (lambda: ld.PromptEncoderConfig(num_virtual_tokens=4, encoder_num_layers=4), "LSTM's"),
        (lambda: ld.PromptEncoderConfig(num_virtual_tokens=4, encoder_dropout=0.1), "LSTM's"),
        (lambda: ld.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=2**20), "encoder_hidden_size"),
        (
            lambda: ld.PromptEncoderConfig(
                num_virtual_tokens=4, encoder_reparameterization_type="MLP", encoder_shape="lama"
            ),
            "lama",
        ),
    ],
)  # fmt: skip
def test_mistakes(build: Any, words: str) -> None:
    with pytest.raises(ld.ConfigError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_configs_import_no_torch() -> None:
    code = (
        "import sys, lora_diffusion as ld; ld.PromptEncoderConfig(template=(3, 3, 3)); "
        "ld.PromptTuningConfig(num_virtual_tokens=2); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
