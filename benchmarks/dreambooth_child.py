"""One training in a process of its own, watched from inside: when each step ended, what memory was taken by then.

    python benchmarks/dreambooth_child.py MARKS ours --model pocket …          # lora-diffusion dreambooth
    python benchmarks/dreambooth_child.py MARKS path/to/train_dreambooth_lora.py --pretrained_model_name_or_path …

Neither program is changed. Both clear the gradients once a step, whether or not it was skipped, so a step ends where
`torch.optim.Optimizer.zero_grad` returns: the same place for both. MARKS gets one JSON object.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.machinery
import importlib.util
import json
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

MARKS: dict[str, Any] = {"imported": time.time(), "ends": [], "cpu": [], "peaks": [], "losses": [], "parameters": 0}


def main() -> None:
    marks_file, program = Path(sys.argv[1]), sys.argv[2]
    atexit.register(lambda: write(marks_file))
    watch_steps()
    if program == "ours":
        sys.argv = ["lora-diffusion", "dreambooth", *sys.argv[3:]]
        from app.cli import main as command_line

        sys.exit(command_line())
    watch_losses()
    stand_in_for_torchvision()
    sys.argv = [program, *sys.argv[3:]]
    sys.path[0] = str(Path(program).resolve().parent)
    runpy.run_path(program, run_name="__main__")


def write(path: Path) -> None:
    MARKS["peak"] = peak()
    if torch.cuda.is_initialized():
        MARKS["reserved"] = torch.cuda.max_memory_reserved()
        MARKS["device"] = torch.cuda.get_device_name()
    path.write_text(json.dumps(MARKS))


def watch_steps() -> None:
    cleared = torch.optim.Optimizer.zero_grad

    def zero_grad(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        cleared(self, *args, **kwargs)
        MARKS["ends"].append(time.time())
        MARKS["cpu"].append(time.process_time())
        MARKS["peaks"].append(peak())
        if not MARKS["parameters"]:
            MARKS["parameters"] = sum(p.numel() for group in self.param_groups for p in group["params"])

    torch.optim.Optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def peak() -> int:
    """Bytes allocated on the GPU at most so far, or resident in this process."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # rather than getrusage, whose figure starts at that of the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest) if sys.platform == "darwin" else int(largest) * 1024


def watch_losses() -> None:
    """The script tells its loss to accelerate's trackers; ours writes it to events.jsonl."""
    import accelerate

    log = accelerate.Accelerator.log

    def noted(self: Any, values: dict, *args: Any, **kwargs: Any) -> None:
        if "loss" in values:
            MARKS["losses"].append(float(values["loss"]))
        log(self, values, *args, **kwargs)

    accelerate.Accelerator.log = noted


def stand_in_for_torchvision() -> None:
    """Where torchvision is not installed, `from torchvision import transforms` finds our stand-in.

    diffusers and transformers have by then been asked whether there is a torchvision, and keep to their no.
    """
    if importlib.util.find_spec("torchvision") is not None:
        MARKS["transforms"] = "torchvision"
        return
    import diffusers  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    import dreambooth_transforms

    stand_in = types.ModuleType("torchvision")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    stand_in.transforms = dreambooth_transforms  # type: ignore[attr-defined]
    sys.modules["torchvision"] = stand_in
    MARKS["transforms"] = "stand-in"


if __name__ == "__main__":
    main()
