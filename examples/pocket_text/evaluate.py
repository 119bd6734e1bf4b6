"""How much do the shipped models know? python evaluate.py --out evaluation.json

P@1 of every relation in every wording, the loss on a corpus of another seed, and what the GPT tells of a story.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "pocket"))
from probes import all_precisions, held_out_loss, perplexity
from rows import BertRows, GptRows
from textworld.corpus import SHARES, Corpus
from textworld.labelled import held_out
from training import machine
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

HERE = Path(__file__).parent
BATCHES = 20
OPENINGS = ("one day", "anna went to the market to buy bread .", "the sun was shining , so tom and rosa")


class _OneKind(Corpus):
    """Documents of one kind only."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"evaluation {kind}", held_out())
        self._kinds, self._weights = [kind], [1.0]


def losses(model, rows_class, tokenizer, longest: int) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Perplexity on the whole corpus and on each kind of document: per masked token, or per token."""
    corpora = {"all": Corpus("evaluation", held_out())} | {kind: _OneKind(kind) for kind in SHARES}
    found: dict[str, float] = {}
    for name, corpus in corpora.items():
        nats = held_out_loss(model, rows_class(tokenizer, corpus, 2048, longest), BATCHES if name == "all" else 4)
        found[name] = round(perplexity(nats), 3)
    return found


@torch.no_grad()
def told(model, tokenizer) -> list[str]:  # type: ignore[no-untyped-def]
    """What the GPT says after each opening, drawn at temperature 0.7."""
    texts = []
    for k, opening in enumerate(OPENINGS):
        torch.manual_seed(k)
        ids = tokenizer(tokenizer.eos_token + opening, return_tensors="pt")
        out = model.generate(
            **ids, max_new_tokens=70, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id
        )
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report: dict[str, object] = {"machine": machine()}
    for name, auto, rows_class, longest in (
        ("bert", AutoModelForMaskedLM, BertRows, 128),
        ("gpt", AutoModelForCausalLM, GptRows, 256),
    ):
        tokenizer = AutoTokenizer.from_pretrained(HERE / name)
        model = auto.from_pretrained(HERE / name).eval()
        report[name] = {
            "parameters": model.num_parameters(),
            "perplexity": losses(model, rows_class, tokenizer, longest),
            "precision": all_precisions(model, tokenizer),
        }
        if name == "gpt":
            report[name]["told"] = told(model, tokenizer)  # type: ignore[index]
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
