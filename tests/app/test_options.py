"""From fields to flags."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from app.cli import COMMANDS, _named, overview
from app.options import make_parser, parse
from lora_diffusion import ConfigError
from train.config import setting, settings_of
from train.dreambooth_config import UNSUPPORTED_FLAGS, DreamBoothConfig

GIVEN = ["--model", "pocket", "--instance_data_dir", "photos", "--instance_prompt", "a photo of sks dog"]

# What diffusers' train_dreambooth_lora.py takes; a flag of it either works here or is refused with a reason.
THEIRS = """
    pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
    class_prompt validation_prompt num_validation_images validation_epochs with_prior_preservation prior_loss_weight
    num_class_images output_dir seed resolution center_crop train_text_encoder train_batch_size sample_batch_size
    num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
    lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
    push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision
    local_rank enable_xformers_memory_efficient_attention pre_compute_text_embeddings tokenizer_max_length
    text_encoder_use_attention_mask validation_images class_labels_conditioning rank
"""
TYPICAL = """
    --pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --instance_data_dir=dog --resolution=512
    --output_dir=out --train_batch_size=1 --gradient_accumulation_steps=1 --checkpointing_steps=100
    --learning_rate=1e-4 --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500 --validation_epochs=50
    --seed=0 --use_8bit_adam --center_crop --class_prompt=dog --class_data_dir=c --with_prior_preservation
"""


@dataclass(frozen=True)
class Small:
    file: str = setting(help="what to read", positional=True)
    size: int = setting(3, "100 % of it", minimum=1, group="numbers")
    rate: float = setting(0.5, group="numbers")
    fast: bool = setting(False)
    words: tuple[str, ...] = setting((), aliases=("word",))
    kind: str | None = setting(None, choices=("a", "b"))


def test_values_of_every_kind() -> None:
    config = parse(Small, ["f", "--size=4", "--rate", "1e-3", "--fast", "--words", "x y", "--word", "z", "--kind", "b"])
    assert config == Small("f", 4, 1e-3, True, ("x y", "z"), "b")
    assert parse(Small, ["f", "--fast", "--no-fast"]) == Small("f")


@dataclass(frozen=True)
class Several:
    model: str = setting(help="where", positional=True)
    files: tuple[str, ...] = setting(help="what", positional=True, metavar="FILE:WEIGHT")
    output: str = setting(help="where to", short="o")
    quiet: bool = setting(False)


@pytest.mark.parametrize(
    "words",
    ["m a:0.7 b:-0.5 -o out --quiet", "--quiet -o out m a:0.7 b:-0.5", "m -o=out a:0.7 --quiet b:-0.5",
     "m a:0.7 --output out b:-0.5 --quiet"],
)  # fmt: skip
def test_lists_without_a_flag_and_short_flags(words: str) -> None:
    """Values and flags may stand in any order."""
    got = parse(Several, [word.replace("-o=", "-o") for word in words.split()])
    assert got == Several("m", ("a:0.7", "b:-0.5"), "out", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "MODEL and FILE:WEIGHT and -o must be given"),
        ("m -o out", "FILE:WEIGHT must be given"),
        ("m a", "-o must be given"),
        ("m a -o", "expected one argument"),
        ("m a -o out -x", "no flag --x"),
        ("m a -o out --quite b", "no flag --quite; did you mean --quiet"),
    ],
)
def test_misuse_of_lists_and_short_flags(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Several, words.split())


def test_a_short_flag_is_in_the_help() -> None:
    text = make_parser(Several, program="x").format_help()
    assert "-o OUTPUT" in text.replace("STR", "OUTPUT") and "FILE:WEIGHT" in text


def test_dashes_and_underscores_are_the_same_in_flags_only() -> None:
    one = parse(DreamBoothConfig, [*GIVEN, "--train-batch-size", "2", "--output-dir=a-b"])
    other = parse(DreamBoothConfig, [*GIVEN, "--train_batch_size", "2", "--output_dir=a-b"])
    assert one == other and one.output_dir == "a-b"


def test_a_typical_command_of_diffusers_is_understood() -> None:
    words = TYPICAL.split()
    config = parse(DreamBoothConfig, [*words, "--instance_prompt=a photo of sks dog"])
    assert config.resolution == 512 and config.learning_rate == 1e-4 and config.use_8bit_adam


def test_every_flag_of_diffusers_works_or_is_refused_with_a_reason() -> None:
    ours = {name for item in settings_of(DreamBoothConfig) for name in (item.name, *item.aliases)}
    assert not ours & set(UNSUPPORTED_FLAGS)
    assert set(THEIRS.split()) <= ours | set(UNSUPPORTED_FLAGS)
    for name, reason in UNSUPPORTED_FLAGS.items():
        with pytest.raises(ConfigError) as caught:
            parse(DreamBoothConfig, [*GIVEN, f"--{name}", "1"], unsupported=UNSUPPORTED_FLAGS)
        assert reason in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["f", "--sise", "3"], "no flag --sise; did you mean --size"),
        (["f", "--size", "x"], "'x' is not a whole number"),
        (["f", "--size", "0"], "at least 1"),
        (["f", "--size"], "expected one argument"),
        (["f", "--kind", "c"], "not one of a, b"),
        (["f", "g"], "one argument too many"),
        ([], "FILE must be given"),
        (["f", "--si", "3"], "no flag --si"),
    ],
)
def test_misuse(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Small, words)


def test_help_has_every_flag_its_default_and_its_group() -> None:
    text = make_parser(Small, program="x").format_help()
    for item in settings_of(Small):
        assert item.positional or f"--{item.name}" in text
    assert "100 % of it (default: 3)" in text and "numbers:" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_that_is_listed_is_there(name: str) -> None:
    if name == "demo":
        pytest.importorskip("train.demo_config")
    command = COMMANDS[name]
    assert name in overview()
    assert make_parser(_named(command.config), program=name).format_help()
    assert callable(_named(command.run))
