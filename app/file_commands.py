"""The jobs behind convert, combine and resize: adapter files in, an adapter file out. No model is needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from app.file_configs import CombineConfig, ConvertConfig, ResizeConfig
from app.file_output import check_output, megabytes, progress, read_weighted, say, size_of, torch_dtype, write
from lora_diffusion.errors import ConfigError
from lora_diffusion.text import printable


def convert(config: ConvertConfig, debug: bool) -> int:
    """`lora-diffusion convert SRC DST --to FORMAT`."""
    check_output(config.target, config.to, config.source)
    from lora_diffusion.lowering import lowered

    source = _read(config)
    before = size_of(config.source)
    adapter = _chosen(source, config.component)
    adapter = lowered(adapter)
    if config.dtype is not None:
        adapter = _cast(adapter, torch_dtype(config.dtype))
    after = write(adapter, config.target, config.to)
    facts: dict[str, Any] = {
        "source": config.source,
        "dialect": source.dialect,
        "output": config.target,
        "format": config.to,
        "layers": adapter.layer_count(),
        "components": {name: len(layers) for name, layers in adapter.components.items()},
        "tokens": list(adapter.tokens),
        "bytes_before": before,
        "bytes_after": after,
        "notes": adapter.notes,
    }
    parts = [f"{name} {count}" for name, count in facts["components"].items()]
    parts += [f"word {printable(word)}" for word in adapter.tokens]
    lines = [
        f"read    {config.source}: {source.layer_count()} layers in the dialect {source.dialect}, {megabytes(before)}",
        f"wrote   {config.target}: {facts['layers']} layers ({', '.join(parts)}) in the format {config.to}, "
        f"{megabytes(after)}",
        *(f"note    {printable(note)}" for note in adapter.notes),
    ]
    return say(facts, config.json, lines)


def combine(config: CombineConfig, debug: bool) -> int:
    """`lora-diffusion combine A:0.7 B:0.5 -o C`."""
    wanted = read_weighted(config.adapters)
    check_output(config.output, config.to, *(file for _, file, _ in wanted))
    import torch

    import lora_diffusion as ld

    adapters = [ld.read_adapter(file) for _, file, _ in wanted]
    with progress("layers combined") as said:
        result = ld.combine(
            adapters,
            [weight for _, _, weight in wanted],
            config.method,
            r=config.rank,
            density=config.density,
            generator=torch.Generator().manual_seed(config.seed),
            dtype=torch_dtype(config.dtype),
            on_progress=said,
        )
    return write_derived(result, config.output, config.to, config.json)


def resize(config: ResizeConfig, debug: bool) -> int:
    """`lora-diffusion resize SRC -o DST --rank R`."""
    if config.rank is None and config.energy is None:
        raise ConfigError("give --rank, --energy, or both")
    check_output(config.output, config.to, config.source)
    import lora_diffusion as ld

    adapter = ld.read_adapter(config.source)
    with progress("layers resized") as said:
        result = ld.resize(
            adapter, config.rank, energy=config.energy, dtype=torch_dtype(config.dtype), on_progress=said
        )
    return write_derived(result, config.output, config.to, config.json)


def write_derived(result: Any, output: str, format: str, as_json: bool) -> int:
    """Write the adapter of a `Derived` and say what it cost."""
    size = write(result.adapter, output, format)
    facts = {
        "output": output,
        "format": format,
        "bytes": size,
        "layers": result.adapter.layer_count(),
        "error": result.error,
        "errors": result.errors,
        "ranks": {name: sorted({layer.rank for layer in layers.values()})
                  for name, layers in result.adapter.components.items()},
        "skipped": result.skipped,
        "notes": result.adapter.notes,
    }  # fmt: skip
    lines = [f"{output} ({format}), {megabytes(size)}", *map(_clean, str(result).splitlines())]
    return say(facts, as_json, lines)


def _clean(line: str) -> str:
    indent = line[: len(line) - len(line.lstrip())]
    return indent + printable(line, 400)


def _read(config: ConvertConfig) -> Any:
    """Any adapter file, pickles among them, which are opened without running anything."""
    from lora_diffusion.files.pickled import read_pickled_adapter
    from lora_diffusion.files.safetensors_file import PICKLE_SUFFIXES

    if Path(config.source).suffix.lower() in PICKLE_SUFFIXES:
        known = [name for name in config.component if name in ("unet", "text_encoder")]  # whose a bare list is
        return read_pickled_adapter(config.source, alpha=config.alpha, component=known[0] if known else None)
    import lora_diffusion as ld

    adapter = ld.read_adapter(config.source)
    return adapter if config.alpha is None else _with_alpha(adapter, config.alpha)


def _chosen(adapter: Any, names: tuple[str, ...]) -> Any:
    """Only the named components; a bare model's layers, alone, take the one name that is given."""
    from lora_diffusion.components import BARE, COMPONENTS

    if not names:
        return adapter
    for name in names:
        if name not in COMPONENTS:
            raise ConfigError(f"--component {name!r} is not one of {', '.join(COMPONENTS)}")
    tables = ("components", "configs", "structured", "copies", "prompts", "bases")
    have = list(adapter.layers())
    if have == [BARE] and len(names) == 1:
        (name,) = names
        renamed = {field: dict.fromkeys([name], one) for field in tables for one in getattr(adapter, field).values()}
        return dataclasses.replace(adapter, **renamed)
    missing = [name for name in names if name not in have]
    if missing:
        raise ConfigError(f"--component {missing[0]}: the adapter has {', '.join(have) or 'no layers'}")
    kept = {field: {n: v for n, v in getattr(adapter, field).items() if n in names} for field in tables}
    tokens = {word: {c: v for c, v in parts.items() if c in names} for word, parts in adapter.tokens.items()}
    return dataclasses.replace(adapter, **kept, tokens={word: parts for word, parts in tokens.items() if parts})


