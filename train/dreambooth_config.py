"""The settings of a DreamBooth run: names and meanings of diffusers' `train_dreambooth_lora.py`, and a few of our own.

Light on purpose: the command line reads this file to answer `--help`, so it imports neither torch nor diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.errors import ConfigError
from train.config import check, setting
from train.prompts import check_subject_word

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
DEFAULT_STEPS = 500

# Flags of diffusers' script that have no meaning here. Each is refused with its reason, never ignored.
UNSUPPORTED_FLAGS = {
    "tokenizer_name": "the tokenizer that comes with the model is used",
    "enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is always on; leave it out",
    "class_labels_conditioning": "it belongs to pixel models with class labels, which are not supported",
    "validation_images": "it belongs to image-to-image models, which are not supported",
    "hub_token": "a token on a command line ends up in logs; log in once with `hf auth login` instead",
    "local_rank": "training runs on one device",
}


@dataclass(frozen=True)
class DreamBoothConfig:
    """Everything that `train.dreambooth.train` needs to know; see `lora-diffusion dreambooth --help`."""

    pretrained_model_name_or_path: str = setting(
        help="base model: a folder, a hub id, or 'pocket' for the model that is shipped along",
        group="model",
        aliases=("model",),
        metavar="MODEL",
    )
    instance_data_dir: str = setting(
        help="folder with the photos of the subject", group="data", metavar="DIR", decides=False
    )
    instance_prompt: str = setting(
        help="what the photos show, with a rare word for the subject: 'a photo of sks dog'",
        group="data",
        metavar="TEXT",
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", group="model")
    variant: str | None = setting(None, "weight files of a variant, such as 'fp16'", group="model")
    device: str = setting(
        "auto",
        "where to train; auto takes CUDA where there is one",
        group="model",
        choices=("auto", "cpu", "cuda", "mps"),
        decides=False,
    )

    subject_token: str | None = setting(
        None, "the rare word in --instance_prompt; when it is not named, any uncommon word will do", group="data"
    )
    class_data_dir: str | None = setting(
        None,
        "folder with pictures of the class; missing ones are generated (default: OUTPUT_DIR/class_images)",
        group="data",
        metavar="DIR",
        decides=False,
    )
    class_prompt: str | None = setting(
        None, "what the class pictures show: 'a photo of a dog'", group="data", metavar="TEXT"
    )
    with_prior_preservation: bool = setting(
        False, "also train on pictures of the class, so that the class is not forgotten", group="data"
    )
    prior_loss_weight: float = setting(1.0, "weight of the loss on class pictures", group="data", minimum=0)
    num_class_images: int = setting(100, "number of class pictures", group="data", minimum=1)
    sample_batch_size: int = setting(4, "class pictures generated at once", group="data", minimum=1, decides=False)
    prior_generation_precision: str | None = setting(
        None,
        "precision while generating class pictures (default: that of training)",
        group="data",
        choices=("no", "fp32", "fp16", "bf16"),
        decides=False,
    )
    prior_generation_steps: int = setting(
        30, "denoising steps for each generated class picture", group="data", minimum=1, decides=False
    )
    resolution: int | None = setting(
        None, "side of the training pictures in pixels (default: the model's own)", group="data", minimum=8
    )
    center_crop: bool = setting(
        False, "crop pictures that are not square at the centre, rather than at a few random places", group="data"
    )
    dataloader_num_workers: int = setting(
        0, "threads that read the pictures before training starts", group="data", minimum=0, decides=False
    )
    tokenizer_max_length: int | None = setting(
        None, "length in tokens to which prompts are padded (default: the tokenizer's)", group="data", minimum=3
    )
    text_encoder_use_attention_mask: bool = setting(
        False, "give the text encoder the mask of the padding", group="data"
    )

    rank: int = setting(8, "rank of the adapter", group="adapter", minimum=1)
    lora_alpha: float | None = setting(
        None, "the adapter's output is scaled by alpha / rank (default: the rank, so by 1)", group="adapter", above=0
    )
    lora_dropout: float = setting(0.0, "dropout in front of the adapter", group="adapter", minimum=0, maximum=0.95)
    target_modules: str = setting(
        "attention", "which layers get an adapter: a preset, names separated by commas, or a regex", group="adapter"
    )
    train_text_encoder: bool = setting(False, "an adapter for the text encoder, too", group="adapter")

    output_dir: str = setting(
        "runs/dreambooth", "the run's folder: settings, events, checkpoints, samples, adapter", group="run",
        metavar="DIR", decides=False,
    )  # fmt: skip
    overwrite: bool = setting(
        False, "start again in a folder that already holds a run, removing that run", group="run", decides=False
    )
    seed: int = setting(0, "everything random follows from it", group="run", minimum=0, maximum=2**63 - 1)
    max_train_steps: int | None = setting(
        None, f"optimizer steps (default: from --num_train_epochs, else {DEFAULT_STEPS})", group="run", minimum=1
    )
    num_train_epochs: int | None = setting(
        None, "passes over the pictures; --max_train_steps wins over it", group="run", minimum=1, decides=False
    )
    checkpointing_steps: int = setting(
        500, "steps between two checkpoints; the last step always makes one", group="run", minimum=1, decides=False
    )
    checkpoints_total_limit: int | None = setting(
        None, "how many checkpoints to keep (default: all)", group="run", minimum=1, decides=False
    )
    resume_from_checkpoint: str | None = setting(
        None, "go on from a checkpoint: its path or name, or 'latest'", group="run", metavar="WHICH", decides=False
    )

    train_batch_size: int = setting(1, "pictures of the subject in a batch", group="optimizer", minimum=1)
    gradient_accumulation_steps: int = setting(1, "batches that make one optimizer step", group="optimizer", minimum=1)
    learning_rate: float = setting(1e-4, "learning rate of the UNet's adapter", group="optimizer", above=0)
    text_encoder_lr: float = setting(1e-5, "learning rate of the text encoder's adapter", group="optimizer", above=0)
    scale_lr: bool = setting(
        False, "multiply the learning rates by batch size and accumulation steps", group="optimizer"
    )
    lr_scheduler: str = setting("constant", "course of the learning rate", group="optimizer", choices=SCHEDULES)
    lr_warmup_steps: int = setting(
        0, "steps over which the rate grows from 0 (all schedules but constant)", group="optimizer", minimum=0
    )
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts", group="optimizer", minimum=1)
    lr_power: float = setting(1.0, "exponent of polynomial", group="optimizer", above=0)
    use_8bit_adam: bool = setting(False, "AdamW with 8-bit state, from bitsandbytes", group="optimizer")
    adam_beta1: float = setting(0.9, "decay of Adam's first moment", group="optimizer", minimum=0, maximum=0.99999)
    adam_beta2: float = setting(0.999, "decay of Adam's second moment", group="optimizer", minimum=0, maximum=0.999999)
    adam_weight_decay: float = setting(1e-2, "weight decay", group="optimizer", minimum=0)
    adam_epsilon: float = setting(1e-8, "Adam's epsilon", group="optimizer", above=0)
    max_grad_norm: float = setting(
        1.0, "gradients are clipped to this norm; 0 for no clipping", group="optimizer", minimum=0
    )

    snr_gamma: float | None = setting(
        None, "min-SNR weighting of the loss with this gamma; 5 is usual (default: off)", group="loss", above=0
    )
    noise_offset: float = setting(0.0, "strength of a noise that is constant over the picture", group="loss", minimum=0)

    mixed_precision: str = setting(
        "auto",
        "precision of the frozen base, adapters stay in fp32; auto: bf16 or fp16 on CUDA, no on CPU",
        group="speed and memory",
        choices=("auto", "no", "fp16", "bf16"),
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about 30 % slower", group="speed and memory"
    )
    pre_compute_text_embeddings: bool = setting(
        False,
        "encode the prompts once; always done while the text encoder is frozen, an error with --train_text_encoder",
        group="speed and memory",
        decides=False,
    )
    allow_tf32: bool = setting(False, "TF32 products on Ampere GPUs and later", group="speed and memory")

    validation_prompt: str | None = setting(
        None, "draw this while training, at fixed seeds", group="validation", metavar="TEXT", decides=False
    )
    num_validation_images: int = setting(4, "pictures per validation", group="validation", minimum=1, decides=False)
    validation_steps: int | None = setting(
        None, "steps between two validations (default: from --validation_epochs)", group="validation", minimum=1,
        decides=False,
    )  # fmt: skip
    validation_epochs: int = setting(
        50, "passes over the pictures between two validations", group="validation", minimum=1, decides=False
    )
    validation_inference_steps: int = setting(
        25, "denoising steps of each validation picture", group="validation", minimum=1, decides=False
    )

    report_to: str | None = setting(
        None,
        "also log to this tracker, if it is installed; events.jsonl is always written",
        group="reporting",
        choices=("tensorboard", "wandb", "all", "none"),
        decides=False,
    )
    logging_dir: str = setting("logs", "folder of the tracker, inside the run's", group="reporting", decides=False)
    push_to_hub: bool = setting(False, "upload the adapter and its card when done", group="reporting", decides=False)
    hub_model_id: str | None = setting(
        None, "repository to upload to (default: the name of the run's folder)", group="reporting", decides=False
    )


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
    check_subject_word(config.instance_prompt, config.class_prompt, config.subject_token)
