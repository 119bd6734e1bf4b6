"""The settings of a text run's plan: those of the run, of which no rows are needed, and what it is to fit on.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_diffusion.errors import ConfigError
from train import text_checks
from train.config import setting
from train.plan_cards import CARDS, card_of
from train.text_config import TextConfig
from train.text_task_names import TASK_TYPES


@dataclass(frozen=True)
class TextPlanConfig(TextConfig):
    """A `text` command with other first words; see `lora-diffusion plan text --help`."""

    pretrained_model_name_or_path: str = setting(
        help="what is to be trained: a folder, a hub id (its config file alone is read), 'pocket-bert', 'pocket-gpt', "
        "or an architecture by name: bert-base, gpt2, t0-3b, mt0-xxl, bloomz-7b1, llama-3.1-8b, qwen2.5-7b, …",
        group="model",
        aliases=("model",),
        metavar="MODEL",
    )
    task: str = setting(help="as for text", group="model", choices=tuple(TASK_TYPES))
    device: str = setting(
        "cuda", "where it would be trained", group="model", choices=("auto", "cpu", "cuda"), decides=False
    )

    answer_length: int | None = setting(
        None, "tokens of a row that the loss counts (default: all that may count)", group="plan", minimum=1,
        decides=False,
    )  # fmt: skip
    processes: int = setting(1, "with --fsdp: over how many the base is spread", group="plan", minimum=1, decides=False)
    gpu: str | None = setting(
        None, f"the card that it is to fit on: {', '.join(CARDS)}", group="plan", metavar="NAME", decides=False
    )
    memory: str | None = setting(
        None, "the memory that it is to fit in, such as 6GB", group="plan", metavar="SIZE", decides=False
    )
    json: bool = setting(False, "print the plan as JSON, in bytes", group="plan", decides=False)


def validate(config: TextPlanConfig) -> None:
    """Check all that can be checked without a model; where rows come from need not be said. Raises ConfigError."""
    rows = None if config.dataset is not None else config.train_file or "rows.jsonl"
    cloze = config.task == "masked-lm" and config.prompt_template is None and config.template is None
    text_checks.validate(replace(config, train_file=rows, template="{text} {mask}" if cloze else config.template))
    card_of(config.gpu, config.memory)
    if config.device == "cpu" and config.gpu is not None:
        raise ConfigError("--gpu is a card and --device cpu is none; --memory says how much memory there is")
    if config.processes > 1 and not config.fsdp:
        raise ConfigError(f"--processes {config.processes} is for --fsdp: without it each process takes the same")
