"""lora_diffusion: adapters for diffusion and language models.

Importing this package is cheap: torch is imported when the first name that needs it is used (PEP 562).

    import lora_diffusion as ld

    ld.add_adapter(pipeline, ld.LoraConfig(r=4))                   # train it, then
    ld.save_adapter(pipeline, "dog.safetensors")
    ld.load_adapter(other_pipeline, "dog.safetensors", weight=0.8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ConfigError,
    DatasetError,
    LoraDiffusionError,
    ModelNotFoundError,
    TrainingError,
)

if TYPE_CHECKING:
    from .adapter import Adapter, LowRank
    from .arithmetic import Derived, combine, extract, resize
    from .checks import layers_without_effect, layers_without_gradient
    from .config import LoraConfig
    from .exchange import load_adapter, save_adapter
    from .files import read_adapter, write_adapter
    from .hotswap import reserve_adapter
    from .inject import (
        adapter_parameters,
        add_adapter,
        delete_adapter,
        get_adapter,
        put_adapter,
        unload,
    )
    from .merge import merge_adapters, unmerge_adapters
    from .merge_folder import merge_folder
    from .merge_layer import MergeReport
    from .methods.bottleneck_config import BottleneckConfig
    from .methods.parameters_config import BitFitConfig, FullConfig, TopLayersConfig
    from .methods.pre_layer_config import PreLayerConfig
    from .methods.prefix_tuning_config import PrefixTuningConfig
    from .methods.prompt_batch import prepend_prompt
    from .methods.prompt_encoder_config import PromptEncoderConfig
    from .methods.prompt_generate import prompted_generate
    from .methods.prompt_template import PromptTemplate
    from .methods.prompt_tuning_config import PromptTuningConfig
    from .methods.prompts import freeze_prompt, prompt_ids
    from .peft_api.auto import (
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .peft_api.config import PeftConfig, get_peft_config
    from .peft_api.kbit import prepare_model_for_kbit_training
    from .peft_api.mapping import get_peft_model
    from .peft_api.model import PeftModel
    from .peft_api.task_type import TaskType
    from .peft_api.tasks import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from .per_sample import adapters_per_sample
    from .pipeline_folder import ModelFolder
    from .planning.plan import Plan, plan
    from .report import LoadReport, SaveReport
    from .switch import active_adapters, disable_adapters, list_adapters, set_adapters
    from .tokens import TextualInversionConfig

# Public name -> module that defines it.
_LAZY = {
    "BottleneckConfig": "methods.bottleneck_config",
    "BitFitConfig": "methods.parameters_config",
    "TopLayersConfig": "methods.parameters_config",
    "FullConfig": "methods.parameters_config",
    "Adapter": "adapter",
    "LowRank": "adapter",
    "LoraConfig": "config",
    "LoadReport": "report",
    "SaveReport": "report",
    "MergeReport": "merge_layer",
    "TextualInversionConfig": "tokens",
    "ModelFolder": "pipeline_folder",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "PromptTuningConfig": "methods.prompt_tuning_config",
    "PromptEncoderConfig": "methods.prompt_encoder_config",
    "PreLayerConfig": "methods.pre_layer_config",
    "PrefixTuningConfig": "methods.prefix_tuning_config",
    "PromptTemplate": "methods.prompt_template",
    "freeze_prompt": "methods.prompts",
    "prepend_prompt": "methods.prompt_batch",
    "prompt_ids": "methods.prompts",
    "prompted_generate": "methods.prompt_generate",
    "TaskType": "peft_api.task_type",
    "PeftConfig": "peft_api.config",
    "get_peft_config": "peft_api.config",
    "PeftModel": "peft_api.model",
    "get_peft_model": "peft_api.mapping",
    "PeftModelForCausalLM": "peft_api.tasks",
    "PeftModelForSeq2SeqLM": "peft_api.tasks",
    "PeftModelForSequenceClassification": "peft_api.tasks",
    "PeftModelForTokenClassification": "peft_api.tasks",
    "PeftModelForQuestionAnswering": "peft_api.tasks",
    "PeftModelForFeatureExtraction": "peft_api.tasks",
    "AutoPeftModelForCausalLM": "peft_api.auto",
    "AutoPeftModelForSeq2SeqLM": "peft_api.auto",
    "AutoPeftModelForSequenceClassification": "peft_api.auto",
    "AutoPeftModelForTokenClassification": "peft_api.auto",
    "AutoPeftModelForQuestionAnswering": "peft_api.auto",
    "AutoPeftModelForFeatureExtraction": "peft_api.auto",
    "prepare_model_for_kbit_training": "peft_api.kbit",
    "adapters_per_sample": "per_sample",
    "Derived": "arithmetic",
    "combine": "arithmetic",
    "extract": "arithmetic",
    "resize": "arithmetic",
    "layers_without_effect": "checks",
    "layers_without_gradient": "checks",
    "merge_adapters": "merge",
    "merge_folder": "merge_folder",
    "reserve_adapter": "hotswap",
    "unmerge_adapters": "merge",
    "load_adapter": "exchange",
    "save_adapter": "exchange",
    "read_adapter": "files",
    "write_adapter": "files",
    "add_adapter": "inject",
    "adapter_parameters": "inject",
    "delete_adapter": "inject",
    "get_adapter": "inject",
    "put_adapter": "inject",
    "unload": "inject",
    "active_adapters": "switch",
    "disable_adapters": "switch",
    "list_adapters": "switch",
    "set_adapters": "switch",
}

__all__ = [
    "Adapter",
    "AdapterFormatError",
    "AdapterMismatchError",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BitFitConfig",
    "BottleneckConfig",
    "ConfigError",
    "DatasetError",
    "Derived",
    "FullConfig",
    "LoadReport",
    "LoraConfig",
    "LoraDiffusionError",
    "LowRank",
    "MergeReport",
    "ModelFolder",
    "ModelNotFoundError",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "Plan",
    "PreLayerConfig",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTemplate",
    "PromptTuningConfig",
    "SaveReport",
    "TaskType",
    "TextualInversionConfig",
    "TopLayersConfig",
    "TrainingError",
    "active_adapters",
    "adapter_parameters",
    "adapters_per_sample",
    "add_adapter",
    "combine",
    "delete_adapter",
    "disable_adapters",
    "extract",
    "freeze_prompt",
    "get_adapter",
    "get_peft_config",
    "get_peft_model",
    "layers_without_effect",
    "layers_without_gradient",
    "list_adapters",
    "load_adapter",
    "merge_adapters",
    "merge_folder",
    "plan",
    "prepare_model_for_kbit_training",
    "prepend_prompt",
    "prompt_ids",
    "prompted_generate",
    "put_adapter",
    "read_adapter",
    "reserve_adapter",
    "resize",
    "save_adapter",
    "set_adapters",
    "unload",
    "unmerge_adapters",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
