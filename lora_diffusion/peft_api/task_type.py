"""PEFT's words for what a model is for. No torch here."""

from __future__ import annotations

import enum

from ..errors import ConfigError


class TaskType(enum.StrEnum):
    """SEQ_CLS: one label for a text; SEQ_2_SEQ_LM: an encoder and a decoder; CAUSAL_LM: the next token; TOKEN_CLS: a
    label for every token; QUESTION_ANS: where an answer starts and ends; FEATURE_EXTRACTION: hidden states."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def task_of(value: str | None) -> TaskType | None:
    """The task that a config names, if any. Raises ConfigError for a word that PEFT does not have."""
    if value is None:
        return None
    try:
        return TaskType(value)
    except ValueError:
        known = ", ".join(TaskType)
        raise ConfigError(f"task_type={str(value)[:40]!a}: give one of {known}, or leave it out") from None
