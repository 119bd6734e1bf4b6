"""What a DreamBooth run writes beside what every run does: its card, a new word, what the adapter's file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lora_diffusion as ld
from lora_diffusion.files.embedding import write_embeddings
from train.card import dreambooth_card
from train.dreambooth_config import DreamBoothConfig
from train.saving import BEST_FILE, RunSaver, deciding, model_label, with_label

__all__ = ["BEST_FILE", "EMBEDDINGS_FOLDER", "Saver", "adapter_metadata", "model_label"]

EMBEDDINGS_FOLDER = "embeddings"


class Saver(RunSaver):
    """Writes for one DreamBooth run."""

    data_words: ClassVar[str] = "pictures, captions or masks"
    units: ClassVar[str] = "pictures"
    uploaded: ClassVar[tuple[str, ...]] = (*RunSaver.uploaded, "samples/*.png", f"{EMBEDDINGS_FOLDER}/*")

    def metadata(self, step: int) -> dict[str, Any]:
        return adapter_metadata(self.config, step, self.world.size)

    def save_adapter(self, step: int) -> Path:
        """Write the result, and a new word once more for tools that load words by themselves."""
        if self.config.placeholder_token is not None:
            write_embeddings(ld.get_adapter(self.target), self.folder.path / EMBEDDINGS_FOLDER)
        return super().save_adapter(step)

    def save_card(self, step: int, samples: list[Path]) -> None:
        public = with_label(self.config)
        latest = [path for path in samples if samples and path.name.split("-")[1] == samples[-1].name.split("-")[1]]
        self.write_card(dreambooth_card(public, steps=step, samples=latest))


def adapter_metadata(config: DreamBoothConfig, step: int, processes: int = 1) -> dict[str, Any]:
    """What travels inside the adapter file."""
    public = with_label(config)
    return {
        "recipe": "dreambooth",
        "base_model": public.pretrained_model_name_or_path,
        "instance_prompt": config.instance_prompt,
        **({"trigger_words": [word]} if (word := config.placeholder_token or config.subject_token) else {}),
        "steps": step,
        **({"processes": processes} if processes > 1 else {}),
        "settings": {name: value for name, value in deciding(public).items() if value is not None},
    }
