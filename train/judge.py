"""The pocket model's judge: what a small picture shows, and how much a subject looks like itself.

A convolutional network trained apart from the model it judges (`examples/pocket/train_judge.py`), on drawn scenes and
on the same scenes through the autoencoder. It knows the pocket world and nothing else: for photographs use the encoders
of `lora-diffusion evaluate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lora_diffusion.errors import ModelNotFoundError


class _Block(nn.Module):
    """Two 3×3 convolutions with a skip; halves height and width when `stride` is 2."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm_one = nn.GroupNorm(8, outside)
        self.two = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm_two = nn.GroupNorm(8, outside)
        self.skip = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.norm_one(self.one(x)))
        return torch.relu(self.norm_two(self.two(h)) + self.skip(x))


class JudgeNetwork(nn.Module):
    """(n, 3, 64, 64) in [-1, 1] -> ({head: (n, classes)}, (n, 64) unit embeddings)."""

    def __init__(self, heads: Mapping[str, int], width: int = 32, embedding: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 2, 1)
        self.blocks = nn.Sequential(
            _Block(width, width, 1),
            _Block(width, 2 * width, 2),
            _Block(2 * width, 4 * width, 2),
            _Block(4 * width, 4 * width, 1),
        )
        flat = 4 * width * (4 * 4 + 1)
        self.trunk = nn.Sequential(nn.Linear(flat, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, classes) for name, classes in heads.items()})
        self.identity = nn.Sequential(nn.Linear(flat, 256), nn.ReLU(), nn.Linear(256, embedding))

    def forward(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        h = self.blocks(torch.relu(self.stem(x)))
        features = torch.cat([nn.functional.adaptive_avg_pool2d(h, 4).flatten(1), h.amax(dim=(2, 3))], dim=1)
        shared = self.trunk(features)
        embedding = nn.functional.normalize(self.identity(features).float(), dim=-1)
        return {name: head(shared) for name, head in self.heads.items()}, embedding


class Judge:
    """Reads pictures of the pocket world.

    Args:
        folder: holds `judge.safetensors` (weights, fp16) and `judge.json` (the heads and their classes).
    """

    def __init__(self, folder: Path) -> None:
        weights, words = folder / "judge.safetensors", folder / "judge.json"
        if not weights.is_file() or not words.is_file():
            raise ModelNotFoundError(f"no judge in {folder}: judge.safetensors and judge.json are expected there")
        self.heads: dict[str, list[str]] = json.loads(words.read_text())["heads"]
        self.network = JudgeNetwork({name: len(classes) for name, classes in self.heads.items()})
        self.network.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def _run(self, images: Sequence[Image.Image]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        pixels = np.stack([np.asarray(i.convert("RGB").resize((64, 64), Image.Resampling.BOX)) for i in images])
        return self.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)

    def read(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """What each picture shows: `{"kind": "cup", "colour": "red", "place": "beach", …}`."""
        logits, _ = self._run(images)
        best = {name: out.argmax(dim=-1).tolist() for name, out in logits.items()}
        return [{name: self.heads[name][best[name][k]] for name in self.heads} for k in range(len(images))]

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(n, 64) float32 unit vectors; the cosine of two says how much their subjects look alike."""
        return self._run(images)[1]

    def likeness(self, images: Sequence[Image.Image], real: Sequence[Image.Image]) -> float:
        """Mean cosine between every one of `images` and every one of `real`, as DreamBench computes DINO (in -1..1)."""
        return float((self.embed(images) @ self.embed(real).T).mean())

    def likeness_among(self, real: Sequence[Image.Image]) -> float:
        """Mean cosine between different pictures of one subject: the ceiling."""
        e = self.embed(real)
        n = len(e)
        return float(((e @ e.T).sum() - n) / (n * (n - 1)))


@lru_cache(maxsize=1)
def pocket_judge() -> Judge:
    """The judge that comes with the pocket model."""
    from train.pocket import judge_dir

    return Judge(judge_dir())
