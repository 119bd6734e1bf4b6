"""The settings of the commands that work on adapter files: inspect, convert, combine, resize, extract, merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from train.config import setting

DTYPES = ("fp16", "bf16", "fp32")
METHODS = ("cat", "svd", "ties", "dare_ties", "dare_linear", "magnitude_prune")
_FILE = "an adapter file, or a folder with one in it"
_WEIGHTED = f"{_FILE}, with the weight it takes part with behind a colon (1 if left out)"


def _json() -> Any:
    return setting(False, "print one JSON object and nothing else")


def _output(what: str) -> Any:
    return setting(help=f"{what}; a file of that name is replaced", metavar="FILE", short="o")


def _to() -> Any:
    return setting(
        "diffusers", "the format to write: diffusers and kohya are files, peft is a folder", metavar="FORMAT"
    )


def _dtype() -> Any:
    return setting(None, "of the tensors in the file (default: that of the input)", choices=DTYPES)


@dataclass(frozen=True)
class InspectConfig:
    """Which file to look into, and how to say it."""

    file: str = setting(help=_FILE, metavar="FILE", positional=True)
    model: str | None = setting(None, "a model folder, or pocket: say which layers fit it", metavar="FOLDER")
    variant: str | None = setting(None, "of the model's weights, such as fp16")
    json: bool = _json()


@dataclass(frozen=True)
class ConvertConfig:
    """From one format to another."""

    source: str = setting(help=f"{_FILE}; pickles (.bin, .pt) are opened without running them",
                          metavar="SRC", positional=True)  # fmt: skip
    target: str = setting(help="what to write; a file of that name is replaced", metavar="DST", positional=True)
    to: str = setting(help="the format to write: diffusers and kohya are files, peft is a folder", metavar="FORMAT")
    alpha: float | None = setting(
        None, "the alpha that SRC was trained with, where it does not say: scales become alpha / rank", above=0
    )
    dtype: str | None = _dtype()
    component: tuple[str, ...] = setting(
        (), "write only this one (unet, text_encoder …), again for more; a bare model's layers are given this name"
    )
    json: bool = _json()


@dataclass(frozen=True)
class CombineConfig:
    """One adapter out of several."""

    adapters: tuple[str, ...] = setting(help=_WEIGHTED, metavar="FILE:WEIGHT", positional=True)
    output: str = _output("the combined adapter")
    method: str = setting(
        "cat", "cat: the exact sum, its rank is the sum of ranks; svd: the same at --rank; the others thin out first",
        choices=METHODS,
    )  # fmt: skip
    rank: int | None = setting(None, "the highest rank of the result (default: the largest of the inputs)", minimum=1)
    density: float = setting(0.5, "share of the entries that ties, dare and magnitude_prune keep", above=0, maximum=1)
    seed: int = setting(0, "for what dare drops", minimum=0)
    to: str = _to()
    dtype: str | None = _dtype()
    json: bool = _json()


@dataclass(frozen=True)
class ResizeConfig:
    """One adapter at another rank."""

    source: str = setting(help=_FILE, metavar="SRC", positional=True)
    output: str = _output("the resized adapter")
    rank: int | None = setting(None, "the rank of every layer; with --energy the highest", minimum=1)
    energy: float | None = setting(
        None, "give each layer the smallest rank that keeps this share of its squared singular values", above=0,
        maximum=1,
    )  # fmt: skip
    to: str = _to()
    dtype: str | None = _dtype()
    json: bool = _json()


@dataclass(frozen=True)
class ExtractConfig:
    """An adapter out of two models."""

    base: str = setting(help="the folder of the model that was tuned, or pocket", metavar="FOLDER")
    tuned: str = setting(help="the folder of what became of it", metavar="FOLDER")
    rank: int = setting(help="the highest rank of a layer", minimum=1)
    output: str = _output("the adapter")
    energy: float | None = setting(
        None, "give each layer the smallest rank that keeps this share of its squared singular values", above=0,
        maximum=1,
    )  # fmt: skip
    component: tuple[str, ...] = setting((), "compare only this one (unet, text_encoder …), again for more")
    target_modules: tuple[str, ...] = setting(
        (), "names or suffixes of layers, or 'all-linear'; again for more (default: all that can be extracted)"
    )
    variant: str | None = setting(None, "of both models' weights, such as fp16")
    to: str = _to()
    dtype: str = setting("fp32", "of the factors", choices=DTYPES)
    json: bool = _json()


@dataclass(frozen=True)
class MergeConfig:
    """A model folder with adapters in its weights."""

    model: str = setting(help="a model folder, or pocket", metavar="MODEL", positional=True)
    adapters: tuple[str, ...] = setting(help=_WEIGHTED, metavar="FILE:WEIGHT", positional=True)
    output: str = setting(help="the folder to make; it must not exist, or be empty", metavar="FOLDER", short="o")
    variant: str | None = setting(None, "of the model's weights, such as fp16")
    json: bool = _json()
