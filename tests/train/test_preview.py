"""Who is on the device while pictures are drawn and encoded, told from what is moved where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from train import preview
from train.preview import Preview, encoder_alone, taking_turns

PARTS = ("unet", "text_encoder", "vae")


class Places:
    """Stands in for a GPU: remembers where each part was sent, and who was on the device when each part worked."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch, start: dict[str, str]) -> None:
        self.where = dict(start)
        self.seen: dict[str, set[str]] = {}
        self.rows: dict[str, int] = {}
        names = {id(getattr(pipe, name)): name for name in PARTS}
        pipe.vae._decode = self._watched("vae", pipe.vae._decode)
        pipe.vae._encode = self._watched("vae", pipe.vae._encode)
        for name in ("unet", "text_encoder"):
            module = getattr(pipe, name)
            module.forward = self._watched(name, module.forward)

        def move(modules: list[Any], place: Any) -> None:
            for module in modules:
                self.where[names[id(module)]] = torch.device(place).type

        monkeypatch.setattr(preview, "_move", move)

    def _watched(self, name: str, work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            on = {part for part, place in self.where.items() if place == "cuda"}
            assert name in on, f"{name} works while it is on the CPU"
            self.seen.setdefault(name, set()).update(on)
            self.rows[name] = max(self.rows.get(name, 0), len(args[0]))
            return work(*args, **kwargs)

        return run


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors asked onto the GPU stay where they are."""
    to = torch.Tensor.to
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.Tensor, "to", lambda self, *a, **k: self if a and a[0] == torch.device("cuda") else to(self, *a, **k)
        )
        yield


@pytest.mark.parametrize("trained", [False, True])
def test_parts_take_turns(
    tiny_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: bool
) -> None:
    """As a run leaves them: autoencoder on the CPU, text encoder too unless it is trained."""
    start = {"unet": "cuda", "text_encoder": "cuda" if trained else "cpu", "vae": "cpu"}
    places = Places(tiny_pipeline, monkeypatch, start)
    monkeypatch.setattr(StableDiffusionPipeline, "device", torch.device("cpu"))
    for name, place in start.items():
        monkeypatch.setattr(type(getattr(tiny_pipeline, name)), "device", torch.device(place), raising=False)
    shown = Preview("sks", 3, 1, 2, 0, 32, "tiny")
    with pretended(monkeypatch):
        made = shown.draw(tiny_pipeline, tmp_path, 1, torch.device("cuda"))
    assert len(made) == 3
    assert places.seen == {"text_encoder": {"unet", "text_encoder"}, "unet": {"unet"}, "vae": {"vae"}}
    assert places.rows == {"text_encoder": 1, "unet": 2, "vae": 1}
    assert places.where == start
    assert "decode" not in vars(tiny_pipeline.vae) and not tiny_pipeline.vae.use_slicing
    assert not tiny_pipeline.unet._forward_pre_hooks


def test_afterwards_all_is_where_it_was(tiny_pipeline: StableDiffusionPipeline, monkeypatch: Any) -> None:
    places = Places(tiny_pipeline, monkeypatch, dict.fromkeys(PARTS, "cuda"))
    for name in PARTS:
        monkeypatch.setattr(type(getattr(tiny_pipeline, name)), "device", torch.device("cuda"), raising=False)
    with pytest.raises(KeyboardInterrupt), taking_turns(tiny_pipeline, torch.device("cuda")):
        assert places.where == {"unet": "cuda", "text_encoder": "cuda", "vae": "cpu"}
        raise KeyboardInterrupt
    assert set(places.where.values()) == {"cuda"} and not tiny_pipeline.unet._forward_pre_hooks


def test_the_encoder_is_alone(tiny_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(tiny_pipeline, monkeypatch, dict.fromkeys(PARTS, "cuda"))
    with torch.no_grad(), encoder_alone(tiny_pipeline, torch.device("cuda")):
        tiny_pipeline.vae.encode(torch.zeros(3, 3, 32, 32))
    assert places.seen == {"vae": {"vae"}} and places.rows == {"vae": 1}
    assert set(places.where.values()) == {"cuda"} and not tiny_pipeline.vae.use_slicing


def test_on_the_cpu_nothing_moves(tiny_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "_move", lambda *_: pytest.fail("something moved"))
    for turn in (taking_turns, encoder_alone):
        with turn(tiny_pipeline, torch.device("cpu")):
            assert "decode" not in vars(tiny_pipeline.vae) and not tiny_pipeline.vae.use_slicing
