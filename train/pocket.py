"""Where pocket is: the small Stable Diffusion that is shipped along, so that everything runs without a download."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.errors import ModelNotFoundError


def pocket_dir() -> Path:
    """The folder of the embedded model: inside the installed package, or in the source tree.

    Raises:
        ModelNotFoundError: this copy of the project was made without it.
    """
    here = Path(__file__).resolve().parent
    places = [here / "_pocket" / "model", here.parent / "examples" / "pocket" / "model"]
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    raise ModelNotFoundError(
        f"the embedded model 'pocket' is not in {places[0]} nor in {places[1]}; install the project again, "
        "or name another model with --model"
    )
