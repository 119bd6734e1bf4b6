"""The settings of `lora-diffusion inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import setting


@dataclass(frozen=True)
class InspectConfig:
    """Which file to look into, and how to say it."""

    file: str = setting(help="an adapter file, or a folder with one in it", metavar="FILE", positional=True)
    json: bool = setting(False, "print JSON")
