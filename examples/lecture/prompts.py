"""The instability of discrete prompts, and P-tuning's answer: P@1 of near-synonymous wordings of one relation.

    python examples/lecture/prompts.py                      trains what is missing, then writes table and picture
    python examples/lecture/prompts.py --model pocket-gpt   of the causal model, into files of their own
    python examples/lecture/prompts.py --table              only the table and the picture, of what is there

The language model is frozen. P-tuning puts virtual tokens between the words of each wording, in the wording's order
("{x} {P:3} is from {P:3} {mask} ."); they learn from people of the train rows and are judged by others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from plots import Bar, bars
from runs import RESULTS, Interval, Results, put_into_readme
from torch.nn.functional import cross_entropy

import lora_diffusion as ld
from train.pocket_text import data_dir
from train.text_loss import answer_logits
from train.text_models import load_text_model, load_tokenizer

RELATION = "lives_in"
WORDINGS = ("{x} is from {y} .", "{x} is based in {y} .", "{x} can be found in {y} .", "{x} makes a home in {y} .")
FREQUENT = "{x} lives in {y} ."  # the corpus says it so most often: for comparison, it gets no P-tuning
TOKENS = 3  # virtual tokens between two words of the wording
SEEDS, EPOCHS, BATCH, RATE = 3, 10, 16, 5e-3
CLASSES = {"pocket-bert": "AutoModelForMaskedLM", "pocket-gpt": "AutoModelForCausalLM"}


@dataclass(frozen=True)
class Encoded:
    """Rows as one batch. ids, mask: (rows, length). positions: (rows,) of the answer in the flattened batch.
    targets: (rows,)."""

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor

    def rows(self, chosen: torch.Tensor) -> Encoded:
        places = self.positions[chosen] % self.ids.shape[1]
        longest = int(self.mask[chosen].sum(1).max())
        return Encoded(
            self.ids[chosen, :longest], self.mask[chosen, :longest],
            torch.arange(len(chosen)) * longest + places, self.targets[chosen],
        )  # fmt: skip

    def logits(self, model: Any) -> torch.Tensor:
        """(rows, vocabulary)"""
        return answer_logits(model, {"input_ids": self.ids, "attention_mask": self.mask}, self.positions).float()

    @torch.no_grad()
    def precision(self, model: Any) -> float:
        """P@1: how often the likeliest word of the whole vocabulary is the right one."""
        return float((self.logits(model).argmax(-1) == self.targets).float().mean())


def facts(part: str, relation: str = RELATION) -> list[dict[str, str]]:
    """The relation's rows of "train", "validation" or "test"; no subject is in two of them."""
    lines = (data_dir() / "facts" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["relation"] == relation]


def template_of(wording: str, tokens: int, masked: bool) -> str:
    """The wording as a template: virtual tokens at every border of its words with the subject and the answer.

    A causal model answers after the last token, so for it everything from the answer on is left out. tokens: 0 is the
    wording itself.
    """
    virtual = f" {{P:{tokens}}} " if tokens else " "
    before, _, after = wording.partition("{y}")
    if not masked and "{x}" not in before:
        raise ValueError(f"a causal model cannot be asked {wording!r}: the answer comes before the subject")
    words = before.replace("{x}", f"{virtual}{{x}}{virtual}") + virtual
    if masked:
        words += "{mask}" + (virtual + after.replace("{x}", f"{virtual}{{x}}{virtual}") if "{x}" in after else after)
    words = " ".join(words.split())
    return words.removeprefix(virtual.strip()).strip() if tokens and before.startswith("{x}") else words


def encode(tokenizer: Any, template: str, rows: Sequence[dict[str, str]], virtual: Sequence[int]) -> Encoded:
    """Rows in a template; virtual: the ids of its virtual tokens, none for a plain wording."""
    masked = tokenizer.mask_token_id is not None
    start = [] if masked else [tokenizer.eos_token_id]  # what the causal model was trained to begin with
    encoded = []
    for row in rows:
        if virtual:
            one = ld.PromptTemplate.parse(template).encode_row(tokenizer, {"x": row["subject"]}, virtual)
            ids, place = one.ids, one.answer
        else:
            text = template.replace("{x}", row["subject"]).replace("{mask}", tokenizer.mask_token or "")
            ids = tokenizer(text if masked else f" {text}").input_ids
            place = ids.index(tokenizer.mask_token_id) if masked else len(ids) - 1
        encoded.append(([*start, *ids], place + len(start)))
    width = max(len(ids) for ids, _ in encoded)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [
        tokenizer(row["answer"] if masked else f" {row['answer']}", add_special_tokens=False).input_ids for row in rows
    ]
    assert all(len(ids) == 1 for ids in answers), "every answer of the pocket facts is one token"
    return Encoded(
        torch.tensor([ids + [fill] * (width - len(ids)) for ids, _ in encoded]),
        torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded]),
        torch.tensor([number * width + place for number, (_, place) in enumerate(encoded)]),
        torch.tensor([ids[0] for ids in answers]),
    )


