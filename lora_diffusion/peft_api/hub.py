"""Where an adapter's files are: a folder, or a repository on the Hub that is fetched to one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ModelNotFoundError
from ..files.peft_config import CONFIG

_WANTED = (
    CONFIG,
    "adapter_model.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.model",
)


def adapter_folder(place: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path:
    """The folder with an adapter's `adapter_config.json`.

    hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` for the Hub.
    Raises ModelNotFoundError where there is none.
    """
    folder = Path(place)
    if not folder.is_dir():
        folder = _fetched(str(place), subfolder, hub)
    folder = folder / subfolder if subfolder else folder
    if not (folder / CONFIG).is_file():
        raise ModelNotFoundError(f"{folder} has no {CONFIG}: give the folder that save_pretrained wrote")
    return folder


def _fetched(name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [f"{subfolder}/{pattern}" for pattern in _WANTED] if subfolder else list(_WANTED)
    given = {key: value for key, value in hub.items() if value is not None}
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **given))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelNotFoundError(f"{name!a} is no folder here, and the Hub did not give it: {reason}") from None
