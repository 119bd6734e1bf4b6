"""A transformer's blocks, and the modules in them whose outputs go into the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import AdapterMismatchError


@dataclass(frozen=True)
class Family:
    """How one kind of block names its parts; paths inside a block.

    attention, mlp: (the output projection, which says the width; the module whose output enters the residual sum: the
        projection itself, or the dropout behind it). attention may have more: cross-attention.
    query, mlp_in: the linear layers of the queries and of the MLP's first half, of which a block has one each; none
        where these are fused with others.
    norm: the norm behind the residual sum of the MLP, None where norms stand in front.
    """

    name: str
    attention: tuple[tuple[str, str], ...]
    mlp: tuple[tuple[str, str], ...]
    query: tuple[str, ...] = ()
    mlp_in: tuple[str, ...] = ()
    norm: str | None = None


FAMILIES = (
    Family(
        "BERT",  # RoBERTa, ELECTRA, DeBERTa
        (
            ("attention.output.dense", "attention.output.dropout"),
            ("crossattention.output.dense", "crossattention.output.dropout"),
        ),
        (("output.dense", "output.dropout"),),
        ("attention.self.query", "attention.self.query_proj"),
        ("intermediate.dense",),
        "output.LayerNorm",
    ),
    Family(
        "DistilBERT", (("attention.out_lin",) * 2,), (("ffn.lin2", "ffn"),), ("attention.q_lin",), ("ffn.lin1",),
        "output_layer_norm",
    ),
    Family(
        "GPT-2",
        (("attn.c_proj", "attn.resid_dropout"), ("crossattention.c_proj", "crossattention.resid_dropout")),
        (("mlp.c_proj", "mlp.dropout"),),
        mlp_in=("mlp.c_fc",),
    ),
    Family("Llama", (("self_attn.o_proj",) * 2,), (("mlp.down_proj",) * 2,), ("self_attn.q_proj",), ("mlp.up_proj",)),
    Family(
        "T5",
        (("layer.0.SelfAttention.o", "layer.0.dropout"), ("layer.1.EncDecAttention.o", "layer.1.dropout")),
        (
            ("layer.1.DenseReluDense.wo", "layer.1.dropout"),
            ("layer.2.DenseReluDense.wo", "layer.2.dropout"),
        ),
        ("layer.0.SelfAttention.q",),
    ),
    Family("BLOOM", (("self_attention.dense",) * 2,), (("mlp.dense_4h_to_h",) * 2,), mlp_in=("mlp.dense_h_to_4h",)),
    Family("GPT-NeoX", (("attention.dense",) * 2,), (("mlp.dense_4h_to_h",) * 2,), mlp_in=("mlp.dense_h_to_4h",)),
    Family("CLIP", (("self_attn.out_proj",) * 2,), (("mlp.fc2",) * 2,), ("self_attn.q_proj",), ("mlp.fc1",)),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """A module whose output is adapted. path: in the component. width: channels of its output. norm: whether it is the
    norm behind a residual sum, which has to see the sum with the adapter's part again."""

    path: str
    module: nn.Module
    width: int
    norm: bool = False


@dataclass(frozen=True)
class Block:
    """One block of a stack. number: over all stacks of the component, from 0 on."""

    path: str
    module: nn.Module
    family: Family
    number: int

    def attention(self) -> list[Site]:
        """Where the outputs of its attentions enter the residual stream."""
        return self._sites(self.family.attention)

    def mlp(self) -> list[Site]:
        """Where the output of its MLP does."""
        return self._sites(self.family.mlp)

    def behind_mlp(self) -> list[Site]:
        """The norm behind the residual sum of the MLP; the MLP's output where there is none."""
        if self.family.norm is None:
            return self.mlp()
        norm = self.module.get_submodule(self.family.norm)
        return [Site(f"{self.path}.{self.family.norm}", norm, self.mlp()[0].width, norm=True)]

    def _sites(self, pairs: tuple[tuple[str, str], ...]) -> list[Site]:
        found = []
        for projection, where in pairs:
            linear, module = _part(self.module, projection), _part(self.module, where)
            if linear is not None and module is not None:
                found.append(Site(f"{self.path}.{where}", module, out_width(linear) or 0))
        return found


def find_stacks(component: nn.Module) -> list[list[Block]]:
    """The stacks of known blocks in a component, in calling order: one, or an encoder and a decoder."""
    found: list[list[Block]] = []
    number = 0
    for path, module in component.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        family = next((f for f in FAMILIES if all(_is_block(block, f) for block in module)), None)
        if family is not None:
            found.append([Block(f"{path}.{k}", block, family, number + k) for k, block in enumerate(module)])
            number += len(module)
    return found


def stacks_or_refuse(component: nn.Module, way_out: str) -> list[list[Block]]:
    """`find_stacks`. Raises AdapterMismatchError with a way out where there is none."""
    found = find_stacks(component)
    if not found:
        names = ", ".join(family.name for family in FAMILIES)
        raise AdapterMismatchError(f"{type(component).__name__} has no blocks of a known kind ({names}); {way_out}")
    return found


def candidates(component: nn.Module) -> list[str]:
    """Suffixes of the linear layers in an unknown model's repeated blocks, those that write d channels first."""
    for _, module in component.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        widths = {path: out_width(part) for path, part in module[0].named_modules() if path}
        widths = {path: width for path, width in widths.items() if width is not None}
        if widths:
            smallest = min(width for width in widths.values() if width is not None)
            return sorted(widths, key=lambda path: widths[path] != smallest)
    return [path for path, part in component.named_modules() if path and out_width(part) is not None]


def out_width(module: nn.Module) -> int | None:
    """How many channels a module's output has, where its class says so: a linear layer, a norm, an embedding."""
    for name in ("out_features", "nf", "embedding_dim"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    weight = module._parameters.get("weight")
    return int(weight.shape[0]) if weight is not None and weight.ndim == 1 else None


def known_paths(blocks: list[Block]) -> Iterator[str]:
    """The paths of the blocks' query layers and of the first layers of their MLPs, as far as they have such."""
    for block in blocks:
        for inner in (*block.family.query, *block.family.mlp_in):
            if _part(block.module, inner) is not None:
                yield f"{block.path}.{inner}"


def _is_block(module: nn.Module, family: Family) -> bool:
    first = _part(module, family.attention[0][0])
    mlps = [_part(module, projection) for projection, _ in family.mlp]
    return first is not None and out_width(first) is not None and any(mlp is not None for mlp in mlps)


def _part(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        inner = module._modules.get(name)
        if inner is None:
            return None
        module = inner
    return module
