"""A batch whose rows use different adapters, as one layer sees it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from .factors import LoraFactors


class RowPlan:
    """Which terms a layer stacks, and how strongly each acts in each row.

    parts: (part, scale) of every adapter at this layer that some row uses.
    choice: (rows, adapters) of the weights: 0 where a row does not use the adapter.
    made: what was worked out for other layers, by ranks and scales; most layers of a model need the same.
    """

    def __init__(
        self, parts: tuple[tuple[LoraFactors, float], ...], choice: torch.Tensor, made: dict[Any, torch.Tensor]
    ) -> None:
        self.parts = parts
        self.rows = choice.shape[0]
        widths = [(k, a.shape[0], scale * sign) for k, (part, scale) in enumerate(parts) for a, _, sign in part.pairs()]
        key = (tuple(widths), tuple(choice.flatten().tolist()))
        if key not in made:
            columns = [(choice[:, k : k + 1] * factor).expand(-1, width) for k, width, factor in widths]
            made[key] = torch.cat(columns, dim=1)
        self._by_batch = {self.rows: made[key]}

    def factors(self, batch: int) -> torch.Tensor:
        """(batch, Σr). A batch of twice the rows holds both halves of classifier-free guidance, one after the other.

        Raises ConfigError for any other size.
        """
        if batch not in self._by_batch:
            if batch != 2 * self.rows:
                raise ConfigError(
                    f"adapters_per_sample was told {self.rows} adapters and the batch has {batch} rows: "
                    "name one adapter (or None) for each row, or for each pair of rows of classifier-free guidance"
                )
            self._by_batch[batch] = self._by_batch[self.rows].repeat(2, 1)
        return self._by_batch[batch]
