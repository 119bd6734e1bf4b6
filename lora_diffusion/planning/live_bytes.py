"""Counting the bytes of all tensors that are alive while code runs, with real tensors or with fake ones.

PyTorch tells a dispatch mode of every operation; a storage that an operation brings forth is counted from then until
it is freed, which a weak reference to it reports. So what autograd keeps, what checkpointing drops and makes again and
what a hand-written backward holds on to is counted as it happens, not as somebody thinks it should.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = "activations"
_READ_ONE = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_DETACH = torch.ops.aten.detach.default


class LiveBytes(TorchDispatchMode):
    """A context in which the bytes of live tensors are counted, by part.

    What an operation makes counts as activations until `adopt` says otherwise; what was there before the context began
    counts from the moment when it is adopted.

    Args:
        workspace: called with (operation, arguments, result), says how many bytes a kernel needs on the side.

    Attributes:
        parts: bytes alive now, by part.
        peak, at_peak: the most bytes at any moment, and their parts then.
        events: everything in order, for `allocator.replay`: (number, bytes) for a storage made, (number, -1) for one
            freed.
    """

    def __init__(self, workspace: Callable[[Any, Any, Any], int] | None = None) -> None:
        super().__init__()
        self.parts: dict[str, int] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.events: list[tuple[int, int]] = []
        self._workspace = workspace
        self._now = 0
        self._count = 0
        self._known: dict[int, list[Any]] = {}  # storage → [its part, its bytes, the weak reference]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # spares a wrapper around every operation; nothing is compiled here

    def adopt(self, tensor: torch.Tensor, part: str, nbytes: int | None = None) -> None:
        """Count a tensor's storage under `part`, with `nbytes` in place of its own size."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            self._add(tensor, part, nbytes)
            return
        self.parts[known[0]] -= known[1]
        self.parts[part] = self.parts.get(part, 0) + known[1]
        known[0] = part

    def reserve(self, sizes: Iterable[int], part: str) -> None:
        """Count blocks for which there is no tensor, for as long as the context goes on."""
        for size in sizes:
            self._made(size, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ_ONE and _is_fake(args[0]):  # a fake tensor has no value: any will do, only shapes count here
            return 1.0 if args[0].is_floating_point() else 1
        if func is _DEVICE and (device := getattr(args[0], "fake_device", None)) is not None:
            return device  # half of all calls: not worth the way through the fake mode
        result = func(*args, **(kwargs or {}))
        if func is _DETACH or func is _DEVICE:
            return result
        if isinstance(result, torch.Tensor):
            self._add(result, ACTIVATIONS)
        elif isinstance(result, tuple | list):
            for one in result:
                if isinstance(one, torch.Tensor):
                    self._add(one, ACTIVATIONS)
        if self._workspace is not None and (extra := self._workspace(func, args, result)):
            self._freed(self._made(extra, "workspace"), extra, "workspace")
        return result

    def _add(self, tensor: torch.Tensor, part: str, nbytes: int | None = None) -> None:
        storage: Any
        if tensor.is_mkldnn:  # oneDNN's own, which has no storage to be seen
            storage, key, held = tensor, id(tensor), tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            key, held = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        size = held if nbytes is None else nbytes
        number = self._made(size, part)

        def gone(_: Any) -> None:
            self._freed(number, size, self._known.pop(key)[0])

        self._known[key] = [part, size, weakref.ref(storage, gone)]

    def _made(self, size: int, part: str) -> int:
        self._count += 1
        self.events.append((self._count, size))
        self.parts[part] = self.parts.get(part, 0) + size
        self._now += size
        if self._now > self.peak:
            self.peak, self.at_peak = self._now, dict(self.parts)
        return self._count

    def _freed(self, number: int, size: int, part: str) -> None:
        self.events.append((number, -1))
        self.parts[part] -= size
        self._now -= size


def _is_fake(tensor: Any) -> bool:
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)
