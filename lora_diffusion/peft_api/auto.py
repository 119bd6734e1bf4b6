"""A base model and its adapter from the adapter's folder alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from ..errors import ConfigError, ModelNotFoundError
from ..files import read_adapter
from ..files.peft_config import HEADS
from .config import PeftConfig, read_peft_config
from .hub import adapter_folder
from .mapping import class_for
from .model import PeftModel
from .task_type import TaskType

_HUB = ("token", "cache_dir", "local_files_only", "force_download")
_TOKENIZER = "tokenizer_config.json"


class _AutoPeftModel:
    """task: what the class is for. base: the transformers class that makes the base."""

    task: ClassVar[TaskType]
    base: ClassVar[str]

    def __init__(self) -> None:
        raise ConfigError(f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The model that the adapter's config names as its base, with the adapter in it.

        revision: of the adapter's repository, where it is one on the Hub. kwargs: for the base's `from_pretrained`
            (`dtype`, `device_map` …), and for the Hub. `num_labels` is that of the adapter's head unless it is given.
        A tokenizer beside the adapter that knows more tokens than the base has rows makes the base's table longer.
        Raises ConfigError where the adapter is for another task or says no base, ModelNotFoundError where its base is
        not to be had, and what loading an adapter raises.
        """
        if kwargs.get("trust_remote_code"):
            raise ConfigError("trust_remote_code=True would run code that comes with the model: leave it out")
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        folder = adapter_folder(pretrained_model_name_or_path, revision=revision, **hub)
        config = config or read_peft_config(folder)
        if config.task_type is not None and config.task_type != cls.task:
            wanted = f"Auto{class_for(config.task_type).__name__}"
            raise ConfigError(
                f"{folder} is an adapter for {config.task_type}: load it with {wanted}, not {cls.__name__}"
            )
        if "num_labels" not in kwargs and "config" not in kwargs:
            kwargs.update(_labels(folder, cls.task))
        model = cls._base(folder, config, kwargs)
        _make_room(model, folder)
        return class_for(cls.task).from_pretrained(model, folder, adapter_name, is_trainable, config)

    @classmethod
    def _base(cls, folder: Path, config: PeftConfig, kwargs: dict[str, Any]) -> Any:
        import transformers

        name = config.base_model_name_or_path
        if not name:
            raise ConfigError(f"{folder} does not say its base model: load that yourself, and use PeftModel")
        given = {"revision": config.revision, **kwargs} if config.revision else kwargs
        try:
            return getattr(transformers, cls.base).from_pretrained(name, **given)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ModelNotFoundError(f"the base model {name!a} of {folder} cannot be loaded: {reason}") from None


def _labels(folder: Path, task: TaskType) -> dict[str, int]:
    """How many labels the adapter's head tells apart, where it brings one: outputs of the head's last matrix."""
    if task not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        return {}
    for heads in read_adapter(folder).copies.values():
        for path, tensors in heads.items():
            matrices = [tensor for _, tensor in sorted(tensors.items()) if tensor.ndim == 2]
            if path.endswith(HEADS[task]) and matrices:
                return {"num_labels": int(matrices[-1].shape[0])}
    return {}


def _make_room(model: Any, folder: Path) -> None:
    if not (folder / _TOKENIZER).is_file():
        return
    from transformers import AutoTokenizer

    known = len(AutoTokenizer.from_pretrained(folder))
    if known > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(known)


class AutoPeftModelForCausalLM(_AutoPeftModel):
    """CAUSAL_LM."""

    task, base = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    """SEQ_2_SEQ_LM."""

    task, base = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    """SEQ_CLS."""

    task, base = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    """TOKEN_CLS."""

    task, base = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    """QUESTION_ANS."""

    task, base = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    """FEATURE_EXTRACTION."""

    task, base = TaskType.FEATURE_EXTRACTION, "AutoModel"
