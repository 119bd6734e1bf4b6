"""From a model and a config to a `PeftModel`."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .config import Method, PeftConfig, method_of
from .model import PeftModel
from .task_type import TaskType, task_of
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

CLASSES: dict[TaskType, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: Method | PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
) -> PeftModel:
    """`model` with a new adapter in it, active and learning, everything else frozen.

    peft_config: a LoraConfig or another method's. What it leaves open PEFT's defaults decide (see
        `defaults.completed`): without target_modules the queries and the values, with a task its head.
    mixed: accepted; adapters of different methods can always be beside each other.
    autocast_adapter_dtype: the adapter learns in fp32 whatever the model's dtype; False for the model's.
    revision: of the base, where it is from the Hub; kept with the adapter's config.
    Raises ConfigError or AdapterMismatchError; the model is then as it was.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("the model is a PeftModel already: use its add_adapter for another adapter")
    method = method_of(peft_config)
    config = PeftConfig(method, revision=revision)
    return class_for(method.task_type)(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)


def class_for(task_type: str | None) -> type[PeftModel]:
    """Raises ConfigError for a task that PEFT does not have."""
    task = task_of(task_type)
    return PeftModel if task is None else CLASSES[task]
