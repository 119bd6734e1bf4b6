"""What the labelled tasks ask of pocket-bert: python finetune.py --out finetuned.json

Trains sequence classification on `sentiment`, `topic` and `entailment`, once all weights and once the head alone (the
body frozen), and reports the accuracy on the test split of the best epoch by the validation split.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

HERE = Path(__file__).parent
TASKS = ("sentiment", "topic", "entailment")


def read(task: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / "data" / task / f"{split}.jsonl").read_text().splitlines()]


def encode(tokenizer, rows: list[dict[str, str]]):  # type: ignore[no-untyped-def]
    """Padded ids of texts, or of premises with hypotheses."""
    columns = ("text",) if "text" in rows[0] else ("premise", "hypothesis")
    return tokenizer(*([row[c] for row in rows] for c in columns), padding=True, return_tensors="pt")


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer, rows: list[dict[str, str]], labels: list[str]) -> float:  # type: ignore[no-untyped-def]
    model.eval()
    right = 0
    for k in range(0, len(rows), 100):
        part = rows[k : k + 100]
        wanted = torch.tensor([labels.index(row["label"]) for row in part])
        right += int((model(**encode(tokenizer, part)).logits.argmax(-1) == wanted).sum())
    return right / len(rows)


def finetune(folder: Path, task: str, *, everything: bool, seed: int, epochs: int, lr: float) -> dict[str, float]:
    """Accuracy on the test split and the seconds it took."""
    torch.manual_seed(seed)
    train, validation, test = (read(task, split) for split in ("train", "validation", "test"))
    labels = sorted({row["label"] for row in train})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    if not everything:
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.01)
    steps = epochs * (len(train) // 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    best, kept, began = -1.0, 0.0, time.time()
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(train)).tolist()
        for k in range(0, len(order) - 15, 16):
            part = [train[j] for j in order[k : k + 16]]
            wanted = torch.tensor([labels.index(row["label"]) for row in part])
            loss = F.cross_entropy(model(**encode(tokenizer, part)).logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seen = accuracy(model, tokenizer, validation, labels)
        if seen > best:
            best, kept = seen, accuracy(model, tokenizer, test, labels)
    return {"test": round(kept, 4), "validation": round(best, 4), "seconds": round(time.time() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=HERE / "bert")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for task in args.tasks:
        for name, everything, lr in (("all weights", True, 5e-4), ("head alone", False, 2e-3)):
            runs = [
                finetune(args.model, task, everything=everything, seed=seed, epochs=args.epochs, lr=lr)
                for seed in range(args.seeds)
            ]
            found.setdefault(task, {})[name] = runs
            print(task, name, json.dumps(runs), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"epochs": args.epochs, "tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
