"""Existing parameters that learn: BitFit, top blocks, full fine-tuning.

What is learned is a second set of parameters that takes the base's place under the base's names while it acts; pointers
move, and the base's own objects are back with `act(0.0)`. Every parameter stands in one place at a time:

    acting                       the module has the learned one, `base_parameters` the base's
    not acting                   the module has the base's, `<kind>_<adapter>` the learned one
    another weight, or several   the module has base + Σ w·(learned − base), computed once; both of them wait

So `state_dict()` of a component shows under the base's names what acts, and what waits under additional ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..errors import AdapterMismatchError, ConfigError
from ..layers.quantised import is_quantised
from ..state import state_of
from ..targets import find_copies
from .base_places import Bank, Place, Waiting, base_places, mixture
from .blocks import Block, known_paths, stacks_or_refuse
from .parameters_config import BitFitConfig, ParametersConfig, TopLayersConfig
from .piece import Piece

_BANK = "base_parameters"
_MIXED = ""


class ParametersPiece(Piece):
    """One adapter's learned parameters in one component."""

    config: ParametersConfig

    def __init__(self, config: ParametersConfig, name: str, component: nn.Module, places: list[Place]) -> None:
        super().__init__(config, name)
        self._component, self._places = component, places

    @property
    def _child(self) -> str:
        return f"{self.kind}_{self.name}"

    def _bank(self) -> Bank:
        bank = self._component._modules[_BANK]
        assert isinstance(bank, Bank), "build() put it there"
        return bank

    def _learned(self, place: Place) -> nn.Parameter:
        if self._bank().taken.get(place.path) == self._child:
            return place.get()
        found = _waiting(self._component, self._child).look(place.path)
        assert found is not None, "a learned parameter is in place or waits"
        return found

    def modules(self) -> Iterator[nn.Module]:
        """The module of what waits; while the piece acts, its parameters are in the base's modules (`parameters`)."""
        yield _waiting(self._component, self._child)

    def parameters(self) -> Iterator[nn.Parameter]:
        for place in self._places:
            yield self._learned(place)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {place.path: self._learned(place) for place in self._places}

    def replaces(self, module: nn.Module) -> bool:
        """Whether this puts other parameters into a module: nothing else may exchange them meanwhile (merging)."""
        return any(module is owner for place in self._places for owner, _ in place.owners)

    def base_weights(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        """(module, the base's own `weight` of it) where something else has its place."""
        bank = self._bank()
        for place in self._places:
            base = bank.look(place.path)
            for owner, name in place.owners if base is not None else ():
                if name == "weight" and base is not None:
                    yield owner, base

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().put(tensors)
        self._settle()

    def act(self, weight: float) -> None:
        """Weights other than 0 and 1 are computed once, here: such a mixture does not learn.

        Raises ConfigError where FSDP2 holds the parameters: it would put back those that it was given.
        """
        weights = self._bank().weights
        if weights.get(self._child, 0.0) != weight and any(_is_sharded(place.get()) for place in self._places):
            raise ConfigError(
                f"adapter {self.name!r} ({self.kind}) is in shards (FSDP2), which hold what acted when they were made: "
                "switch it off, on or out in a model that is not sharded"
            )
        weights[self._child] = weight
        self._settle()

    def remove(self) -> None:
        self.act(0.0)
        bank = self._bank()
        del self._component._modules[self._child], bank.users[self._child], bank.weights[self._child]
        if not bank.users:
            del self._component._modules[_BANK]

    def _settle(self) -> None:
        """Bring every place in line with the strengths of all that have learned it."""
        bank = self._bank()
        for place in self._places:
            acting = {
                child: bank.weights[child]
                for child, paths in bank.users.items()
                if bank.weights.get(child) and place.path in paths
            }
            chosen = next(iter(acting)) if list(acting.values()) == [1.0] else _MIXED if acting else None
            if chosen == bank.taken.get(place.path) and chosen != _MIXED:
                continue
            base = self._base_home(place)
            if chosen is None:
                place.set(base)
                continue
            if chosen == _MIXED:
                terms = [(_waiting(self._component, child).look(place.path), w) for child, w in acting.items()]
                place.set(mixture(base, [(learned, w) for learned, w in terms if learned is not None]))
            else:
                place.set(_waiting(self._component, chosen).take(place.path))
            bank.taken[place.path] = chosen
            if self.config.keep_base_on == "cpu":
                base.data = base.data.to("cpu")
            bank.put(place.path, base)

    def _base_home(self, place: Place) -> nn.Parameter:
        """The base's parameter, taken out of the bank where it was there; who had its place waits again."""
        bank = self._bank()
        there, inside = bank.taken.pop(place.path, None), place.get()
        if there is None:
            return inside
        if there != _MIXED:
            _waiting(self._component, there).put(place.path, inside)
        base = bank.take(place.path)
        base.data = base.data.to(inside.device)
        return base


def build(
    component: nn.Module,
    config: ParametersConfig,
    name: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> ParametersPiece:
    """Copy the parameters that `config` means and keep the copies beside, not acting.

    dtype, generator: not used. A parameter that takes the base's place has the base's dtype, and its values.
    Raises AdapterMismatchError (no such parameters, quantised ones, blocks of an unknown kind) or ConfigError (another
    adapter acts on the same parameters, or is merged into them); the component is then as it was.
    """
    chosen = _chosen(component, config)
    child = f"{config.kind}_{name}"
    for place in chosen:
        if is_quantised(place.get()) or not place.get().is_floating_point():
            raise AdapterMismatchError(
                f"{place.path} is quantised, and cannot learn as it is: load the base in a floating dtype, or take LoRA"
            )
    state = state_of(component)
    merged = {id(layer) for layer, _, _ in state.merged.weights} if state is not None and state.merged else set()
    inside = next((place.path for place in chosen if any(id(owner) in merged for owner, _ in place.owners)), None)
    if inside is not None:
        raise ConfigError(f"another adapter is merged into {inside}: call unmerge_adapters first")
    bank = component._modules.get(_BANK)
    if isinstance(bank, Bank):
        if child in bank.users:
            raise ConfigError(f"there is an adapter {name!r} of the kind {config.kind} already")
        taken = next((place.path for place in chosen if place.path in bank.taken), None)
        if taken is not None:
            raise ConfigError(
                f"another adapter acts in place of {taken}: switch it off first (set_adapters with the others' names)"
            )
    else:
        bank = Bank()
        component.add_module(_BANK, bank)
    waiting = Waiting()
    for place in chosen:
        waiting.put(place.path, nn.Parameter(place.get().detach().clone()))
    component.add_module(child, waiting)
    bank.users[child] = [place.path for place in chosen]
    return ParametersPiece(config, name, component, chosen)


def _chosen(component: nn.Module, config: ParametersConfig) -> list[Place]:
    """What `config` means, without what lies in modules of which whole copies are learned anyway."""
    copied = tuple(f"{path}." for path in find_copies(component, config))
    places = [place for place in base_places(component) if not place.path.startswith(copied)]
    kind = type(component).__name__
    if isinstance(config, BitFitConfig):
        found = [place for place in places if _is_bias(place)]
        if not found:
            raise AdapterMismatchError(f"{kind} has no biases, which are all that BitFit learns: take another method")
        return found if config.bias_terms == "all" else _of_query_and_mlp(component, found)
    if isinstance(config, TopLayersConfig):
        return _top(component, config, places)
    return places


def _is_bias(place: Place) -> bool:
    """By name and shape: `bias`, `in_proj_bias`, DeBERTa's `q_bias`; a table of position biases is none."""
    return any("bias" in name for _, name in place.owners) and place.get().ndim == 1


def _of_query_and_mlp(component: nn.Module, biases: list[Place]) -> list[Place]:
    blocks = [b for stack in stacks_or_refuse(component, "take bias_terms='all'") for b in stack]
    wanted = {f"{path}.bias" for path in known_paths(blocks)}
    found = [place for place in biases if place.path in wanted]
    if len(found) < 2 * len(blocks):
        raise AdapterMismatchError(
            f"bias_terms='query_mlp': {type(component).__name__} has no biases of its own for the queries and for the "
            "MLP's first layer; take bias_terms='all'"
        )
    return found


def _top(component: nn.Module, config: TopLayersConfig, places: list[Place]) -> list[Place]:
    stack = stacks_or_refuse(component, "list the top blocks in modules_to_save of another method")[-1]
    if config.num_layers > len(stack):
        raise ConfigError(f"num_layers={config.num_layers}: the model has {len(stack)} blocks")
    prefixes = [f"{block.path}." for block in stack[-config.num_layers :]]
    prefixes += [f"{_final_norm(component, stack)}."] if config.final_norm else []
    return [place for place in places if place.path.startswith(tuple(prefixes))]


def _final_norm(component: nn.Module, stack: list[Block]) -> str:
    """The norm beside the stack's list of blocks."""
    inside = stack[0].path.rpartition(".")[0].rpartition(".")[0]
    parent = component.get_submodule(inside) if inside else component
    for name in ("final_layer_norm", "ln_f", "norm", "final_layernorm"):
        if isinstance(parent._modules.get(name), nn.Module):
            return f"{inside}.{name}" if inside else name
    raise ConfigError("final_norm=True: the model has no norm behind its last block")


def _waiting(component: nn.Module, child: str) -> Waiting:
    module = component._modules[child]
    assert isinstance(module, Waiting), "build() put it there"
    return module


def _is_sharded(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "DTensor"
