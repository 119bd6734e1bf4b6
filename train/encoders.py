"""Encoders that judge pictures: DINO, DINOv2 and CLIP through transformers, pocket's own judge without a download.

A further one is a class with what `Encoder` asks for, and a line in `_load`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from lora_diffusion.errors import ConfigError, ModelNotFoundError
from train.metrics import as_unit

# Short names, each with the repository and the revision of it that has safetensors.
KNOWN = {
    "dino": ("facebook/dino-vits16", "refs/pr/1"),
    "dinov2": ("facebook/dinov2-base", "main"),
    "clip": ("openai/clip-vit-base-patch32", "main"),
}
FLAGS = ("--image_encoder", "--text_encoder")
_BATCH = 16
_READABLE = ("vit", "dinov2", "clip")  # model types


class Encoder(Protocol):
    """Judges pictures.

    Attributes:
        name: what it is called in a report.
    """

    name: str

    def embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(n, dim) fp32 unit vectors on the CPU; the cosine of two says how much the pictures show the same."""

    def follows(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor | None:
        """(n,) how well each picture shows its prompt, NaN where it cannot tell; None if it cannot read at all."""


@dataclass(frozen=True)
class Encoders:
    """The encoder of likeness, and that of prompt following where there is one."""

    image: Encoder
    text: Encoder | None

    @property
    def names(self) -> dict[str, str | None]:
        return {"image": self.image.name, "text": None if self.text is None else self.text.name}


def find_encoders(
    image: str, text: str, model: str, device: torch.device | str = "cpu", flags: tuple[str, str] = FLAGS
) -> Encoders:
    """Load the encoders that the settings name.

    Args:
        image: dino, dinov2, clip, pocket, a folder, a hub id, or auto: pocket for the pocket model, else dino.
        text: clip, pocket, a folder or hub id of a CLIP, none, or auto: pocket for the pocket model, else clip.
        model: the base model whose pictures are judged.
        flags: what the settings are called, for the errors.

    Raises:
        ModelNotFoundError: one of them is not here and cannot be fetched.
        ConfigError: it is of a kind that cannot be used.
    """
    pocket = model == "pocket"
    image_name = ("pocket" if pocket else "dino") if image == "auto" else image
    text_name = ("pocket" if pocket else "clip") if text == "auto" else text
    images = _load(image_name, flags[0], device)
    if text_name == "none":
        return Encoders(images, None)
    texts = images if text_name == image_name else _load(text_name, flags[1], device)
    if texts.follows([], []) is None:
        raise ConfigError(f"{flags[1]} {text_name} reads no text: give a CLIP, or 'none' to go without")
    return Encoders(images, texts)


class Pocket:
    """The pocket model's judge; prompt following is the share of what a prompt asks that it finds."""

    name = "pocket's judge"

    def __init__(self) -> None:
        from train.judge import pocket_judge

        self._judge = pocket_judge()

    def embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return as_unit(self._judge.embed(pictures))

    def follows(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor | None:
        from train.pocket_words import asked

        if not pictures:
            return torch.empty(0)
        shares = []
        for seen, prompt in zip(self._judge.read(pictures), prompts, strict=True):
            asks = asked(prompt, self._judge.heads)
            right = sum(seen[name] == value for name, value in asks.items())
            shares.append(right / len(asks) if asks else math.nan)
        return torch.tensor(shares)


class VisionTransformer:
    """DINO (a ViT) or DINOv2: the state of the class token."""

    def __init__(self, name: str, network: Any, processor: Any) -> None:
        self.name, self._network, self._processor = name, network, processor

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        parts = [self._network(pixel_values=x).last_hidden_state[:, 0] for x in _pixels(self, pictures)]
        return as_unit(torch.cat(parts))

    def follows(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor | None:
        return None


class Clip:
    """CLIP: pictures and texts in one space; prompt following is the cosine of the two (CLIP-T)."""

    def __init__(self, name: str, network: Any, processor: Any, tokenizer: Any) -> None:
        self.name, self._network, self._processor, self._tokenizer = name, network, processor, tokenizer

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        net = self._network
        parts = [net.visual_projection(net.vision_model(pixel_values=x).pooler_output) for x in _pixels(self, pictures)]
        return as_unit(torch.cat(parts))

    @torch.no_grad()
    def follows(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor | None:
        if not pictures:
            return torch.empty(0)
        net, distinct = self._network, list(dict.fromkeys(prompts))
        tokens = self._tokenizer(distinct, padding=True, truncation=True, return_tensors="pt").to(net.device)
        states = net.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        texts = as_unit(net.text_projection(states))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return (self.embed(pictures) * texts[rows]).sum(dim=-1)


def _pixels(encoder: Any, pictures: Sequence[Image.Image]) -> Any:
    """Batches of preprocessed pictures on the network's device."""
    for start in range(0, len(pictures), _BATCH):
        batch = [picture.convert("RGB") for picture in pictures[start : start + _BATCH]]
        yield encoder._processor(images=batch, return_tensors="pt")["pixel_values"].to(encoder._network.device)


def _load(name: str, flag: str, device: torch.device | str) -> Encoder:
    if name == "pocket":
        return Pocket()
    place, revision = KNOWN.get(name, (name, "main"))
    folder = Path(place).expanduser()
    if folder.is_dir():
        place = str(folder)
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{flag} {name}: the folder has no config.json; a transformers model is needed")
    elif folder.exists() or place.startswith((".", "/", "~")) or place.count("/") != 1:
        raise ModelNotFoundError(
            f"{flag} {name}: there is no such folder; give a folder, a hub id (owner/name), or {', '.join(KNOWN)} or "
            "pocket"
        )
    try:
        return _read(place, revision, device, flag, local=True)
    except (OSError, ValueError) as problem:
        if folder.is_dir():
            raise ModelNotFoundError(f"{flag} {name} cannot be loaded: {_one_line(problem)}") from problem
    except (KeyError, TypeError, AttributeError, RuntimeError) as problem:
        raise ModelNotFoundError(f"{flag} {name} cannot be loaded: {_one_line(problem)}") from problem
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(place, revision=revision, timeout=10)  # answers at once; a download tries for half a minute
        return _read(place, revision, device, flag, local=False)
    except ConfigError:
        raise
    except Exception as problem:  # the hub's client raises its own kinds, httpx's and the system's
        raise ModelNotFoundError(
            f"{flag} {place} is not in the local cache and cannot be fetched from the hub ({type(problem).__name__}: "
            f"{_one_line(problem)}); give {flag} a folder with a {_kinds(flag)} in transformers' layout with "
            "safetensors, or 'pocket' for pictures of the pocket model"
        ) from problem


def _read(place: str, revision: str, device: torch.device | str, flag: str, *, local: bool) -> Encoder:
    """The encoder in a folder or repository; nothing but safetensors, no code from there."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoTokenizer,
        CLIPModel,
        Dinov2Model,
        ViTModel,
    )  # fmt: skip

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False, "revision": revision}
    kind = AutoConfig.from_pretrained(place, **options).model_type
    if kind not in _READABLE:
        raise ConfigError(f"{flag} {place} is a {kind}; {', '.join(_READABLE)} are supported")
    weights = {**options, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    del weights["trust_remote_code"]
    processor = AutoImageProcessor.from_pretrained(place, backend="pil", **options)
    name = Path(place).name if Path(place).is_dir() else place

    def ready(loaded: Any) -> Any:
        network, info = loaded
        if info["missing_keys"]:
            raise ConfigError(f"{flag} {place} lacks weights of a {kind}, such as {min(info['missing_keys'])}")
        return network.eval().requires_grad_(False).to(device)

    if kind == "clip":
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        return Clip(name, ready(CLIPModel.from_pretrained(place, **weights)), processor, tokenizer)
    if kind == "vit":
        weights["add_pooling_layer"] = False  # not used, and missing in some files
    network_class = ViTModel if kind == "vit" else Dinov2Model
    return VisionTransformer(name, ready(network_class.from_pretrained(place, **weights)), processor)


def _kinds(flag: str) -> str:
    return "CLIP" if "text" in flag else "DINO (ViT), DINOv2 or CLIP"


def _one_line(problem: BaseException, limit: int = 160) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
