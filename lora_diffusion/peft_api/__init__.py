"""PEFT's names over this library's engine: code written for PEFT runs with its import line changed.

    from lora_diffusion import get_peft_config, get_peft_model, LoraConfig, TaskType

Spelling and meaning are PEFT's; `model.PeftModel` says where ours differ.
"""
