"""Where the pocket text models are: a BERT and a GPT of a few megabytes that are shipped along, with their data."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.errors import ModelNotFoundError

NAMES = {"pocket-bert": "bert", "pocket-gpt": "gpt"}
"""The models' names and their folders."""

_HERE = Path(__file__).resolve().parent
_HOMES = (_HERE / "_pocket_text", _HERE.parent / "examples" / "pocket_text")  # the installed package, the source tree


def folder_of(name: str) -> Path | None:
    """The folder of `pocket-bert` or `pocket-gpt` as transformers' `from_pretrained` loads it; None for other names.

    Raises ModelNotFoundError where this copy of the project was made without the model.
    """
    return _find(name, f"{NAMES[name]}/config.json").parent if name in NAMES else None


def data_dir() -> Path:
    """The folder of the labelled data, `<task>/{train,validation,test}.jsonl`; raises as `folder_of` does."""
    return _find("the pocket tasks' data", "data/facts/train.jsonl").parents[1]


def _find(what: str, witness: str) -> Path:
    for home in _HOMES:
        if (home / witness).is_file():
            return home / witness
    raise ModelNotFoundError(
        f"{what} is not in {' nor in '.join(str(h / witness) for h in _HOMES)}; "
        "install the project again, or name another model's folder"
    )
