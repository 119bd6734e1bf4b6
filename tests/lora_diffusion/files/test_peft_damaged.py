"""PEFT folders that are damaged, hostile or of a method that is not built: one clear line each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_diffusion as ld

PATH = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{PATH}.lora_A.weight": (2, 8), f"{PATH}.lora_B.weight": (6, 2)}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def folder(path: Path, shapes: dict[str, tuple[int, ...]], config: Any) -> Path:
    """config: a table, text as it is, or None for no file."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if shapes:
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (path / "adapter_config.json").write_text(text, encoding="utf-8")
    return path


def test_what_these_break(tmp_path: Path) -> None:
    """The same folder, whole, is read."""
    adapter = ld.read_adapter(folder(tmp_path, PAIR, LORA))
    assert adapter.components["model"]["model.layers.0.self_attn.q_proj"].scale == 2.0
    assert adapter.notes == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "not a table"),
        (" " * 2**20 + "{}", "larger than"),
        ({"r": 2}, "no peft_type"),
        ({**LORA, "peft_type": 3}, "peft_type = '3'"),
        ({**LORA, "peft_type": "LOHA"}, "'LOHA'"),
        ({**LORA, "peft_type": "ADALORA"}, "'ADALORA'"),
        ({**LORA, "peft_type": "IA3"}, "'IA3'"),
        ({**LORA, "peft_type": "\u001b[31m"}, "peft_type"),
        ({**LORA, "lora_alpha": "4"}, "lora_alpha"),
        ({**LORA, "lora_alpha": True}, "lora_alpha"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
        ({**LORA, "lora_alpha": 10**400}, "lora_alpha"),
        ({**LORA, "alpha_pattern": [1]}, "alpha_pattern"),
        ({**LORA, "alpha_pattern": {"q_proj": "\u001b[31m"}}, "alpha_pattern"),
        ({**LORA, "alpha_pattern": {"(a+)+$": 1}}, "not followed"),
        ({**LORA, "alpha_pattern": {".*" * 2_000: 1}}, "regular expressions"),
        ({**LORA, "use_rslora": "yes"}, "use_rslora"),
        ({**LORA, "modules_to_save": "score"}, "modules_to_save"),
        ({**LORA, "modules_to_save": [""]}, "modules_to_save"),
        ({**LORA, "base_model_name_or_path": "\u001b[31m"}, "base_model_name_or_path"),
        ({**LORA, "bias": "all"}, "bias"),
        ({**LORA, "lora_bias": True}, "a LoRA bias"),
        ({**LORA, "layer_replication": [[0, 1]]}, "replicated layers"),
        ({**LORA, "trainable_token_indices": [1]}, "trainable tokens"),
        ({**LORA, "target_parameters": ["w"]}, "bare parameters"),
        ({**LORA, "use_dora": True}, "uses DoRA"),
        ({**LORA, "peft_type": "PROMPT_TUNING"}, "no prompt_embeddings"),
    ],
)
def test_configs(config: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(folder(tmp_path, PAIR, config))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({}, "no adapter_model.safetensors"),
        ({f"{PATH}.lora_A.weight": (2, 8)}, "without its other half"),
        ({name.removeprefix("base_model.model."): shape for name, shape in PAIR.items()}, "not understood"),
        ({**PAIR, "x.lora_A.weight": (2, 8)}, "not understood"),
        ({**PAIR, f"{PATH}.lora_A.default.weight": (2, 8)}, "twice"),
        ({f"{PATH}.lora_A.weight": (2, 8), f"{PATH}.lora_B.weight": (6, 3)}, "do not fit each other"),
        ({f"{PATH}.lora_A.weight": (9000, 1), f"{PATH}.lora_B.weight": (1, 9000)}, "rank 9,000"),
        ({**PAIR, f"{PATH}.lora_B.bias": (6,)}, "a LoRA bias"),
        ({**PAIR, f"{PATH}.lora_magnitude_vector": (5,)}, "for 6 outputs"),
        ({**PAIR, "base_model.model.x.lora_magnitude_vector": (6,)}, "without the factors"),
        ({**PAIR, "base_model.model.embed.token_adapter.trainable_tokens_delta": (1, 8)}, "trainable tokens"),
        ({**PAIR, "base_model.model.model.norm.weight": (8,)}, "not understood"),
        ({**PAIR, f"{PATH}.lora_mystery": (8,)}, "not understood"),
        ({"base_model.model.lm_head.weight": (8, 8)}, "no LoRA factors"),
        (
            {**PAIR, "base_model.model.lm_head.weight": (8,), "base_model.model.lm_head.modules_to_save.weight": (8,)},
            "twice",
        ),
    ],
)  # fmt: skip
def test_tensors(shapes: dict[str, tuple[int, ...]], words: str, tmp_path: Path) -> None:
    with pytest.raises(ld.AdapterFormatError, match=words) as caught:
        ld.read_adapter(folder(tmp_path, shapes, LORA))
    assert str(caught.value).isprintable()


