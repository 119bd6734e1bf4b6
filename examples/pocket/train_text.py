"""Make pocket's tokenizer and text encoder: python train_text.py --work ~/pocket --minutes 4

The tokenizer is a byte-level BPE in CLIP's form, so any word tokenises, `sks` too. The text encoder is a small
CLIPTextModel, first taught to name what a caption says (one linear head per attribute, thrown away afterwards); it
learns on with the UNet.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shards import scenes
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from training import Record, machine
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import Scene, caption
from world.captions import background
from world.creature import BODIES, TOPS
from world.palette import NAMES as COLOURS
from world.patterns import PATTERNS
from world.places import NAMES as PLACES
from world.scene import KINDS, SIDES, SIZES

LENGTH = 32
TEXT_SHARD = 500_000
GENERAL = (
    "the of and to in is on with for a an my your his her our its this that at by from as it one two three four five "
    "photo picture drawing painting dog cat toy person man woman child animal monster thing object style art close up "
    "front back wearing holding near under over behind small tiny large huge bright dark shiny old new sks"
)
UNSAID = "unsaid"
HEADS = {
    "kind": KINDS, "colour": COLOURS, "pattern": PATTERNS, "colour2": COLOURS, "size": tuple(SIZES),
    "side": tuple(SIDES),
    "place": (*PLACES, *COLOURS), "kind_b": (UNSAID, *KINDS), "colour_b": (UNSAID, *COLOURS), "body": (UNSAID, *BODIES),
    "top": (UNSAID, *TOPS), "eyes": (UNSAID, "1", "2", "3"), "mark": (UNSAID, "none", "star", "heart", "dot"),
    "mark_colour": (UNSAID, *COLOURS), "belly": (UNSAID, "True", "False"),
}  # fmt: skip


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's `</w>` word ends; every word of the grammar is one token."""
    rng = np.random.default_rng(0)
    texts = [caption(s, rng) for s in scenes(TEXT_SHARD, 6000)] + [GENERAL.replace(" sks", "")] * 60
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=900, min_frequency=4, end_of_word_suffix="</w>", initial_alphabet=alphabet),
    )
    merges = json.loads(bpe.to_str())["model"]["merges"]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet)]
    pieces += [m for m in dict.fromkeys("".join(pair) for pair in merges) if m not in set(pieces)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts to (n, LENGTH) int64 ids, padded and cut as StableDiffusionPipeline does."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def build_encoder(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=LENGTH, hidden_act="quick_gelu", projection_dim=128,
            bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1, pad_token_id=vocab_size - 1,
        )
    )  # fmt: skip


def labels(scene: Scene, text: str) -> list[int]:
    """What `text` says about `scene`, one class index per head; -100 (not scored) where it says nothing."""
    first = scene.things[0]
    second = scene.things[1] if len(scene.things) == 2 else None
    said = set(text.replace(",", " ").split())
    creature = first.creature if second is None else None
    found = {
        "kind": first.kind,
        "colour": first.colour if first.colour in said else None,
        "pattern": first.pattern if first.pattern == "plain" or first.pattern in said else None,
        "colour2": first.colour2 if first.pattern in said and first.colour2 in said else None,
        "size": first.size if second is None and (first.size == "" or first.size in said) else None,
        "side": first.side if second is None and (first.side == "" or first.side in text) else None,
        "place": scene.place if text.endswith(background(scene.place)) else None,
        "kind_b": second.kind if second else UNSAID,
        "colour_b": (second.colour if second.colour in said else None) if second else UNSAID,
        "body": creature.body if creature and creature.body in said else UNSAID,
        "top": creature.top if creature and creature.top != "nothing" and creature.top in text else UNSAID,
        "eyes": str(creature.eyes) if creature and ("eye" in said or "eyes" in said) else UNSAID,
        "mark": creature.mark if creature and creature.mark in said else UNSAID,
        "mark_colour": creature.mark_colour
        if creature and f"{creature.mark_colour} {creature.mark}" in text
        else UNSAID,
        "belly": "True" if creature and "belly" in said else UNSAID,
    }
    return [HEADS[k].index(v) if (v := found[k]) is not None else -100 for k in HEADS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(1)
    tokenizer = train_tokenizer(args.work / "tokenizer")
    model = build_encoder(len(tokenizer))
    heads = torch.nn.ModuleDict({k: torch.nn.Linear(128, len(v)) for k, v in HEADS.items()})
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-2)
    record = Record(args.work / "text.jsonl")
    record.write(event="start", vocabulary=len(tokenizer), parameters=sum(p.numel() for p in model.parameters()),
                 machine=machine())  # fmt: skip
    pool = scenes(TEXT_SHARD, 30_000)
    held = scenes(TEXT_SHARD + 1, 2000)
    rng = np.random.default_rng(2)

    def batch(chosen: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [caption(s, rng) for s in chosen]
        return encode(tokenizer, texts), torch.tensor([labels(s, t) for s, t in zip(chosen, texts, strict=True)])

    def logits(ids: torch.Tensor) -> list[torch.Tensor]:
        state = model(ids).last_hidden_state
        return [heads[k](state.mean(dim=1) + state[:, -1]) for k in HEADS]

    began, step = time.time(), 0
    while (spent := time.time() - began) < args.minutes * 60:
        ids, target = batch([pool[i] for i in rng.integers(0, len(pool), args.batch)])
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * spent / args.minutes / 60))
            )
        with torch.autocast("cpu", torch.bfloat16):
            out = logits(ids)
        loss = sum(F.cross_entropy(o.float(), target[:, k], ignore_index=-100) for k, o in enumerate(out))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            record.write(event="step", step=step, loss=round(float(loss), 3), minutes=round(spent / 60, 2))
    with torch.no_grad():
        ids, target = batch(held)
        right = {}
        for k, o in zip(range(len(HEADS)), logits(ids), strict=True):
            scored = target[:, k] >= 0
            right[list(HEADS)[k]] = round(float((o.argmax(-1) == target[:, k])[scored].float().mean()), 3)
    model.save_pretrained(args.work / "text_encoder")
    record.write(event="end", step=step, accuracy=right)


if __name__ == "__main__":
    main()
