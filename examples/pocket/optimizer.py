"""The optimizer of the pocket trainings: Muon for matrices and convolutions, AdamW for the rest.

Muon orthogonalises the momentum of a weight matrix (Jordan et al. 2024); with the update's size matched to AdamW's
(Liu et al. 2025, "Muon is scalable for LLM training", eq. 4) one learning rate serves both. A convolution counts as a
matrix of (outputs, inputs × height × width). At these sizes it needs roughly half the steps of AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from training import Workers


class MuonAdamW:
    """torch.optim.Muon and torch.optim.AdamW behind one `step`.

    Args:
        parameters: all that is trained; at least two-dimensional ones go to Muon, except `elsewhere`.
        elsewhere: parameters that are tables or outputs rather than maps between hidden states (embeddings, first and
            last convolutions); AdamW takes them.
        scale: the learning rate's factor for a parameter, by identity; 1 where nothing is said.
        workers: where several processes train together, each takes its share of Muon's matrices and sends the others
            the result, so that the orthogonalisation is done once and not once per process.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], elsewhere: Iterable[nn.Parameter] = (), *, lr: float,
        weight_decay: float = 1e-2, scale: dict[nn.Parameter, float] | None = None, workers: Workers | None = None,
    ) -> None:  # fmt: skip
        apart = {id(p) for p in elsewhere}
        scales = {id(p): s for p, s in (scale or {}).items()}
        matrices: dict[float, list[nn.Parameter]] = {}
        rest: dict[float, list[nn.Parameter]] = {}
        self.views: list[tuple[nn.Parameter, nn.Parameter]] = []
        for p in parameters:
            factor = scales.get(id(p), 1.0)
            if p.ndim < 2 or id(p) in apart:
                rest.setdefault(factor, []).append(p)
                continue
            view = nn.Parameter(_as_matrix(p.data), requires_grad=True)
            self.views.append((p, view))
            matrices.setdefault(factor, []).append(view)
        self.workers = workers or Workers.alone()
        self.owner = _share_out([view for _, view in self.views], self.workers.count)
        self.muon = torch.optim.Muon(
            [{"params": ps, "factor": f} for f, ps in matrices.items()],
            lr=lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        self.adamw = torch.optim.AdamW(
            [{"params": ps, "factor": f} for f, ps in rest.items()],
            lr=lr,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            foreach=True,
        )

    def set_lr(self, lr: float) -> None:
        for group in (*self.muon.param_groups, *self.adamw.param_groups):
            group["lr"] = lr * group["factor"]

    def zero_grad(self) -> None:
        for p, view in self.views:
            p.grad = view.grad = None
        self.adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self) -> None:
        for p, view in self.views:
            mine = self.owner[id(view)] == self.workers.rank
            view.grad = _as_matrix(p.grad) if mine and p.grad is not None else None
        self.muon.step()
        self.adamw.step()
        for rank in range(self.workers.count if self.workers.count > 1 else 0):
            self.workers.send([view for _, view in self.views if self.owner[id(view)] == rank], rank)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def _share_out(views: list[nn.Parameter], count: int) -> dict[int, int]:
    """Which process updates which matrix: the largest first, each to the one with the least work so far."""
    load, owner = [0] * count, {}
    for view in sorted(views, key=lambda v: -v.numel() * min(v.shape)):
        rank = load.index(min(load))
        load[rank] += view.numel() * min(view.shape)
        owner[id(view)] = rank
    return owner


def _as_matrix(t: torch.Tensor) -> torch.Tensor:
    """A two-dimensional view that shares storage where the layout allows (contiguous or channels last)."""
    if t.ndim == 2:
        return t
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1).reshape(t.shape[0], -1)
    return t.reshape(t.shape[0], -1)
