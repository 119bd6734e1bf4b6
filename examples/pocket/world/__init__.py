"""The pocket world: small drawn scenes with captions, from which the pocket model learns."""

from .captions import background, caption, describe
from .creature import Creature
from .scene import Scene, Thing, render, sample_scene
from .subjects import SUBJECTS, held_out

__all__ = [
    "SUBJECTS", "Creature", "Scene", "Thing", "background", "caption", "describe", "held_out", "render", "sample_scene",
]  # fmt: skip
