"""The settings of `generate`: what to ask a language model, and how it writes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train.config import check, setting
from train.text_task_names import TASK_TYPES

WRITING = ("causal-lm", "seq2seq-lm")  # tasks whose answer is a text that is written token by token
WITH_HEAD = ("sequence-classification", "token-classification", "question-answering")  # the base has no such head
MAX_NEW_TOKENS = 100_000


@dataclass(frozen=True)
class GenerateConfig:
    """What to ask which model with which adapters; see `lora-diffusion generate --help`."""

    model: str = setting(
        help="base model: a folder, a hub id, or 'pocket-gpt' or 'pocket-bert', which are shipped along",
        group="model",
        aliases=("pretrained_model_name_or_path",),
        metavar="MODEL",
    )
    adapter: tuple[str, ...] = setting(
        (),
        "an adapter file and, after a colon, its weight (default 1); may be given several times; the first says what "
        "the task is",
        group="model",
        metavar="FILE[:WEIGHT]",
    )
    task: str | None = setting(
        None,
        "what the model is asked to do (default: what the adapter was trained for; without one, what the model can)",
        group="model",
        choices=tuple(TASK_TYPES),
    )
    labels: str | None = setting(
        None, "the labels in their order, separated by commas, where the adapter does not say them", group="model",
        metavar="NAMES",
    )  # fmt: skip
    revision: str | None = setting(None, "branch, tag or commit of a hub model", group="model")
    device: str = setting(
        "auto",
        "where to compute; auto takes CUDA where there is one",
        group="model",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    mixed_precision: str = setting(
        "auto",
        "precision of the model; auto: bf16 or fp16 on CUDA, no (fp32) on CPU",
        group="model",
        choices=("auto", "no", "fp16", "bf16"),
    )
    quantize: str | None = setting(
        None, "store the base in fewer bits, as training does", group="model", choices=("nf4", "int8", "fp8")
    )
    attn_implementation: str | None = setting(
        None, "how attention is computed: sdpa, eager, flash_attention_2", group="model", metavar="NAME"
    )

    prompt: tuple[str, ...] = setting(
        (), "what to go on from, or a text to judge; may be given several times", group="questions", metavar="TEXT"
    )
    prompts_file: str | None = setting(None, "prompts, one a line", group="questions", metavar="FILE")
    input_file: str | None = setting(
        None, "rows with the columns of training: .jsonl, .json, .csv, .tsv", group="questions", metavar="FILE"
    )
    output_file: str | None = setting(
        None, "write the answers there as JSON lines, with their rows", group="questions", metavar="FILE"
    )
    json: bool = setting(False, "print JSON lines, not words", group="questions")
    on_bad: str = setting(
        "error", "a row that cannot be used ends the job, or is left out and counted", group="questions",
        choices=("error", "skip"),
    )  # fmt: skip
    template: bool = setting(
        True,
        "put a prompt where the texts stood in training (--no_template: take it as it is)",
        group="questions",
    )
    chat: bool = setting(False, "put the prompt into the model's own chat format", group="questions")
    compare: bool = setting(False, "also say what the model answers without adapters", group="questions")

    max_new_tokens: int = setting(
        64, "tokens of an answer at the most", group="writing", minimum=1, maximum=MAX_NEW_TOKENS
    )
    temperature: float = setting(
        0.0, "how freely tokens are drawn; 0 takes the likeliest one every time", group="writing", minimum=0, maximum=10
    )
    top_k: int | None = setting(None, "draw from so many of the likeliest tokens (default: all)", group="writing",
                                minimum=1)  # fmt: skip
    top_p: float | None = setting(
        None, "draw from the likeliest tokens that have this share together (default: 1)", group="writing", above=0,
        maximum=1,
    )  # fmt: skip
    repetition_penalty: float = setting(
        1.0, "above 1 words that were there already become less likely", group="writing", above=0, maximum=10
    )
    num_beams: int = setting(1, "texts that are followed at once, to find the likeliest", group="writing", minimum=1,
                             maximum=64)  # fmt: skip
    seed: int = setting(
        0, "of drawing; each prompt is drawn from it anew", group="writing", minimum=0, maximum=2**63 - 1
    )
    batch_size: int = setting(8, "rows that are judged at once", group="writing", minimum=1, maximum=4096)


def validate(config: GenerateConfig) -> None:
    """Check all that can be checked without reading a file.

    Raises:
        ConfigError: one sentence that names the setting, its value and what to do.
    """
    check(config)
    prompts = bool(config.prompt) or config.prompts_file is not None
    if prompts == (config.input_file is not None):
        what = "both are given" if prompts else "neither is given"
        raise ConfigError(f"give prompts (--prompt, --prompts_file) or rows (--input_file): {what}")
    if config.chat and config.input_file is not None:
        raise ConfigError("--chat is for prompts; rows of an --input_file go where their columns stood in training")
    if config.task is not None and config.task not in WRITING and config.chat:
        raise ConfigError(f"--chat is for models that write; --task {config.task} judges")
    if config.compare and not config.adapter:
        raise ConfigError("--compare needs an --adapter to compare the base with")
    check_drawing(config.temperature, config.top_k, config.top_p, config.num_beams)


def check_drawing(temperature: float, top_k: int | None, top_p: float | None, num_beams: int) -> None:
    """Raises ConfigError for settings of drawing that nothing would read."""
    if temperature == 0:
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if value is not None:
                raise ConfigError(f"--{name} {value:g} is for drawing; give a --temperature above 0, such as 0.8")
    elif num_beams > 1:
        raise ConfigError(f"--num_beams {num_beams} searches and --temperature {temperature:g} draws; give one of them")
