"""The noun in the middle: an adapter as data, without a model and without a file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import LoraConfig
from .errors import AdapterFormatError, AdapterMismatchError, ConfigError
from .methods.config import MethodConfig
from .structured import Structured

MAX_NAME_LENGTH = 100
COPY = "modules_to_save"  # what stands between a module's path and a tensor of its learned copy
PARTS = "adapter_parts"  # what stands between a component and the tensors of a method that is not low rank


@dataclass(frozen=True, eq=False)
class LowRank:
    """One module's update, ΔW = scale · B @ A.

    a: (rank, in_features), or (rank, in/groups, kh, kw) beside a convolution, or (rank, entries) beside an embedding.
    b: (out_features, rank), or (out, rank/groups, 1, 1), or (dim, rank).
    scale: what multiplies B @ A when the adapter's weight is 1; alpha / rank in most tools' words.
    magnitude: (out_features,), DoRA's learned length of each row of the weight; None for everything else. With it the
        update is no longer linear in B @ A: it depends on the base weight.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def alpha(self) -> float:
        """The alpha of tools that scale by alpha / rank."""
        return self.scale * self.rank

    def delta(self) -> torch.Tensor:
        """ΔW in fp32 as (out, in), or (out, in/groups, kh, kw). Raises AdapterMismatchError for DoRA."""
        if self.magnitude is not None:
            raise AdapterMismatchError("a DoRA layer's update depends on the base weight: merge it into a model")
        a, b = self.a.float(), self.b.float()
        groups = self.rank // b.shape[1]
        blocks = b.view(groups, -1, b.shape[1]) @ a.reshape(groups, b.shape[1], -1)
        return self.scale * blocks.view(b.shape[0], *a.shape[1:])


@dataclass(frozen=True, eq=False)
class Prompt:
    """Virtual tokens of a language model, as PEFT's prompt methods save them.

    kind: PEFT's peft_type: "PROMPT_TUNING", "P_TUNING" or "PREFIX_TUNING".
    embeddings: (tokens, dim), what stands in front of the input; for prefix tuning (tokens, layers · 2 · width), the
        keys and values in front of every layer's.
    fields: the other fields of its config, JSON values under PEFT's names.
    """

    kind: str
    embeddings: torch.Tensor
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Learned:
    """What a method other than low rank has learned in a component.

    config: how it was made; see `methods/`.
    tensors: everything that training goes on from, by the method's own names.
    """

    config: MethodConfig
    tensors: Mapping[str, torch.Tensor]


