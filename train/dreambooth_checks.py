"""Which settings of a DreamBooth run go together: what can be said before a file is read and before torch is loaded."""

from __future__ import annotations

from lora_diffusion.errors import ConfigError
from train.buckets import parse as parse_buckets
from train.config import check
from train.dreambooth_config import DreamBoothConfig
from train.prompts import check_subject_word
from train.templates import check_templates, templates_of


def validate(config: DreamBoothConfig) -> None:
    """Check all that can be checked without reading a file.

    Raises:
        ConfigError: one sentence that names the setting, its value and what to do.
    """
    check(config)
    if not config.instance_prompt.strip():
        raise ConfigError("--instance_prompt is empty; say what the photos show, for example 'a photo of sks dog'")
    if config.with_prior_preservation and not (config.class_prompt or "").strip():
        raise ConfigError("--with_prior_preservation needs --class_prompt, for example 'a photo of a dog'")
    _check_word(config)
    if config.fsdp_cpu_offload and not config.fsdp:
        raise ConfigError("--fsdp_cpu_offload needs --fsdp")
    if config.fsdp and config.quantize is not None:
        raise ConfigError("--fsdp cannot take a quantised base apart; leave --quantize out, or --fsdp")
    if config.text_encoder_2_lr is not None and not config.train_text_encoder:
        raise ConfigError("--text_encoder_2_lr needs --train_text_encoder; without it, no text encoder is trained")
    if config.train_text_encoder and config.pre_compute_text_embeddings:
        raise ConfigError(
            "--train_text_encoder and --pre_compute_text_embeddings exclude each other: "
            "embeddings of an encoder that is being trained cannot be computed in advance"
        )
    if config.max_train_steps is not None and config.lr_warmup_steps > config.max_train_steps:
        raise ConfigError(
            f"--lr_warmup_steps {config.lr_warmup_steps} is more than --max_train_steps {config.max_train_steps}; "
            "the learning rate would never be reached"
        )
    if config.resume_from_checkpoint is not None and config.overwrite:
        raise ConfigError("--overwrite starts again and --resume_from_checkpoint goes on; give one of them")
    _check_data(config)
    _check_optimizer(config)
    _check_loss(config)
    if config.keep_best and not (config.validation_prompt or "").strip():
        raise ConfigError("--keep_best judges the pictures of --validation_prompt; give one")
    check_subject_word(config.instance_prompt, config.class_prompt, config.subject_token)


def _check_word(config: DreamBoothConfig) -> None:
    """Raises ConfigError for a new word that is not in the prompt, and for settings of a word that is not there."""
    word = config.placeholder_token
    if word is None:
        lonely = [name for name in ("initializer_token",) if getattr(config, name) is not None]
        lonely += [
            name for name, unset in (("only_token", False), ("num_vectors", 1)) if getattr(config, name) != unset
        ]
        if lonely:
            raise ConfigError(f"--{lonely[0]} needs --placeholder_token, the new word that it is about")
        return
    if word not in config.instance_prompt.split():
        raise ConfigError(
            f"--placeholder_token {word} is not a word of --instance_prompt {config.instance_prompt!r}; "
            f"say for example 'a photo of {word}'"
        )
    if config.only_token and config.train_text_encoder:
        raise ConfigError("--only_token and --train_text_encoder exclude each other; leave one of them out")
    if config.only_token and config.train_text_encoder_ti_frac < 1:
        raise ConfigError("--only_token learns nothing but the word, which cannot rest: leave one of the two out")
    if config.pre_compute_text_embeddings:
        raise ConfigError("--pre_compute_text_embeddings cannot be used while a word is being learned; leave it out")


def _check_data(config: DreamBoothConfig) -> None:
    if config.aspect_ratio_buckets is None or parse_buckets(config.aspect_ratio_buckets) is not None:
        for name in ("bucket_reso_steps", "min_bucket_reso", "max_bucket_reso"):
            if getattr(config, name) is not None:
                raise ConfigError(f"--{name} needs --aspect_ratio_buckets auto")
    if config.caption_template is not None and config.caption_template_file is not None:
        raise ConfigError("--caption_template and --caption_template_file exclude each other; give one of them")
    check_templates(templates_of(config.caption_template, None), config.subject_token)
    if config.keep_tokens and not config.shuffle_caption:
        raise ConfigError("--keep_tokens needs --shuffle_caption; without it, all tags stay in their place")
    if config.mask_dir is not None and config.alpha_mask:
        raise ConfigError("--mask_dir and --alpha_mask exclude each other; give one of them")
    if config.unmasked_weight and config.mask_dir is None and not config.alpha_mask:
        raise ConfigError("--unmasked_weight needs --mask_dir or --alpha_mask; without them, nothing is masked out")


def _check_optimizer(config: DreamBoothConfig) -> None:
    if config.use_8bit_adam and config.optimizer not in ("adamw", "adamw8bit"):
        raise ConfigError(f"--use_8bit_adam and --optimizer {config.optimizer} are two optimizers; give one of them")
    if config.optimizer == "prodigy":
        second = config.text_encoder_2_lr or config.text_encoder_lr
        if config.train_text_encoder and {config.text_encoder_lr, second} != {config.learning_rate}:
            raise ConfigError(
                "--optimizer prodigy finds one learning rate for all: give --text_encoder_lr the value of "
                f"--learning_rate, {config.learning_rate:g}"
            )
        if config.loraplus_lr_ratio is not None:
            raise ConfigError("--optimizer prodigy finds one learning rate for all, --loraplus_lr_ratio asks for two")
    if config.optimizer == "schedule-free-adamw":
        if config.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise ConfigError(
                f"--optimizer schedule-free-adamw needs no --lr_scheduler {config.lr_scheduler}; leave it out, or give "
                "constant_with_warmup"
            )
        if config.use_ema:
            raise ConfigError("--optimizer schedule-free-adamw saves an average by itself; leave --use_ema out")
        if not config.adam_beta1:
            raise ConfigError("--optimizer schedule-free-adamw needs an --adam_beta1 above 0; 0.9 is usual")


def _check_loss(config: DreamBoothConfig) -> None:
    if config.prior_mode == "teacher" and not config.with_prior_preservation:
        raise ConfigError("--prior_mode teacher needs --with_prior_preservation and --class_prompt")
    if config.debiased_estimation_loss and config.snr_gamma is not None:
        raise ConfigError("--debiased_estimation_loss and --snr_gamma are two weightings; give one of them")
    if config.soft_min_snr and config.snr_gamma is None:
        raise ConfigError("--soft_min_snr needs --snr_gamma; 5 is usual")
    if config.noise_offset and config.multires_noise_iterations:
        raise ConfigError("--noise_offset and --multires_noise_iterations both change large shapes; give one of them")
