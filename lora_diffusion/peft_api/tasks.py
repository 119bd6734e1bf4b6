"""One class for each task, by PEFT's names; what a task needs is in its config (see `defaults.py`)."""

from __future__ import annotations

from .model import PeftModel


class PeftModelForSequenceClassification(PeftModel):
    """SEQ_CLS."""


class PeftModelForSeq2SeqLM(PeftModel):
    """SEQ_2_SEQ_LM."""


class PeftModelForCausalLM(PeftModel):
    """CAUSAL_LM."""


class PeftModelForTokenClassification(PeftModel):
    """TOKEN_CLS."""


class PeftModelForQuestionAnswering(PeftModel):
    """QUESTION_ANS."""


class PeftModelForFeatureExtraction(PeftModel):
    """FEATURE_EXTRACTION."""
