"""The jobs behind extract and merge: model folders, tensor by tensor; no model is ever in memory."""

from __future__ import annotations

from app.file_commands import write_derived
from app.file_configs import ExtractConfig, MergeConfig
from app.file_output import check_output, megabytes, model_folder, progress, read_weighted, say, size_of, torch_dtype
from lora_diffusion.text import printable


def extract(config: ExtractConfig, debug: bool) -> int:
    """`lora-diffusion extract --base FOLDER --tuned FOLDER --rank R -o FILE`."""
    check_output(config.output, config.to)
    _quieten(debug)
    import lora_diffusion as ld
    from train.saving import model_label

    with progress("tensors compared") as said:
        named: tuple[str, ...] | str = config.target_modules or "all"
        result = ld.extract(
            model_folder(config.base, config.variant),
            model_folder(config.tuned, config.variant),
            config.rank,
            components=config.component or None,
            target_modules=named[0] if len(named) == 1 and named[0] in ("all", "all-linear") else named,
            energy=config.energy,
            dtype=torch_dtype(config.dtype),
            metadata={"base_model": model_label(config.base)},
            on_progress=said,
        )
    return write_derived(result, config.output, config.to, config.json)


def merge(config: MergeConfig, debug: bool) -> int:
    """`lora-diffusion merge MODEL A:0.8 -o FOLDER`."""
    wanted = read_weighted(config.adapters)
    _quieten(debug)
    import lora_diffusion as ld
    from lora_diffusion.merge_folder import merge_folder
    from lora_diffusion.merge_layer import LOSS_WORTH_SAYING

    adapters = {name: (ld.read_adapter(file), weight) for name, file, weight in wanted}
    with progress("layers merged") as said:
        done = merge_folder(model_folder(config.model, config.variant), adapters, config.output, said)
    merged = done.merged
    facts = {
        "output": config.output,
        "bytes": size_of(config.output),
        "components": {
            name: {
                "adapters": merged.adapters[name],
                "layers": merged.layers[name],
                "error": merged.error[name],
                "unchanged": merged.unchanged[name],
                "worst": {"path": merged.worst[name][0], "error": merged.worst[name][1]},
            }
            for name in merged.layers
        },
        "left_out": done.left_out,
        "notes": done.notes,
    }
    lines = [f"{config.output}: {megabytes(size_of(config.output))}"]
    for name, layers in merged.layers.items():
        said_names = ", ".join(f"{one} ({weight:g})" for one, weight in merged.adapters[name].items())
        lines.append(
            f"  {name}: {said_names} in {layers} layers; the update is off by {merged.error[name]:.2g} of its size, "
            f"{merged.unchanged[name]:.1%} of the weights did not move"
        )
    if any(error > LOSS_WORTH_SAYING for error in merged.error.values()):
        lines.append("  the dtype of the folder's weights is too coarse for this update: load the adapter unmerged, or "
                     "merge into the model in fp32")  # fmt: skip
    lines += [f"  left out {printable(name)}: it holds the weights once more, unmerged" for name in done.left_out]
    lines += [f"  note: {printable(note)}" for note in done.notes]
    return say(facts, config.json, lines)


def _quieten(debug: bool) -> None:
    """The libraries that know the model's classes keep quiet, unless debugging is on."""
    from app.console import quieten

    if not debug:
        quieten()
