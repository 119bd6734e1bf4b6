"""From the words of `--method` to the engine's configs. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from lora_diffusion.config import LoraConfig
from lora_diffusion.methods.config import MethodConfig
from train.text_config import TextConfig, methods_of

DEFAULT_VIRTUAL_TOKENS = 20
EXISTING = ("full", "top-layers", "bitfit")  # learn the base's own parameters, in their precision
KINDS = {  # method -> the engine's word for what it puts into a model
    "lora": "lora",
    "full": "full",
    "top-layers": "top_layers",
    "bitfit": "bitfit",
    "houlsby": "bottleneck",
    "pfeiffer": "bottleneck",
    "lin": "bottleneck",
    "prompt-tuning": "prompt_tuning",
    "p-tuning": "p_tuning",
    "prefix-tuning": "prefix_tuning",
    "pre-layer": "pre_layer",
    "head": "head",
}


def configs_of(
    config: TextConfig, task_type: str | None, modules: Sequence[str], tokenizer: str | None = None
) -> list[LoraConfig | MethodConfig]:
    """One config for each method that `--method` joins.

    Args:
        task_type: PEFT's word for the task.
        modules: names of modules to learn whole, a head.
        tokenizer: a name for `AutoTokenizer`, for a prompt that starts as a text.

    Raises:
        ConfigError: a setting that a method cannot take.
    """
    found = [_config_of(method, config, task_type, tokenizer, list(modules) or None) for method in methods_of(config)]
    return [found[0], *(_without_modules(one) for one in found[1:])]


def virtual_tokens(config: TextConfig) -> int:
    """How many places of a row virtual tokens and prefixes take, those of a template not counted."""
    count = config.num_virtual_tokens or DEFAULT_VIRTUAL_TOKENS
    taking = [m for m in methods_of(config) if m in ("prompt-tuning", "p-tuning", "prefix-tuning", "pre-layer")]
    return sum(count for method in taking if method != "p-tuning" or config.prompt_template is None)


def parsed_template(template: str) -> str | tuple[int, ...]:
    """`--prompt_template` as the engine takes it: a text, or the paper's counts."""
    inner = template.strip()
    if inner.startswith("(") and inner.endswith(")"):
        counts = [word.strip() for word in inner[1:-1].split(",") if word.strip()]
        if counts and all(word.isascii() and word.isdigit() and len(word) < 6 for word in counts):
            return tuple(int(word) for word in counts)
    return template


def _config_of(
    method: str, config: TextConfig, task_type: str | None, tokenizer: str | None, modules: list[str] | None
) -> LoraConfig | MethodConfig:
    count = config.num_virtual_tokens or DEFAULT_VIRTUAL_TOKENS
    if method == "lora":
        targets: str | list[str] = config.target_modules
        if "," in config.target_modules:
            targets = [name.strip() for name in config.target_modules.split(",") if name.strip()]
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha or config.rank,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights if config.init_lora_weights != "kaiming" else True,
            modules_to_save=modules,
            task_type=task_type,
        )
    if method in EXISTING:
        from lora_diffusion.methods.parameters_config import BitFitConfig, FullConfig, TopLayersConfig

        if method == "bitfit":
            return BitFitConfig(task_type=task_type, modules_to_save=modules)
        if method == "full":
            return FullConfig(task_type=task_type)  # the head is among all parameters
        return TopLayersConfig(num_layers=config.top_layers, task_type=task_type, modules_to_save=modules)
    if method in ("houlsby", "pfeiffer", "lin"):
        from lora_diffusion.methods.bottleneck_config import BottleneckConfig

        return BottleneckConfig(
            placement=method,
            bottleneck_size=config.bottleneck_size,
            leave_out=tuple(range(config.leave_out)),
            task_type=task_type,
            modules_to_save=modules,
        )
    if method == "prompt-tuning":
        from lora_diffusion.methods.prompt_tuning_config import PromptTuningConfig

        return PromptTuningConfig(
            num_virtual_tokens=count,
            prompt_tuning_init=config.prompt_init,
            prompt_tuning_init_text=config.prompt_init_text,
            num_transformer_submodules=1,
            tokenizer_name_or_path=tokenizer if config.prompt_init == "TEXT" else None,
            task_type=task_type,
            modules_to_save=modules,
        )
    if method == "p-tuning":
        from lora_diffusion.methods.prompt_encoder_config import PromptEncoderConfig

        given = config.prompt_template
        return PromptEncoderConfig(
            template=None if given is None else parsed_template(given),
            num_virtual_tokens=count if given is None else config.num_virtual_tokens,
            num_transformer_submodules=1,
            encoder_reparameterization_type=config.encoder,
            encoder_hidden_size=config.encoder_hidden_size,
            task_type=task_type,
            modules_to_save=modules,
        )
    if method == "prefix-tuning":
        from lora_diffusion.methods.prefix_tuning_config import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=count,
            prefix_projection=config.prefix_projection,
            encoder_hidden_size=config.encoder_hidden_size if config.prefix_projection else None,
            prefix_dropout=config.prefix_dropout,
            task_type=task_type,
            modules_to_save=modules,
        )
    if method == "pre-layer":
        from lora_diffusion.methods.pre_layer_config import PreLayerConfig

        return PreLayerConfig(prefix_length=count, task_type=task_type, modules_to_save=modules)
    from lora_diffusion.methods.head_config import HeadConfig

    return HeadConfig(task_type=task_type, modules_to_save=modules)


def _without_modules(config: LoraConfig | MethodConfig) -> LoraConfig | MethodConfig:
    """The head is learned once, however many methods there are."""
    import dataclasses

    return dataclasses.replace(config, modules_to_save=None)
