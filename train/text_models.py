"""Language models: from a name and a task to a transformers model and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_diffusion.errors import ConfigError, ModelNotFoundError
from lora_diffusion.text import printable
from train.pocket_text import NAMES, folder_of
from train.quantise import check_quantize, quantise
from train.randomness import derive_seed

HEADS = ("classifier", "score", "classification_head", "qa_outputs")  # what transformers calls a task's own layers


def resolve_text_model(name: str) -> str:
    """The folder or hub id that a model name stands for: pocket-bert and pocket-gpt are the embedded ones.

    Raises:
        ModelNotFoundError: the name is a path and there is no model there.
    """
    pocket = folder_of(name)
    if pocket is not None:
        return str(pocket)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"the folder {name} is no transformers model: it has no config.json")
        return str(path)
    if path.is_file():
        raise ModelNotFoundError(f"{name} is a single file; give the folder of a transformers model")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or (path.parts[:-1] and path.exists()):
        raise ModelNotFoundError(f"there is no model folder {name}; give a folder, a hub id (owner/name), or "
                                 f"{' or '.join(map(repr, NAMES))}")  # fmt: skip
    return name


def load_config(name: str, revision: str | None = None) -> Any:
    """The model's config. Raises ModelNotFoundError."""
    from transformers import AutoConfig

    return _load(AutoConfig.from_pretrained, name, {"revision": revision})


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The model's fast tokenizer. Raises ModelNotFoundError."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer.from_pretrained, name, {"revision": revision, "use_fast": True})
    if not len(tokenizer):
        raise ModelNotFoundError(f"the model {name} has no tokenizer; put its tokenizer files beside config.json")
    return tokenizer


def check_task(model_class: str, config: Any, task: str) -> None:
    """Raises ConfigError where transformers has no such model of this architecture."""
    import transformers

    known = getattr(transformers, model_class)._model_mapping
    if type(config) not in known.keys():  # noqa: SIM118 (a lazy mapping, whose `in` loads classes)
        raise ConfigError(
            f"transformers has no {config.model_type} model for --task {task} ({model_class}); choose another task or "
            "model"
        )


def load_text_model(
    name: str,
    model_class: str,
    settings: Mapping[str, Any],
    *,
    seed: int,
    precision: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    quantize: str | None = None,
    attention: str | None = None,
) -> tuple[Any, list[str]]:
    """Load a model in eval mode, frozen, and say which modules of it are new: they are to be learned.

    Args:
        model_class: of transformers, "AutoModelForCausalLM".
        settings: for its config, such as the number of labels.
        seed: for the values of what the files do not hold, a new head.
        precision: of all weights but those of new modules, which stay in fp32.
        quantize: how the weights are stored (see `train.quantise`).
        attention: transformers' attn_implementation.

    Raises:
        ModelNotFoundError: there is no such model, it has no safetensors weights, or it cannot be reached.
        ConfigError: it does not have this attention, or cannot be quantised so.
    """
    import transformers

    if quantize is not None:
        check_quantize(quantize, device)
    options: dict[str, Any] = {
        "dtype": precision,
        "use_safetensors": True,
        "revision": revision,
        "output_loading_info": True,
        **settings,
    }
    if attention is not None:
        options["attn_implementation"] = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        try:
            model, info = _load(getattr(transformers, model_class).from_pretrained, name, options)
        except ImportError as problem:
            raise ConfigError(f"--attn_implementation {attention}: {_one_line(problem)}") from problem
    model.eval().requires_grad_(False)
    new = new_modules(model, info["missing_keys"])
    for path in new:
        model.get_submodule(path).float()
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # what training has no use for
    if quantize is not None and not quantise(model, quantize, precision=precision, device=device):
        raise ConfigError(
            f"--quantize {quantize}: a {type(model).__name__} has no layers that can be stored in fewer bits (GPT-2's "
            "are of a kind of its own); leave --quantize out"
        )
    return model.to(device), new


def new_modules(model: nn.Module, missing: Any) -> list[str]:
    """The modules of a task's own, and others whose values no file held, in the model's order."""
    paths = {key.rpartition(".")[0] for key in missing}
    paths |= {path for path, _ in model.named_modules() if path in HEADS}
    chosen = [path for path, _ in model.named_modules() if path in paths and path]
    return [path for path in chosen if not any(path.startswith(f"{other}.") for other in chosen)]


def embedding_size(config: Any) -> int:
    """The number of words that the model's embedding has; virtual tokens come after them."""
    return int(config.get_text_config().vocab_size)


def checkpoint_activations(model: Any) -> None:
    """Non-reentrant checkpointing, under transformers' name of today or that of before 5.20."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _load(load: Callable[..., Any], name: str, options: dict[str, Any]) -> Any:
    place = resolve_text_model(name)
    options = {name: value for name, value in options.items() if value is not None} | {"trust_remote_code": False}
    try:
        return load(place, local_files_only=True, **options)
    except (OSError, ValueError) as problem:
        if Path(place).is_dir():
            raise ModelNotFoundError(f"the model in {place} cannot be loaded: {_one_line(problem)}") from problem
    except (KeyError, TypeError, AttributeError, RuntimeError) as problem:
        raise ModelNotFoundError(f"the model {name} cannot be loaded: {_one_line(problem)}") from problem
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return load(place, **options)
    except (OSError, ValueError, HfHubHTTPError) as problem:
        raise ModelNotFoundError(
            f"the model {place} is neither a folder nor in the local cache, and it cannot be fetched from the hub; "
            f"are name and network all right? ({type(problem).__name__}: {_one_line(problem, 120)})"
        ) from problem


def _one_line(problem: BaseException, limit: int = 300) -> str:
    return printable(" ".join(str(problem).split()) or type(problem).__name__, limit)
