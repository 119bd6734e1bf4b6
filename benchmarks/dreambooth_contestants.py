"""The contestants of the DreamBooth benchmark: the same work as two command lines, run and measured as processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_cases import ROOT, Case, Material

CHILD = Path(__file__).with_name("dreambooth_child.py")
THEIR_FILE = "pytorch_lora_weights.safetensors"
OUR_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class Setting:
    """script: diffusers' train_dreambooth_lora.py; scratch: a folder for models and runs; threads: of the CPU."""

    script: Path | None
    scratch: Path
    device: str
    threads: int
    limit: float


@dataclass
class Measured:
    """One training. `failed` says why there are no figures.

    steps_per_second: over all steps but the first.
    steps_per_cpu_second: the same by the time that the processor spent on it, which other load disturbs less.
    first_step: seconds from the start of the process; total: until it ended.
    peak: bytes when the last step ended; peak_whole: until the process ended.
    """

    failed: str = ""
    steps_per_second: float = math.nan
    steps_per_cpu_second: float = math.nan
    first_step: float = math.nan
    total: float = math.nan
    peak: int = 0
    peak_whole: int = 0
    reserved: int = 0
    file: Path | None = None
    file_bytes: int = 0
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    load: float = math.nan
    transforms: str = ""


def ours(case: Case, at: Material, output: Path, setting: Setting) -> list[str]:
    """`lora-diffusion dreambooth`. Captions and latents are encoded once, the text's states too where it is frozen."""
    flags = [
        *_shared(case, at, output),
        "--device", setting.device,
        "--text_encoder_lr", "1e-4",
        *(["--quantize", case.quantize] if case.quantize else []),
    ]  # fmt: skip
    return ["ours", *flags]


def theirs(case: Case, at: Material, output: Path, setting: Setting, *, precomputed: bool = False) -> list[str]:
    """The script, which by default encodes pictures and prompts anew in each step."""
    return [
        str(setting.script),
        *_shared(case, at, output),
        *(["--pre_compute_text_embeddings"] if precomputed else []),
    ]


def _shared(case: Case, at: Material, output: Path) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": at.model,
        "instance_data_dir": at.photos,
        "instance_prompt": at.prompt,
        "output_dir": output,
        "resolution": case.resolution,
        "train_batch_size": case.batch,
        "max_train_steps": case.steps,
        "checkpointing_steps": case.steps,
        "rank": case.rank,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": case.precision,
        "seed": 0,
    }
    if case.prior:
        flags |= {"class_data_dir": at.class_pictures, "class_prompt": at.class_prompt}
        flags |= {"num_class_images": at.class_count}
    switches = {
        "center_crop": True,
        "train_text_encoder": case.text_encoder,
        "with_prior_preservation": case.prior,
        "gradient_checkpointing": case.checkpointing,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return words + [f"--{name}" for name, on in switches.items() if on]


def run(command: list[str], case: Case, output: Path, setting: Setting) -> Measured:
    """Start a contestant, wait for it, read what it left."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    marks_file = output.with_name(output.name + ".marks.json")
    marks_file.unlink(missing_ok=True)
    load = os.getloadavg()[0]
    started = time.time()
    log = output.with_name(output.name + ".log")
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                [sys.executable, str(CHILD), str(marks_file), *command],
                stdout=stream, stderr=subprocess.STDOUT, env=_environment(setting), timeout=setting.limit,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return Measured(failed=f"not done after {setting.limit:.0f} s", load=load)
    ended = time.time()
    if code or not marks_file.is_file():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return Measured(failed=f"exit status {code}: {lines[-1][:200] if lines else 'no output'}", load=load)
    marks = json.loads(marks_file.read_text())
    ends = marks["ends"]
    if len(ends) != case.steps:
        return Measured(failed=f"{len(ends)} steps seen, {case.steps} were asked for", load=load)
    file = output / (OUR_FILE if command[0] == "ours" else THEIR_FILE)
    return Measured(
        steps_per_second=(len(ends) - 1) / (ends[-1] - ends[0]),
        steps_per_cpu_second=(len(ends) - 1) / (marks["cpu"][-1] - marks["cpu"][0]),
        first_step=ends[0] - started,
        total=ended - started,
        peak=marks["peaks"][-1],
        peak_whole=marks["peak"],
        reserved=marks.get("reserved", 0),
        file=file,
        file_bytes=file.stat().st_size,
        parameters=marks["parameters"],
        losses=marks["losses"] or _our_losses(output),
        load=load,
        transforms=marks.get("transforms", ""),
    )


def _our_losses(output: Path) -> list[float]:
    events = map(json.loads, (output / "events.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "step" and event["loss"] is not None]


def _environment(setting: Setting) -> dict[str, str]:
    changes = {
        "OMP_NUM_THREADS": str(setting.threads),
        "MKL_NUM_THREADS": str(setting.threads),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}),
    }
    return os.environ | changes


def disagreement(our: Measured, their: Measured) -> str:
    """Why two trainings were not the same work, or "": the same layers at the same rank, and something learned."""
    import torch

    import lora_diffusion as ld

    if our.parameters != their.parameters:
        return f"{our.parameters} parameters are trained by ours, {their.parameters} by theirs"
    shapes: list[dict[str, Any]] = []
    for who, measured in (("ours", our), ("theirs", their)):
        if not measured.losses or not all(map(math.isfinite, measured.losses)):
            return f"a loss of {who} is not finite: {measured.losses}"
        assert measured.file is not None
        adapter = ld.read_adapter(measured.file)
        layers = {f"{c}.{path}": layer for c, found in adapter.components.items() for path, layer in found.items()}
        if not all(layer.a.isfinite().all() and layer.b.isfinite().all() for layer in layers.values()):
            return f"the file of {who} holds values that are not finite"
        if not any(torch.count_nonzero(layer.b) for layer in layers.values()):
            return f"the file of {who} holds nothing that was learned"
        shapes.append({path: (layer.a.shape, layer.b.shape, layer.scale) for path, layer in layers.items()})
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()), key=str)[:2]
        return f"the files hold different layers: {odd}"
    return _foreign_reader(our)


def _foreign_reader(our: Measured) -> str:
    """What diffusers says of our file, or ""."""
    from diffusers import StableDiffusionPipeline

    try:
        state, _ = StableDiffusionPipeline.lora_state_dict(str(our.file))
    except Exception as problem:
        return f"diffusers does not read our file: {problem}"
    return "" if state else "diffusers finds nothing in our file"
