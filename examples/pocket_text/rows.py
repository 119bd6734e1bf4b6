"""Documents as rows of token ids: packed to one length, masked for BERT, in a stream for GPT.

Every row starts at a random position (`position_ids`), so that all positions of the model are trained by short rows,
and no fact is known in one place of a sentence only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from textworld.corpus import Corpus, Document
from transformers import PreTrainedTokenizerFast

MASK_ANSWER, MASK_BESIDE, MASK_OTHER = 0.9, 0.06, 0.15
"""How often BERT's rows mask the word worth asking for, the words beside it, and words of documents without one.

Most of a fact's other words cannot be guessed (whose home is in harbo?), so they teach little but cost much noise.
"""

PACKED = 0.15
"""How many of BERT's batches are packed rows; facts are learnt far sooner from rows of one sentence."""


@dataclass(frozen=True)
class MaskedRows:
    """What BERT sees, (rows, length) each, and `asked`: the flat places that count, with the ids that stood there."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    asked: torch.Tensor
    answers: torch.Tensor


class BertRows:
    """Batches for masked language modelling: most of them of single documents, some of packed rows.

    Args:
        tokens: about how many tokens a batch has.
        longest: the model's number of positions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tokens: int, longest: int) -> None:
        self.tokenizer, self.corpus, self.tokens, self.longest = tokenizer, corpus, tokens, longest
        self.rng = random.Random(f"masks {corpus.seed}")
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.mask, self.pad = tokenizer.mask_token_id, tokenizer.pad_token_id

    def batch(self) -> MaskedRows:
        return self._masked(self._packed(64) if self.rng.random() < PACKED else self._single(64))

    def _encode(self, documents: list[Document]) -> list[tuple[list[int], int]]:
        """Ids of each document and the id of the word worth asking for (-1 where none)."""
        ids = self.tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
        wanted = self.tokenizer.convert_tokens_to_ids([d.answer for d in documents])
        return [(i, w if d.answer else -1) for i, w, d in zip(ids, wanted, documents)]

    def _single(self, longest: int) -> list[list[list[tuple[int, bool]]]]:
        """Rows of one document each, of about the same length, so that little is padded."""
        found = [(ids, w) for ids, w in self._encode(self.corpus.take(self.tokens // 4)) if len(ids) + 2 <= longest]
        found.sort(key=lambda row: len(row[0]))
        first = self.rng.randrange(len(found))
        count = self.tokens // (len(found[first][0]) + 2)
        return [[_marked(ids, w)] for ids, w in found[max(0, min(first, len(found) - count)) :][:count]]

    def _packed(self, length: int) -> list[list[list[tuple[int, bool]]]]:
        """Rows of as many documents as fit."""
        rows: list[list[list[tuple[int, bool]]]] = []
        row: list[list[tuple[int, bool]]] = []
        room = length - 3
        while len(rows) < self.tokens // length:
            for ids, wanted in self._encode(self.corpus.take(64)):
                if len(ids) > length - 3:
                    continue
                if len(ids) > room:
                    rows.append(row)
                    row, room = [], length - 3
                row.append(_marked(ids, wanted))
                room -= len(ids)
        return rows[: self.tokens // length]

    def _masked(self, rows: list[list[list[tuple[int, bool]]]]) -> MaskedRows:
        rng = self.rng
        longest = max(sum(len(d) for d in row) for row in rows) + 3
        ids = np.full((len(rows), longest), self.pad, dtype=np.int64)
        types, seen = np.zeros_like(ids), np.zeros_like(ids)
        places, answers = [], []
        for r, row in enumerate(rows):
            cut = rng.randrange(1, len(row)) if len(row) > 1 and rng.random() < 0.3 else 0
            line: list[tuple[int, bool, float]] = [(self.cls, False, 0.0)]
            for k, document in enumerate(row):
                if cut and k == cut:
                    line.append((self.sep, False, 0.0))
                    types[r, len(line) :] = 1
                share = MASK_BESIDE if any(wanted for _, wanted in document) else MASK_OTHER
                line += [(token, wanted, MASK_ANSWER if wanted else share) for token, wanted in document]
            line.append((self.sep, False, 0.0))
            types[r, len(line) :] = 0
            seen[r, : len(line)] = 1
            for c, (token, wanted, share) in enumerate(line):
                ids[r, c] = token
                if rng.random() < share:
                    places.append(r * longest + c)
                    answers.append(token)
                    fate = rng.random()
                    if wanted or fate < 0.8:
                        ids[r, c] = self.mask
                    elif fate < 0.9:
                        ids[r, c] = rng.randrange(5, len(self.tokenizer))
        first = np.array([rng.choice((0, rng.randint(0, self.longest - longest))) for _ in rows])
        return MaskedRows(
            *(torch.from_numpy(a) for a in (ids, seen, types, first[:, None] + np.arange(longest)[None])),
            torch.tensor(places),
            torch.tensor(answers),
        )


class GptRows:
    """Batches for causal language modelling: documents in a stream, cut into rows of `length`.

    Every row begins with the end-of-text token, which also stands between documents.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, tokens: int, longest: int) -> None:
        self.tokenizer, self.corpus, self.tokens, self.longest = tokenizer, corpus, tokens, longest
        self.rng = random.Random(f"places {corpus.seed}")

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(input_ids, position_ids), both (rows, length)."""
        length = self.rng.choice((32, 64, 128))
        end = self.tokenizer.eos_token_id
        rows: list[list[int]] = []
        row = [end]
        while len(rows) < self.tokens // length:
            texts = [d.text for d in self.corpus.take(32)]
            for ids in self.tokenizer(texts)["input_ids"]:
                row += [*ids, end]
                if len(row) >= length:
                    rows.append(row[:length])
                    row = [end]
        ids = torch.tensor(rows[: self.tokens // length])
        first = torch.tensor([self.rng.choice((0, self.rng.randint(0, self.longest - length))) for _ in ids])
        return ids, first[:, None] + torch.arange(length)[None]


def _marked(ids: list[int], wanted: int) -> list[tuple[int, bool]]:
    return [(token, token == wanted) for token in ids]
