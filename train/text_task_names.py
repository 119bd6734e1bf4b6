"""The tasks by name, with the words that PEFT knows them by. No torch here."""

from __future__ import annotations

# name -> PEFT's TaskType; PEFT has none for a cloze
TASK_TYPES: dict[str, str | None] = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "masked-lm": None,
}
