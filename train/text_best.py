"""The best step's adapter in the place of the last one's, for as long as it is judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld


@contextmanager
def in_place(model: Any, file: Path | None) -> Iterator[None]:
    """Within the context the model's adapter has the values of a file; without a file, or one, its own.

    Afterwards it has the very bits that it had before.
    """
    if file is None or not file.is_file():
        yield
        return
    parameters = [parameter for found in ld.adapter_parameters(model).values() for parameter in found]
    before = [parameter.detach().clone() for parameter in parameters]
    ld.put_adapter(model, ld.read_adapter(file))
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
