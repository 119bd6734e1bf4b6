"""What the app allows, whatever a page sends, and where it runs: on one's own machine or on a Space for all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lora_diffusion.errors import ConfigError

MIB = 2**20
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Limits:
    """The most that the app does for one request. The defaults are those of one's own machine.

    Attributes:
        steps, rank, width: of a training; width is that of a bottleneck or an encoder that is learned.
        batch: samples in a batch, and batches in a step.
        class_images: pictures of the class that a run may draw for itself.
        images, image_bytes, pixels: photos of a training: how many, and of each the file's size and width × height.
        side: of a picture that is trained on or drawn.
        count: pictures of one request, and previews of a run.
        grid: pictures of one grid.
        inference_steps: denoising steps of a picture.
        prompt: characters of a prompt.
        tokens: of a row of text.
        new_tokens: that a language model writes.
        rows, text_bytes: of a file of rows.
        wall_seconds: of one run; then it is stopped, and what was learned is kept.
        adapter_bytes: an adapter file that is imported.
        queue_length: runs that wait.
        runs_each: runs of one visitor that wait or go on.
        models: the base models that may be used; None for any.
        own_files_only: settings name no file or folder but those that were uploaded or are shipped along.
        private_runs: visitors see and touch their own runs only.
    """

    steps: int = 50_000
    rank: int = 256
    width: int = 4096
    batch: int = 64
    class_images: int = 1000
    images: int = 200
    image_bytes: int = 50 * MIB
    pixels: int = 100_000_000
    side: int = 2048
    count: int = 16
    grid: int = 100
    inference_steps: int = 200
    prompt: int = 4000
    tokens: int = 8192
    new_tokens: int = 2048
    rows: int = 1_000_000
    text_bytes: int = 500 * MIB
    wall_seconds: int = 24 * 3600
    adapter_bytes: int = 2048 * MIB
    queue_length: int = 100
    runs_each: int = 100
    models: tuple[str, ...] | None = None
    own_files_only: bool = False
    private_runs: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(field.default) is int and (type(value) is not int or value < 1):
                raise ConfigError(f"the limit {field.name} is {value!r}; it must be a whole number of 1 or more")


PUBLIC_MODELS = ("pocket", "pocket-bert", "pocket-gpt", "stable-diffusion-v1-5/stable-diffusion-v1-5")
PUBLIC = Limits(
    steps=2000,
    rank=64,
    width=512,
    batch=8,
    class_images=100,
    images=50,
    image_bytes=10 * MIB,
    pixels=40_000_000,
    side=768,
    count=4,
    grid=25,
    inference_steps=50,
    prompt=1000,
    tokens=1024,
    new_tokens=256,
    rows=20_000,
    text_bytes=20 * MIB,
    wall_seconds=3600,
    adapter_bytes=300 * MIB,
    queue_length=8,
    runs_each=2,
    models=PUBLIC_MODELS,
    own_files_only=True,
    private_runs=True,
)
"""Of a page that anybody can open."""


@dataclass(frozen=True)
class Place:
    """Where the app runs.

    Attributes:
        is_space: on Hugging Face.
        public: strangers may open the page.
        zero_gpu: the Space has a GPU for seconds at a time.
        training_allowed: and if not, `reason` says in a sentence why, and what to do.
    """

    is_space: bool = False
    public: bool = False
    zero_gpu: bool = False
    training_allowed: bool = True
    reason: str = ""

    @property
    def limits(self) -> Limits:
        return PUBLIC if self.public else Limits()


def where(environment: Mapping[str, str] | None = None, *, shared: bool = False) -> Place:
    """The place, from the environment.

    A Space is public unless LORA_DIFFUSION_TRAINING=1 (which its owner sets on a copy, or where it is private) says
    that training is wanted; visitors' runs are kept apart there all the same. LORA_DIFFUSION_TRAINING=0 turns
    training off anywhere. On ZeroGPU it is always off: nothing there lasts minutes.

    Args:
        environment: default: this process's.
        shared: the page can be reached from other machines.

    Raises:
        ConfigError: LORA_DIFFUSION_TRAINING is neither yes nor no.
    """
    environment = os.environ if environment is None else environment
    is_space = bool(environment.get("SPACE_ID")) or environment.get("SYSTEM", "").lower() == "spaces"
    zero_gpu = environment.get("SPACES_ZERO_GPU", "").lower() in _YES
    said = environment.get("LORA_DIFFUSION_TRAINING", "").strip().lower()
    if said not in ("", *_YES, *_NO):
        raise ConfigError(f"LORA_DIFFUSION_TRAINING is {said!a}; set it to 1 to allow training, to 0 to turn it off")
    reason = ""
    if zero_gpu:
        reason = "training takes minutes, and this Space has its GPU for seconds: duplicate it with a GPU of its own"
    elif said in _NO:
        reason = "training is turned off here (LORA_DIFFUSION_TRAINING=0)"
    elif is_space and said not in _YES:
        reason = (
            "all visitors share this Space: duplicate it, and set LORA_DIFFUSION_TRAINING to 1 in the settings of your "
            "copy to train there"
        )
    return Place(is_space, is_space or shared, zero_gpu, not reason, reason)