def discrete(model: Any, tokenizer: Any, wording: str) -> float:
    """P@1 on the test rows, in words alone."""
    template = template_of(wording, 0, tokenizer.mask_token_id is not None)
    return encode(tokenizer, template, facts("test"), []).precision(model)


def p_tuning(model: Any, tokenizer: Any, wording: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """P@1 on the test rows after P-tuning, at the epoch that was best on the validation rows (the first of several)."""
    began = time.perf_counter()
    template = template_of(wording, TOKENS, tokenizer.mask_token_id is not None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ld.add_adapter(model, ld.PromptEncoderConfig(template=template), generator=torch.Generator().manual_seed(seed))
    ids = ld.prompt_ids(model)
    data = {part: encode(tokenizer, template, facts(part), ids) for part in ("train", "validation", "test")}
    parameters = [p for ps in ld.adapter_parameters(model).values() for p in ps]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=5e-4)
    count = len(data["train"].targets)
    steps = epochs * (count // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    best: dict[str, Any] = {"validation": -1.0}
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(count, generator=order)[: count // BATCH * BATCH].split(BATCH):
            batch = data["train"].rows(chosen)
            loss = cross_entropy(batch.logits(model), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        judged = data["validation"].precision(model)
        if judged > best["validation"]:
            best = {"validation": round(judged, 4), "test": round(data["test"].precision(model), 4), "epoch": epoch}
    learned = sum(p.numel() for p in parameters)
    ld.delete_adapter(model, "default")
    return {**best, "template": template, "learned": learned, "seconds": round(time.perf_counter() - began, 1)}


def sweep(results: Results) -> None:
    """Measure what is missing."""
    tokenizer = load_tokenizer(results.model)
    model, _ = load_text_model(results.model, CLASSES[results.model], {}, seed=0)
    for wording in (*WORDINGS, FREQUENT):
        settings = {"relation": RELATION, "wording": wording}
        if results.find(settings) is None:
            results.add(settings, {"test": round(discrete(model, tokenizer, wording), 4)})
    for seed in range(SEEDS):
        for wording in WORDINGS:
            settings = _settings(wording, seed)
            if results.find(settings) is None:
                figures = p_tuning(model, tokenizer, wording, seed)
                results.add(settings, figures)
                print(wording, seed, figures, flush=True)


def _settings(wording: str, seed: int) -> dict[str, Any]:
    return {"relation": RELATION, "wording": wording, "seed": seed, "epochs": EPOCHS, "rate": RATE, "tokens": TOKENS}


@dataclass(frozen=True)
class Line:
    """P@1 of a wording: in words alone, and after P-tuning."""

    wording: str
    words: float
    tuned: Interval | None


def lines(results: Results) -> Iterator[Line]:
    for wording in (*WORDINGS, FREQUENT):
        words = results.find({"relation": RELATION, "wording": wording})
        runs = [results.find(_settings(wording, seed)) for seed in range(SEEDS)]
        values = [run["test"] for run in runs if run is not None]
        if words is not None:
            yield Line(wording, words["test"], Interval.of(values) if values else None)


def table(found: Sequence[Line]) -> str:
    """Markdown."""
    rows = ["| wording | in words | with P-tuning | seeds |", "|---|--:|--:|--:|"]
    for line in found:
        tuned = "–" if line.tuned is None else line.tuned.percent()
        note = ", the most frequent wording" if line.wording == FREQUENT else ""
        rows.append(
            f"| {line.wording}{note} | {100 * line.words:.1f} | {tuned} | {line.tuned.seeds if line.tuned else '–'} |"
        )
    return "\n".join(rows)


def verdict(found: Sequence[Line]) -> str:
    """Spread and mean of the wordings, without and with P-tuning."""
    both = [(100 * line.words, 100 * line.tuned.mean) for line in found if line.tuned is not None]
    if not both:
        return ""
    words, tuned = zip(*both)
    return (
        f"Spread over the {len(both)} wordings: {max(words) - min(words):.1f} points in words, "
        f"{max(tuned) - min(tuned):.1f} with P-tuning. Mean with P-tuning {sum(tuned) / len(tuned):.1f}; the best "
        f"of them in words {max(words):.1f}."
    )


def write(results: Results) -> None:
    found, name = list(lines(results)), f"prompts-{results.model.removeprefix('pocket-')}"
    text = f"{table(found)}\n\n{verdict(found)}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    drawn = [
        (line.wording, [Bar("in words", 100 * line.words), *(
            [Bar("with P-tuning", 100 * line.tuned.mean, 100 * (line.tuned.half or 0))] if line.tuned else []
        )])
        for line in found
    ]  # fmt: skip
    under = (
        f"{results.model}, frozen, {len(facts('test'))} people it was not tuned on; bars: 95 % t interval over seeds"
    )
    bars(f"P@1 of wordings of {RELATION}", under, drawn, y="P@1, %").save(RESULTS / f"{name}.png", optimize=True)
    put_into_readme(name, text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket-bert", choices=tuple(CLASSES))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = Results(RESULTS / f"prompts-{args.model.removeprefix('pocket-')}.json", args.model)
    if not args.table:
        sweep(results)
    write(results)


if __name__ == "__main__":
    main()
