"""PEFT's configs, read and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lora_diffusion as ld


def test_task_types_are_peft_s() -> None:
    peft = pytest.importorskip("peft")
    assert [(task.name, task.value) for task in ld.TaskType] == [(task.name, task.value) for task in peft.TaskType]
    assert ld.TaskType.SEQ_CLS == "SEQ_CLS" and f"{ld.TaskType.SEQ_CLS}" == "SEQ_CLS"


def test_config_of_a_dict() -> None:
    given = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "inference_mode": False, "r": 4, "lora_alpha": 32,
             "lora_dropout": 0.1, "target_modules": ["q", "v"], "fan_in_fan_out": False}  # fmt: skip
    made = ld.get_peft_config({**given, "loftq_config": {}})
    assert isinstance(made, ld.LoraConfig)
    assert (made.r, made.lora_alpha, made.target_modules, made.task_type) == (4, 32, ["q", "v"], "SEQ_2_SEQ_LM")
    prompt = ld.get_peft_config({"peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 20})
    assert isinstance(prompt, ld.PromptEncoderConfig) and prompt.num_virtual_tokens == 20
    assert isinstance(
        ld.get_peft_config({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}), ld.PrefixTuningConfig
    )


def test_all_of_peft_s_fields_are_understood() -> None:
    """What PEFT itself writes for a config without anything special has no field that is refused."""
    peft = pytest.importorskip("peft")
    for name, more in (("LoraConfig", {}), ("PromptTuningConfig", {"num_virtual_tokens": 2}),
                       ("PromptEncoderConfig", {"num_virtual_tokens": 2}),
                       ("PrefixTuningConfig", {"num_virtual_tokens": 2})):  # fmt: skip
        given = {key: getattr(value, "value", value) for key, value in getattr(peft, name)(**more).to_dict().items()}
        assert type(ld.get_peft_config(given)).__name__ == name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"r": 8}, "no peft_type"),
        ({"peft_type": "OFT"}, "'OFT' is not known"),
        ({"peft_type": "LORA", "task_type": "SUMMARY"}, "give one of SEQ_CLS"),
        ({"peft_type": "LORA", "trainable_token_indices": [1]}, "no field trainable_token_indices"),
        ({"peft_type": "LORA", "r": 0}, "a rank is a whole number"),
        ({"peft_type": "LORA", "inference_mode": True}, "load one with PeftModel"),
        ({"peft_type": "P_TUNING"}, "num_virtual_tokens"),
    ],
)
def test_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ld.ConfigError, match=words) as caught:
        ld.get_peft_config(given)
    assert "\n" not in str(caught.value)


def test_config_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("peft").LoraConfig(
        r=4, task_type="CAUSAL_LM", base_model_name_or_path="some/base"
    ).save_pretrained(tmp_path)
    config = ld.PeftConfig.from_pretrained(tmp_path)
    assert (config.peft_type, config.task_type, config.base_model_name_or_path) == ("LORA", "CAUSAL_LM", "some/base")
    assert config.r == 4 and isinstance(config.method, ld.LoraConfig) and not config.is_prompt_learning
    assert config.to_dict()["base_model_name_or_path"] == "some/base"
    with pytest.raises(AttributeError):
        _ = config.nothing
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": "eight"}))
    with pytest.raises(ld.ConfigError, match="r='eight'"):
        ld.PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(ld.ModelNotFoundError, match=r"no adapter_config\.json"):
        ld.PeftConfig.from_pretrained(tmp_path / "..")


def test_inference_mode_as_in_the_lecture() -> None:
    """The lecture writes inference_mode=False."""
    if "inference_mode" not in ld.LoraConfig.__dataclass_fields__:
        pytest.skip("LoraConfig has no inference_mode yet")
    assert ld.LoraConfig(task_type=ld.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8).r == 8
