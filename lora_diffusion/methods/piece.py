"""What one adapter of another kind than low rank has put into a component."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..errors import AdapterMismatchError, ConfigError
from .config import MethodConfig


class Piece:
    """The learned part of one method in one component, and how it is switched.

    A method derives from this. `build` in its module attaches the piece, not acting.

    config: how it was made. name: of the adapter.
    """

    def __init__(self, config: MethodConfig, name: str) -> None:
        self.config, self.name = config, name

    @property
    def kind(self) -> str:
        return self.config.kind

    def modules(self) -> Iterator[nn.Module]:
        """The modules that hold what is learned; they are submodules of the component."""
        raise NotImplementedError

    def parameters(self) -> Iterator[nn.Parameter]:
        """What learns, in a fixed order."""
        for module in self.modules():
            yield from module.parameters()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that has to be kept, live and by names of its own: what training goes on from."""
        raise NotImplementedError

    def check_weight(self, weight: float) -> None:
        """Raises ConfigError for a strength that means nothing to the method; most take any."""

    def act(self, weight: float) -> None:
        """Act with this strength, which `check_weight` has seen; with 0.0 the component computes what it did without
        the piece, bit for bit."""
        raise NotImplementedError

    def act_in_rows(self, weights: Sequence[float] | None) -> None:
        """Act with a strength for each row of the coming batches (a batch of k·rows has the k copies of a row side by
        side, as beam search lays them out); None: as `act` said last. Raises ConfigError where the method cannot."""
        if weights is not None:
            raise ConfigError(f"adapter {self.name!r} ({self.kind}) cannot be mixed row by row: run it on its own")

    def remove(self) -> None:
        """Leave the component as it was before."""
        raise NotImplementedError

    def replaces(self, module: nn.Module) -> bool:
        """Whether the piece puts other parameters into a module while it acts."""
        return False

    def base_weights(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """(module, the base's own `weight` of it) where the piece has put another in its place."""
        return iter(())

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite what `tensors` gives, in place. Raises AdapterMismatchError for other names or shapes; nothing has
        changed then."""
        own = self.tensors()
        if set(own) != set(tensors):
            names = sorted(set(own) ^ set(tensors))
            raise AdapterMismatchError(f"the {self.kind} tensors are others than this model's: {', '.join(names[:3])}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise AdapterMismatchError(
                    f"{self.kind}: {name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