def test_pickles_are_pointed_to_the_converter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    for config in (None, LORA):
        with pytest.raises(ld.AdapterFormatError, match="lora-diffusion convert"):
            ld.read_adapter(folder(tmp_path, {}, config))


def test_a_cut_off_file(tmp_path: Path) -> None:
    tensors = folder(tmp_path, PAIR, LORA) / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(ld.AdapterFormatError, match="cut off"):
        ld.read_adapter(tmp_path)


@pytest.mark.parametrize(
    "spelling",
    ["lm_head.weight", "lm_head.modules_to_save.weight", "lm_head.modules_to_save.default.weight", "my_head.a.weight"],
)
def test_spellings_of_learned_copies(spelling: str, tmp_path: Path) -> None:
    """Those of several PEFT versions; an entry of modules_to_save is the end of a path, as in PEFT."""
    config = {**LORA, "modules_to_save": ["head"]}
    adapter = ld.read_adapter(folder(tmp_path, {**PAIR, f"base_model.model.{spelling}": (8, 8)}, config))
    ((path, values),) = adapter.copies["model"].items()
    assert (path, list(values)) in [("lm_head", ["weight"]), ("my_head", ["a.weight"])]
    assert adapter.configs["model"].modules_to_save == [path]


def test_the_base_is_left_out_with_a_note(tmp_path: Path) -> None:
    """PEFT saves the table itself beside an adapted embedding."""
    shapes = {**PAIR, "base_model.model.model.embed_tokens.base_layer.weight": (12, 8)}
    adapter = ld.read_adapter(folder(tmp_path, shapes, LORA))
    assert adapter.copies == {}
    assert any("base model" in note for note in adapter.notes)


def test_unknown_fields_are_noted_once(tmp_path: Path) -> None:
    config = {**LORA, "new_thing": 1, "\u001b[31m": 2, "unset_thing": None}
    (note,) = ld.read_adapter(folder(tmp_path, PAIR, config)).notes
    assert "new_thing" in note
    assert "unset_thing" not in note
    assert note.isprintable()


def test_null_fields_are_defaults(tmp_path: Path) -> None:
    config = {**LORA, "lora_alpha": None, "alpha_pattern": None, "use_rslora": None, "lora_dropout": None, "bias": None}
    adapter = ld.read_adapter(folder(tmp_path, PAIR, config))
    assert {layer.scale for layer in adapter.components["model"].values()} == {4.0}


def test_many_layers_and_patterns_take_no_time(tmp_path: Path) -> None:
    """A pattern for each of 2,000 layers, and expressions that keep backtracking engines busy."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(2_000):
        path = f"base_model.model.{'a' * 60}.{n}.q_proj"
        shapes |= {f"{path}.lora_A.weight": (1, 2), f"{path}.lora_B.weight": (2, 1)}
    patterns = {f"{n}.q_proj": n + 1 for n in range(2_000)}
    config = {**LORA, "alpha_pattern": {"a*" * 30 + "b": 7, **patterns}}
    begun = time.perf_counter()
    adapter = ld.read_adapter(folder(tmp_path, shapes, config))
    assert time.perf_counter() - begun < 10
    layers = adapter.components["model"]
    assert [layers[f"{'a' * 60}.{n}.q_proj"].scale for n in range(2_000)] == [n + 1 for n in range(2_000)]
