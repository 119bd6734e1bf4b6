"""Where pocket is: the small Stable Diffusion that is shipped along, so that everything runs without a download."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.errors import ModelNotFoundError

_HERE = Path(__file__).resolve().parent
_HOMES = (_HERE / "_pocket", _HERE.parent / "examples" / "pocket")  # the installed package, the source tree


def pocket_dir() -> Path:
    """The folder of the embedded model, as `StableDiffusionPipeline.from_pretrained` loads it."""
    return _find("model", "model_index.json")


def judge_dir() -> Path:
    """The folder of the judge that was trained beside the model (`train.judge`)."""
    return _find("judge", "judge.safetensors")


def subjects_dir() -> Path:
    """The folder of the shipped subjects (`train.subjects`)."""
    return _find("subjects", "zorp/subject.json")


def _find(part: str, witness: str) -> Path:
    """Raises ModelNotFoundError where this copy of the project was made without that part."""
    for home in _HOMES:
        if (home / part / witness).is_file():
            return home / part
    raise ModelNotFoundError(
        f"the {part} of the embedded model 'pocket' is not in {' nor in '.join(str(h / part) for h in _HOMES)}; "
        "install the project again, or name another model with --model"
    )
