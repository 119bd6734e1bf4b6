"""What an evaluation draws: the prompts of each group, and the pictures of all seeds with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.errors import ConfigError
from train.evaluate_config import SUBJECT_PROMPTS, UNRELATED_PROMPTS, EvaluateConfig
from train.prompts import words_of
from train.sampling import generate

Pictures = dict[str, list[Image.Image]]  # of each group by prompt, then by seed
_ANY_CLASS = {"a", "an", "the", "of", "photo", "picture"}


class Stopped(Exception):
    """The evaluation was asked to stop."""


@dataclass(frozen=True)
class Plan:
    """The prompts.

    Attributes:
        subject: of the subject, for the adapter.
        plain: the same in the words of the class, for the base model and for the judge of prompt following, which knows
            the subject's rare word as little; without a class prompt the same as `subject`.
        kind: the class prompt, or none.
        unrelated: of other things.
        seeds: for each prompt.
    """

    subject: tuple[str, ...]
    plain: tuple[str, ...]
    kind: tuple[str, ...]
    unrelated: tuple[str, ...]
    seeds: tuple[int, ...]

    def groups(self, *, base: bool) -> dict[str, tuple[str, ...]]:
        return {"subject": self.plain if base else self.subject, "class": self.kind, "unrelated": self.unrelated}


def make_plan(config: EvaluateConfig) -> Plan:
    """The prompts that the settings ask for.

    Raises:
        ConfigError: a prompt file that is not there, is no text or has no prompt.
    """
    subject = _lines(config.prompts, "--prompts", SUBJECT_PROMPTS)
    unrelated = _lines(config.unrelated_prompts, "--unrelated_prompts", UNRELATED_PROMPTS)
    if config.unrelated_prompts is None:
        known = set(words_of(config.class_prompt or config.instance_prompt)) - _ANY_CLASS
        unrelated = tuple(prompt for prompt in unrelated if not known & set(words_of(prompt)))
    kind = (config.class_prompt or "").strip()
    asked = tuple(prompt.replace("{}", config.instance_prompt) for prompt in subject)
    return Plan(
        subject=asked,
        plain=tuple(plain_words(prompt, config.instance_prompt, kind) for prompt in asked),
        kind=(kind,) if kind else (),
        unrelated=unrelated,
        seeds=tuple(range(config.seed, config.seed + config.seeds)),
    )


def plain_words(prompt: str, instance_prompt: str, class_prompt: str | None) -> str:
    """A prompt with the class in place of the subject, where it holds the instance prompt as it is written."""
    return prompt.replace(instance_prompt, class_prompt) if class_prompt else prompt


def guidance_of(config: EvaluateConfig) -> float:
    if config.guidance_scale is not None:
        return config.guidance_scale
    return 3.0 if config.model == "pocket" else 7.5


def draw(
    pipe: Any, config: EvaluateConfig, groups: dict[str, tuple[str, ...]], seeds: Sequence[int],
    on_progress: Callable[[int, int], None], should_stop: Callable[[], bool],
) -> Pictures:  # fmt: skip
    """Draw every prompt of every group at every seed with the pipeline as it is.

    Raises:
        Stopped: `should_stop` said so.
    """
    jobs = [(prompt, seed) for prompts in groups.values() for prompt in prompts for seed in seeds]
    pictures = generate(
        pipe, [prompt for prompt, _ in jobs], [seed for _, seed in jobs], steps=config.num_inference_steps,
        guidance=guidance_of(config), batch_size=config.batch_size, width=config.resolution, height=config.resolution,
        on_image=lambda index, _: on_progress(index + 1, len(jobs)), should_stop=should_stop,
    )  # fmt: skip
    if len(pictures) < len(jobs):
        raise Stopped
    found, start = {}, 0
    for group, prompts in groups.items():
        count = len(prompts) * len(seeds)
        found[group] = pictures[start : start + count]
        start += count
    return found


def _lines(file: str | None, flag: str, default: tuple[str, ...]) -> tuple[str, ...]:
    if file is None:
        return default
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{flag} {file} cannot be read as a text file: {problem}") from None
    lines = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise ConfigError(f"{flag} {file} is empty; write a prompt on each line")
    return lines
