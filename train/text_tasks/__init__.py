"""The tasks of a text model, by the names that the command line knows them by."""

from __future__ import annotations

from train.text_tasks.causal_lm import CausalLM
from train.text_tasks.masked_lm import MaskedLM
from train.text_tasks.question_answering import QuestionAnswering
from train.text_tasks.seq2seq_lm import Seq2SeqLM
from train.text_tasks.sequence_classification import SequenceClassification
from train.text_tasks.task import Batch, Example, Task
from train.text_tasks.token_classification import TokenClassification

_CLASSES: tuple[type[Task], ...] = (
    CausalLM,
    Seq2SeqLM,
    SequenceClassification,
    TokenClassification,
    QuestionAnswering,
    MaskedLM,
)
# name -> (PEFT's TaskType, class)
TASKS: dict[str, tuple[str | None, type[Task]]] = {one.name: (one.task_type, one) for one in _CLASSES}

__all__ = ["TASKS", "Batch", "Example", "Task"]
