"""Train one of the two models from scratch: python pretrain.py --model bert --work ~/pocket_text --minutes 50

or with a process on each of two cores: torchrun --nproc_per_node=2 pretrain.py --model bert --tokens 1024 …

Writes `<work>/<model>/checkpoint.pt` every few minutes (a killed run goes on from there), `<work>/<model>/model` (what
transformers loads) and `<work>/<model>/record.jsonl`. Matrices in bf16, Muon for the weights, a cosine of the time
spent; relations that are known already are told less often than those that are not.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "pocket"))
from optimizer import MuonAdamW
from probes import all_precisions, held_out_loss, scores
from rows import BertRows, GptRows
from textworld.corpus import Corpus
from textworld.facts import WORDINGS
from textworld.labelled import held_out
from training import Record, Workers, machine, save_atomically
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerFast as Tokenizer

WIDTH, LAYERS, HEADS = 192, 4, 4
BERT_LENGTH, GPT_LENGTH = 128, 256


def build(name: str, tokenizer: Tokenizer) -> Model:
    """The model with random weights; no dropout, since facts are to be learnt by heart."""
    torch.manual_seed(0)
    if name == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                intermediate_size=4 * WIDTH, max_position_embeddings=BERT_LENGTH, pad_token_id=tokenizer.pad_token_id,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=GPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def rate(progress: float, warmup: float = 0.02) -> float:
    """Factor of the learning rate: a short ramp, then a cosine to nothing; progress runs from 0 to 1."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def train(args: argparse.Namespace) -> None:
    workers = Workers()
    folder = args.work / args.model
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = build(args.model, tokenizer).train()
    model.set_attn_implementation("eager")  # on a CPU, at these sizes, its backward pass takes half the time of sdpa's
    parameters = list(model.parameters())
    tables = [p for name, p in model.named_parameters() if "embeddings" in name or "wte" in name or "wpe" in name]
    slower = dict.fromkeys(tables, 0.4)  # a name turns up once in several steps, and each time AdamW moves it far
    optimizer = MuonAdamW(parameters, elsewhere=tables, lr=args.lr, weight_decay=1e-2, scale=slower, workers=workers)
    checkpoint = folder / "checkpoint.pt"
    step, spent, tokens = 0, 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, tokens = state["step"], state["spent"], state["tokens"]
    kind, length = (BertRows, BERT_LENGTH) if args.model == "bert" else (GptRows, GPT_LENGTH)
    rows = kind(tokenizer, Corpus(f"{step} {workers.rank}", held_out()), args.tokens, length)
    report = Report(folder / "record.jsonl", model, tokenizer, kind, length)
    if workers.first:
        report.record.write(machine=machine(), workers=workers.count, model=args.model, minutes=args.minutes, step=step,
                            parameters=model.num_parameters(), tokens_per_step=args.tokens * workers.count)  # fmt: skip
    known = report(step=step, tokens=tokens, minutes=round(spent / 60, 1)) if step and workers.first else {}
    rows.corpus.teller.emphasise(share_out(known, workers))
    began, saved, losses = time.time() - spent, spent, []
    while (spent := workers.agree(time.time() - began)) < args.minutes * 60:
        optimizer.set_lr(args.lr * rate(spent / (args.minutes * 60)))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, wanted = scores(model, rows)
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        workers.average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        step, tokens = step + 1, tokens + args.tokens * workers.count
        if spent - saved > args.save_every * 60:
            saved = spent
            if workers.first:
                known = report(step=step, tokens=tokens, minutes=round(spent / 60, 1), loss=sum(losses) / len(losses))
                save(model, tokenizer, folder)
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                save_atomically({**state, "tokens": tokens, "spent": time.time() - began}, checkpoint)
            rows.corpus.teller.emphasise(share_out(known, workers))
            losses = []
    if workers.first:
        report(step=step, tokens=tokens, minutes=round(spent / 60, 1), every=1)
        save(model, tokenizer, folder)


def share_out(known: dict[str, float], workers: Workers) -> dict[str, float]:
    """The first process's P@1 of each relation, on all of them; 0 where nothing was measured yet."""
    return {name: workers.agree(known.get(name, 0.0)) for name in WORDINGS}


class Report:
    """Writes loss and P@1 to the record; returns P@1 of each relation's first wording."""

    def __init__(self, path: Path, model: Model, tokenizer: Tokenizer, kind: type, length: int) -> None:
        self.record, self.model, self.tokenizer = Record(path), model, tokenizer
        self.kind, self.length = kind, length

    def __call__(self, every: int = 4, **entry: float) -> dict[str, float]:
        """every: only each so-manieth fact is asked."""
        self.model.eval()
        found = all_precisions(self.model, self.tokenizer, every)
        rows = self.kind(self.tokenizer, Corpus("held out"), 2048, self.length)
        known = {name: next(iter(by_wording.values())) for name, by_wording in found.items()}
        self.record.write(
            **{key: round(value, 4) for key, value in entry.items()},
            held_out_loss=round(held_out_loss(self.model, rows, 10), 4), precision=known, lives_in=found["lives_in"],
        )  # fmt: skip
        self.model.train()
        return known


def save(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("bert", "gpt"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50.0)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch, for each process")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