@dataclass
class Adapter:
    """Named low-rank tensors per component of a pipeline, with their configs.

    components: {"unet": {"mid_block.….to_q": LowRank, …}, "text_encoder": {…}}. CLIP text encoders are spelled with
        `text_model.` whatever the installed transformers calls them (see `components.canonical_path`).
    configs: how each component was made. The tensors and their scales decide; the config describes.
    metadata: JSON values that travel with the file (who trained it, on what, the prompt …).
    foreign: other programs' metadata found in the file, untouched.
    notes: what the reader of the file had to assume, in words.
    intact: whether the tensors are those of the hash that the file carries; None where it carries none.
    structured: layers whose update is no plain product (LoHa, LoKr, …), as they came; see `lowering.lowered`.
    tokens: learned words, textual inversion's: {"<s1>": {"text_encoder": (vectors, dim)}}.
    prompts: virtual tokens of a language model, {"model": Prompt}.
    bases: {component: fingerprint of the model that it was made for} (see `fingerprint.py`).
    methods: what methods other than low rank have learned: {component: {kind: Learned}}.
    copies: whole modules that were learned beside (`modules_to_save`): {component: {module path: {name: tensor}}}.
    """

    components: dict[str, dict[str, LowRank]]
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    dialect: str | None = None
    notes: list[str] = field(default_factory=list)
    copies: dict[str, dict[str, dict[str, torch.Tensor]]] = field(default_factory=dict)
    structured: dict[str, dict[str, Structured]] = field(default_factory=dict)
    tokens: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    methods: dict[str, dict[str, Learned]] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    intact: bool | None = None

    def is_empty(self) -> bool:
        kinds = (self.components, self.structured, self.methods)
        return not (any(any(kind.values()) for kind in kinds) or self.tokens or self.prompts)

    def layers(self) -> dict[str, dict[str, LowRank | Structured]]:
        """{component: {path: layer}}, of either kind."""
        names = dict.fromkeys([*self.components, *self.structured])
        return {name: {**self.components.get(name, {}), **self.structured.get(name, {})} for name in names}

    def layer_count(self) -> int:
        return sum(len(layers) for kind in (self.components, self.structured) for layers in kind.values())

    def flat(self) -> dict[str, torch.Tensor]:
        """{"unet.mid_block.….to_q.lora_A": A, …}: the bare factors, scale apart, as a checkpoint wants them."""
        tensors = {}
        for component, layers in self.components.items():
            for path, layer in layers.items():
                tensors[f"{component}.{path}.lora_A"] = layer.a
                tensors[f"{component}.{path}.lora_B"] = layer.b
                if layer.magnitude is not None:
                    tensors[f"{component}.{path}.lora_magnitude_vector"] = layer.magnitude
        for component, modules in self.copies.items():
            for path, values in modules.items():
                tensors.update({f"{component}.{path}.{COPY}.{name}": value for name, value in values.items()})
        for word, vectors in self.tokens.items():
            tensors.update({f"{component}.lora_tokens.{word}": vector for component, vector in vectors.items()})
        for component, learned in self.methods.items():
            for kind, part in learned.items():
                tensors.update({f"{component}.{PARTS}.{kind}.{name}": value for name, value in part.tensors.items()})
        return tensors

    def with_flat(self, tensors: Mapping[str, torch.Tensor]) -> Adapter:
        """A copy whose factors are replaced by those of a `flat()` of an adapter with the same layers.

        Raises AdapterFormatError where names differ.
        """
        if set(tensors) != set(self.flat()):
            missing, extra = sorted(set(self.flat()) - set(tensors)), sorted(set(tensors) - set(self.flat()))
            raise AdapterFormatError(
                f"the tensors are those of another adapter: {len(missing)} missing (such as {missing[:2]}), "
                f"{len(extra)} unknown (such as {extra[:2]})"
            )
        components = {
            component: {
                path: LowRank(
                    tensors[f"{component}.{path}.lora_A"],
                    tensors[f"{component}.{path}.lora_B"],
                    layer.scale,
                    tensors.get(f"{component}.{path}.lora_magnitude_vector"),
                )
                for path, layer in layers.items()
            }
            for component, layers in self.components.items()
        }
        copies = {
            component: {
                path: {name: tensors[f"{component}.{path}.{COPY}.{name}"] for name in values}
                for path, values in modules.items()
            }
            for component, modules in self.copies.items()
        }
        tokens = {
            word: {component: tensors[f"{component}.lora_tokens.{word}"] for component in vectors}
            for word, vectors in self.tokens.items()
        }
        methods = {
            component: {
                kind: Learned(
                    part.config, {name: tensors[f"{component}.{PARTS}.{kind}.{name}"] for name in part.tensors}
                )
                for kind, part in learned.items()
            }
            for component, learned in self.methods.items()
        }
        return dataclasses.replace(self, components=components, copies=copies, tokens=tokens, methods=methods)


def inferred_config(layers: Mapping[str, LowRank]) -> LoraConfig:
    """The LoraConfig that describes given tensors: most frequent rank and alpha, patterns for the rest."""
    ranks = {path: layer.rank for path, layer in layers.items()}
    # A scale of zero or below (adapters subtracted from each other) has no place in a config, which only describes.
    alphas = {path: layer.alpha if layer.alpha > 0 else float(layer.rank) for path, layer in layers.items()}
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=sorted(layers),
        rank_pattern={re.escape(path): rank for path, rank in ranks.items() if rank != r},
        alpha_pattern={re.escape(path): value for path, value in alphas.items() if value != alpha},
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
    )


def check_adapter_name(name: object) -> str:
    """A name usable as part of a parameter's name. Raises ConfigError."""
    if not isinstance(name, str) or not name or len(name) > MAX_NAME_LENGTH:
        raise ConfigError(f"adapter name {name!r}: give a string of 1 to {MAX_NAME_LENGTH} characters")
    if not name.isprintable() or any(char in name for char in "./\\") or name != name.strip():
        raise ConfigError(f"adapter name {name!r}: leave out dots, slashes, control characters and outer spaces")
    return name


def _most_common(values: Any) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)
