"""What a model knows: P@1 of its facts over wordings, and the perplexity of texts it has not seen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from rows import BertRows, GptRows
from textworld.facts import FACTS, NEVER_SAID, WORDINGS, Fact
from transformers import PreTrainedModel, PreTrainedTokenizerFast


@torch.no_grad()
def precision_masked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], wording: str
) -> float:
    """Share of facts whose answer is the most probable token at the mask (P@1, all of the vocabulary)."""
    texts = [wording.replace("{x}", f.subject).replace("{y}", tokenizer.mask_token) for f in facts]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model.base_model(**batch).last_hidden_state
    best = model.cls(hidden[batch["input_ids"] == tokenizer.mask_token_id]).argmax(-1)
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids([f.answer for f in facts]))
    return float((best == wanted).float().mean())


@torch.no_grad()
def precision_causal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], wording: str
) -> float:
    """The same for a causal model, over the words before the answer; the wording must end with it."""
    start = wording[: wording.index("{y}")].rstrip()
    texts = [tokenizer.eos_token + " " + start.replace("{x}", f.subject) for f in facts]
    ids = [tokenizer(t)["input_ids"] for t in texts]
    width = max(len(i) for i in ids)
    padded = torch.tensor([i + [tokenizer.eos_token_id] * (width - len(i)) for i in ids])
    logits = model(input_ids=padded).logits[torch.arange(len(ids)), torch.tensor([len(i) - 1 for i in ids])]
    wanted = torch.tensor([tokenizer(" " + f.answer)["input_ids"][0] for f in facts])
    return float((logits.argmax(-1) == wanted).float().mean())


def all_precisions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, every: int = 1
) -> dict[str, dict[str, float]]:
    """Relation -> wording -> P@1 over its facts (each `every`-th); a wording that cannot be asked is left out."""
    masked = tokenizer.mask_token is not None
    found: dict[str, dict[str, float]] = {}
    for name, every_fact in FACTS.items():
        facts, found[name] = every_fact[::every], {}
        wordings = [*WORDINGS[name], *(NEVER_SAID if name == "lives_in" else ())]
        for wording in wordings if every == 1 or name == "lives_in" else wordings[:1]:
            if masked:
                found[name][wording] = round(precision_masked(model, tokenizer, facts, wording), 4)
            elif wording.index("{x}") < wording.index("{y}"):
                found[name][wording] = round(precision_causal(model, tokenizer, facts, wording), 4)
    return found


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: BertRows | GptRows, batches: int) -> float:
    """Mean cross-entropy in nats per token that counts, over batches of a corpus of another seed."""
    total, count = 0.0, 0
    for _ in range(batches):
        logits, wanted = scores(model, rows)
        total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    return total / count


def scores(model: PreTrainedModel, rows: BertRows | GptRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, vocabulary) and the tokens wanted (n) of the next batch; only what counts goes through the head."""
    if isinstance(rows, BertRows):
        b = rows.batch()
        hidden = model.bert(
            input_ids=b.input_ids, attention_mask=b.attention_mask, token_type_ids=b.token_type_ids,
            position_ids=b.position_ids,
        ).last_hidden_state  # fmt: skip
        return model.cls(hidden.flatten(0, 1)[b.asked]).float(), b.answers
    ids, positions = rows.batch()
    hidden = model.transformer(input_ids=ids, position_ids=positions).last_hidden_state
    return model.lm_head(hidden[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten()


def perplexity(nats: float) -> float:
    return math.exp(nats)
