"""Putting adapters into models and taking them out: new ones, given ones, copies of what is inside."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .adapter import Adapter, Learned, LowRank
from .components import canonical_path, choose_components, components_of
from .config import LoraConfig
from .errors import AdapterFormatError, AdapterMismatchError, ConfigError
from .initial import factors_of_weight, initial_factors
from .layers import LoraEmbedding, LoraFactors, layer_kind
from .layers.dora import row_norms
from .layers.learned_copy import check_copyable, make_copy
from .methods.config import MethodConfig
from .methods.piece import Piece
from .methods.registry import build
from .state import (
    adapter_names,
    check_layers,
    check_new_name,
    check_one_copy,
    check_removable,
    freeze_base,
    holders,
    install,
    refuse_merged,
    remove,
    state_of,
    states,
    take_back,
)
from .targets import find_copies, find_targets, nearest_words, unmatched_patterns
from .tokens import TextualInversionConfig, check_tokens, initial_vectors, install_tokens, refuse_tokens

AnyConfig = LoraConfig | MethodConfig


def add_adapter(
    target: Any,
    config: AnyConfig | Sequence[AnyConfig] | Mapping[str, AnyConfig | Sequence[AnyConfig]] | None,
    name: str = "default",
    *,
    tokens: Sequence[TextualInversionConfig] = (),
    components: Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> dict[str, list[str]]:
    """Add a new, trainable adapter and make it active with weight 1, beside those that are active already.

    target: an nn.Module or a diffusers pipeline.
    config: one config for the components named in `components` (default: the pipeline's UNet or transformer, or the
        bare module), or {"unet": config, "text_encoder": other, …}; None for an adapter of words alone. A LoraConfig,
        the config of another method (P-tuning, bottlenecks, BitFit …), or a list of several, one of each kind: an
        adapter made of all of them.
    tokens: words for a pipeline's text encoders to learn (textual inversion); with a config as well, pivotal tuning.
    dtype: of the factors; fp32 whatever the base is, so that small updates are not lost.
    generator: for the initial values; a CPU generator. Without it torch's global one is used. The values are drawn on
        the CPU in the order of `named_modules()`, hence the same on every device.

    The base parameters of the components concerned stop requiring gradients; taking the last adapter out restores that.
    Returns {component: paths of the modules that got a low-rank term}.
    Raises ConfigError (name, config) or AdapterMismatchError (nothing matches); the target is then as it was.
    """
    check_new_name(target, name)
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype}: give a floating-point dtype")
    if config is None and not tokens:
        raise ConfigError("config is None and there are no tokens: nothing would be learned")
    given = {} if config is None else _configs_per_component(target, config, components)
    configs = {c: one for c, several in given.items() for one in several if isinstance(one, LoraConfig)}
    methods = {c: [one for one in several if isinstance(one, MethodConfig)] for c, several in given.items()}
    words = initial_vectors(target, tokens, generator) if tokens else {}
    refuse_tokens(check_tokens(target, words), "tokens")
    modules = choose_components(target, dict.fromkeys([*given, *(c for v in words.values() for c in v)]))
    found = {component: find_targets(modules[component], cfg) for component, cfg in configs.items()}
    _check_patterns(configs, found)
    copied = {
        c: {p: m for one in several for p, m in find_copies(modules[c], one).items()} for c, several in given.items()
    }
    for component in given:
        check_layers(name, found.get(component, {}))
        for path, module in copied[component].items():
            check_copyable(path, module)
        state = state_of(modules[component])
        check_one_copy(state, state.weights if state is not None else (), copied[component])
    parts = {}
    for component, layers in found.items():
        parts[component] = {
            path: (layer, _new_part(path, layer, configs[component], dtype, generator))
            for path, layer in layers.items()
        }
    pieces = build_all(modules, methods, name, dtype, generator)
    vectors = install_tokens(target, name, words, dtype)
    for component in modules:
        copies = {path: (module, make_copy(module)) for path, module in copied.get(component, {}).items()}
        install(modules[component], name, configs.get(component), parts.get(component, {}), copies,
                vectors.get(component), pieces.get(component))  # fmt: skip
        freeze_base(modules[component])
        _activate(modules[component], name, 1.0)
    return {component: list(layers) for component, layers in found.items()}


def get_adapter(target: Any, name: str = "default") -> Adapter:
    """A copy of an adapter's tensors, on the CPU in their own dtype, with configs and metadata.

    Raises ConfigError if there is no such adapter.
    """
    components: dict[str, dict[str, LowRank]] = {}
    configs: dict[str, LoraConfig] = {}
    metadata: dict[str, Any] = {}
    copies: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    bases: dict[str, dict[str, Any]] = {}
    tokens: dict[str, dict[str, torch.Tensor]] = {}
    methods: dict[str, dict[str, Learned]] = {}
    for component, state in holders(target, name).items():
        installed = state.adapters[name]
        if installed.pieces:
            methods[component] = {
                kind: Learned(
                    piece.config, {key: t.detach().to("cpu", copy=True) for key, t in piece.tensors().items()}
                )
                for kind, piece in installed.pieces.items()
            }
        if installed.copies:
            copies[component] = {
                canonical_path(component, path): {
                    key: value.detach().to("cpu", copy=True) for key, value in module.learned(name).state_dict().items()
                }
                for path, module in installed.copies.items()
            }
        metadata.update(copy.deepcopy(installed.metadata))
        vectors = installed.vectors
        for word in vectors.words if vectors is not None else ():
            assert vectors is not None, "asked in the line above"
            tokens.setdefault(word, {})[component] = vectors.of(word).detach().to("cpu", copy=True)
        bases.update({component: installed.base} if installed.base is not None else {})
        if installed.config is None:
            continue
        configs[component] = installed.config
        components[component] = {
            canonical_path(component, path): _copied(layer.part(name)) for path, layer in installed.layers.items()
        }
    return Adapter(components, configs, metadata, copies=copies, tokens=tokens, methods=methods, bases=bases)


def put_adapter(target: Any, tensors: Adapter | Mapping[str, torch.Tensor], name: str = "default") -> None:
    """Overwrite the tensors of an adapter that is in the target, in place, for instance when a run is resumed.

    tensors: an Adapter, or the `flat()` of one. Layers and shapes have to be the same as those inside; so have an
    Adapter's scales. Optimizers that hold the parameters keep holding them.
    Raises AdapterFormatError or AdapterMismatchError; the target is then as it was.
    """
    inside = get_adapter(target, name)
    given = tensors if isinstance(tensors, Adapter) else inside.with_flat(tensors)
    old, new = inside.flat(), given.flat()
    if set(old) != set(new):
        raise AdapterFormatError(f"the tensors are not those of adapter {name!r}: {len(set(old) ^ set(new))} differ")
    wrong = [key for key in old if old[key].shape != new[key].shape]
    if wrong:
        shapes = f"{tuple(new[wrong[0]].shape)} for {tuple(old[wrong[0]].shape)}"
        raise AdapterMismatchError(
            f"{len(wrong)} tensors have another shape than in adapter {name!r}: {wrong[0]}, {shapes}"
        )
    for component, layers in inside.components.items():
        for path, layer in layers.items():
            if given.components[component][path].scale != layer.scale:
                raise AdapterMismatchError(
                    f"{component}.{path} has scale {layer.scale:g} in adapter {name!r} and "
                    f"{given.components[component][path].scale:g} in the tensors given: their alphas differ"
                )
    for component, state in holders(target, name).items():
        for path, layer in state.adapters[name].layers.items():
            source = given.components[component][canonical_path(component, path)]
            _fill(layer.part(name), source)
        for path, module in state.adapters[name].copies.items():
            module.learned(name).load_state_dict(given.copies[component][canonical_path(component, path)])
        vectors = state.adapters[name].vectors
        if vectors is not None:
            with torch.no_grad():
                vectors.vectors.copy_(torch.cat([given.tokens[word][component] for word in vectors.words]))
        for kind, piece in state.adapters[name].pieces.items():
            piece.put(given.methods[component][kind].tensors)


def adapter_parameters(target: Any, name: str = "default") -> dict[str, list[nn.Parameter]]:
    """{component: parameters of the adapter}, in a fixed order (A, B and DoRA's lengths of each layer, then those of
    learned copies, of words, and of other methods): what an optimizer should get."""
    found = {}
    for component, state in holders(target, name).items():
        installed = state.adapters[name]
        learned = [layer.part(name) for layer in installed.layers.values()]
        learned += [module.learned(name) for module in installed.copies.values()]
        learned += [installed.vectors] if installed.vectors is not None else []
        found[component] = [parameter for module in learned for parameter in module.parameters()]
        found[component] += [parameter for piece in installed.pieces.values() for parameter in piece.parameters()]
    return found


def delete_adapter(target: Any, name: str) -> None:
    """Take one adapter out of all components, and the words that it brought.

    Raises ConfigError if there is none of that name, or if it is merged.
    """
    found = holders(target, name)
    refuse_merged(found, name)
    modules = components_of(target)
    for component in found:
        check_removable(modules[component], name)
    for component in found:
        remove(modules[component], name)


def unload(target: Any, *, keep_merged: bool = False) -> None:
    """Take all adapters out: classes, names and values of the target are what they were before the first one.

    keep_merged: leave what `merge_adapters` put into the base weights there, for good.
    """
    for state in states(target).values():
        if keep_merged:
            state.merged = None
        take_back(state)
    for name in adapter_names(target):
        delete_adapter(target, name)


def _activate(component: nn.Module, name: str, weight: float) -> None:
    state = state_of(component)
    assert state is not None, "the adapter was installed just before"
    state.weights[name] = weight
    state.apply()


def build_all(
    modules: Mapping[str, nn.Module],
    methods: Mapping[str, Iterable[MethodConfig]],
    name: str,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> dict[str, dict[str, Piece]]:
    """{component: {kind: piece}}, attached and not acting; after an error nothing is left of any."""
    made: dict[str, dict[str, Piece]] = {}
    try:
        for component, configs in methods.items():
            for config in configs:
                piece = build(modules[component], config, name, dtype=dtype, generator=generator)
                made.setdefault(component, {})[config.kind] = piece
    except Exception:
        for pieces in made.values():
            for piece in reversed(pieces.values()):
                piece.remove()
        raise
    return made


def _configs_per_component(target: Any, config: Any, components: Iterable[str] | None) -> dict[str, list[AnyConfig]]:
    if not isinstance(config, Mapping):
        return {component: _listed(config) for component in choose_components(target, components)}
    if not config:
        raise ConfigError("config is empty: give a method's config, or a dict of component name to configs")
    if components is not None and set(components) != set(config):
        raise ConfigError(f"components={list(components)} and the keys of config, {list(config)}, differ: give one")
    return {component: _listed(one) for component, one in config.items()}


def _listed(config: Any) -> list[AnyConfig]:
    """One config or several, as a list. Raises ConfigError for anything else, and for two of a kind."""
    listed = list(config) if isinstance(config, list | tuple) else [config]
    wrong = [one for one in listed if not isinstance(one, LoraConfig | MethodConfig)]
    if wrong or not listed:
        raise ConfigError(
            f"config={config!r}: give a LoraConfig or another method's config, a list of them, or a dict of component "
            "name to these"
        )
    kinds = ["lora" if isinstance(one, LoraConfig) else one.kind for one in listed]
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"config has two of a kind ({', '.join(kinds)}): give each method once")
    return listed


def _check_patterns(configs: Mapping[str, LoraConfig], found: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """A rank_pattern or alpha_pattern that fits no targeted module of any component is a mistake, not a no-op."""
    for config in {id(config): config for config in configs.values()}.values():
        paths = [path for component, cfg in configs.items() if cfg is config for path in found[component]]
        for field in ("rank_pattern", "alpha_pattern"):
            idle = unmatched_patterns(getattr(config, field), paths)
            if idle:
                raise AdapterMismatchError(
                    f"{field}: {idle[0]!r} fits no targeted module; {nearest_words(idle, paths)}"
                )


def _new_part(
    path: str, layer: nn.Module, config: LoraConfig, dtype: torch.dtype, generator: torch.Generator | None
) -> LoraFactors:
    kind = layer_kind(layer)
    assert kind is not None, "find_targets() returns adaptable modules only"
    rank, scale, init = config.rank_for(path), config.scale_for(path), config.init_lora_weights
    if rank % getattr(layer, "groups", 1):
        raise ConfigError(f"{path} is a convolution of {layer.groups} groups: its rank has to be a multiple of that")
    a_shape, b_shape = kind.shapes(layer, rank)
    embedding = issubclass(kind, LoraEmbedding)
    if embedding and config.use_dora:
        raise ConfigError(f"{path} is an embedding, which DoRA is not for: put it into exclude_modules")
    anchored = isinstance(init, str) and init.startswith(("pissa", "olora"))
    if anchored and (len(a_shape) != 2 or embedding):
        raise ConfigError(f"init_lora_weights={init!r} is for linear layers, {path} is a {type(layer).__name__}")
    if anchored:
        a, b = factors_of_weight(kind.matrix(layer), rank, scale, str(init), generator)
        if a.shape[0] != rank:
            raise ConfigError(f"init_lora_weights={init!r}: rank {rank} is more than {path} has, {a.shape[0]}")
    else:
        a, b = initial_factors(a_shape, b_shape, init, generator, embedding=embedding)
    device = layer.weight.device
    part = LoraFactors(a.to(device, dtype), b.to(device, dtype), scale, config.lora_dropout, anchored=anchored)
    if config.use_dora:
        part.lora_magnitude_vector = nn.Parameter(row_norms(kind.matrix(layer), part).to(dtype))
    return part


def _copied(part: LoraFactors) -> LowRank:
    """The whole term of one layer; what an anchor takes off again is part of it, as more rank."""
    pairs = part.pairs()
    a = torch.cat([a for a, _, _ in pairs]) if len(pairs) > 1 else part.lora_A
    b = torch.cat([b * sign for _, b, sign in pairs], dim=1) if len(pairs) > 1 else part.lora_B
    magnitude = part.lora_magnitude_vector
    kept = [None if t is None else t.detach().to("cpu", copy=True) for t in (a, b, magnitude)]
    assert kept[0] is not None and kept[1] is not None, "every part has an A and a B"
    return LowRank(kept[0], kept[1], part.scale, kept[2])


@torch.no_grad()
def _fill(part: LoraFactors, source: LowRank) -> None:
    """The way back from `_copied`."""
    rank = part.rank
    part.lora_A.copy_(source.a[:rank])
    part.lora_B.copy_(source.b[:, :rank] if part.anchor_B is not None else source.b)
    if part.anchor_A is not None and part.anchor_B is not None:
        part.anchor_A.copy_(source.a[rank:])
        part.anchor_B.copy_(-source.b[:, rank:])
    if part.lora_magnitude_vector is not None and source.magnitude is not None:
        part.lora_magnitude_vector.copy_(source.magnitude)