def _with_alpha(adapter: Any, alpha: float) -> Any:
    """Scales alpha / rank for an adapter whose file says none. Raises ConfigError where it does."""
    from lora_diffusion.adapter import inferred_config

    for component, layers in adapter.layers().items():
        for path, layer in layers.items():
            if layer.scale != 1.0 or path in adapter.structured.get(component, {}):
                raise ConfigError(f"--alpha {alpha:g}: the file says itself that alpha is {layer.scale * layer.rank:g} "
                                  f"at {component}.{path}; leave --alpha out")  # fmt: skip
    components = {
        component: {path: dataclasses.replace(layer, scale=alpha / layer.rank) for path, layer in layers.items()}
        for component, layers in adapter.components.items()
    }
    configs = {component: inferred_config(layers) for component, layers in components.items()}
    return dataclasses.replace(adapter, components=components, configs=configs)


def _cast(adapter: Any, dtype: Any) -> Any:
    """All tensors in another dtype. Raises ConfigError for values that it cannot hold."""
    import torch

    def cast(tensor: Any, where: str) -> Any:
        result = tensor.to(dtype)
        if not torch.isfinite(result).all():
            raise ConfigError(f"--dtype: {where} is too large for {str(dtype).removeprefix('torch.')}")
        return result

    def layer_cast(layer: Any, where: str) -> Any:
        magnitude = None if layer.magnitude is None else cast(layer.magnitude, where)
        return dataclasses.replace(layer, a=cast(layer.a, where), b=cast(layer.b, where), magnitude=magnitude)

    return dataclasses.replace(
        adapter,
        components={c: {p: layer_cast(layer, f"{c}.{p}") for p, layer in layers.items()}
                    for c, layers in adapter.components.items()},
        copies={c: {p: {n: cast(t, f"{c}.{p}.{n}") for n, t in values.items()} for p, values in modules.items()}
                for c, modules in adapter.copies.items()},
        tokens={w: {c: cast(t, w) for c, t in parts.items()} for w, parts in adapter.tokens.items()},
        prompts={c: dataclasses.replace(p, embeddings=cast(p.embeddings, c)) for c, p in adapter.prompts.items()},
    )  # fmt: skip
