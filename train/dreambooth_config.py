"""The settings of a DreamBooth run: names and meanings of diffusers' `train_dreambooth_lora.py`, and a few of our own.

Light on purpose: the command line reads this file to answer `--help`, so it imports neither torch nor diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.config import setting

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "prodigy", "schedule-free-adamw")
DEFAULT_STEPS = 500

# Flags of diffusers' script that have no meaning here. Each is refused with its reason, never ignored.
UNSUPPORTED_FLAGS = {
    "tokenizer_name": "the tokenizer that comes with the model is used",
    "enable_xformers_memory_efficient_attention": "PyTorch's own memory-efficient attention is always on; leave it out",
    "class_labels_conditioning": "it belongs to pixel models with class labels, which are not supported",
    "validation_images": "it belongs to image-to-image models, which are not supported",
    "hub_token": "a token on a command line ends up in logs; log in once with `hf auth login` instead",
    "local_rank": "start with accelerate launch or torchrun, which number the processes in the environment",
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
    prior_mode: str = setting(
        "pictures",
        "what keeps the class: pictures of it, or the base model as a teacher on the photos (no class pictures needed)",
        group="data",
        choices=("pictures", "teacher"),
    )
    prior_loss_weight: float = setting(
        1.0, "weight of the loss on class pictures, or of that against the teacher", group="data", minimum=0
    )
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
    random_flip: bool = setting(False, "train on mirror images as often as on the pictures", group="data")
    aspect_ratio_buckets: str | None = setting(
        None,
        "train pictures at the size whose shape is nearest to theirs, not at a square: auto for sizes of about "
        "RESOLUTION² pixels, or a list 'height,width;height,width'",
        group="data",
        metavar="{auto,LIST}",
    )
    bucket_reso_steps: int | None = setting(
        None, "sides of automatic buckets are multiples of this (default: an eighth of --resolution, 64 at most)",
        group="data", minimum=1,
    )  # fmt: skip
    min_bucket_reso: int | None = setting(
        None, "shortest side of an automatic bucket in pixels (default: half of --resolution)", group="data", minimum=8
    )
    max_bucket_reso: int | None = setting(
        None, "longest side of an automatic bucket in pixels (default: twice --resolution)", group="data", minimum=8
    )
    ignore_captions: bool = setting(
        False,
        "use --instance_prompt for all pictures, also where captions lie beside them (dog.txt beside dog.png, or a "
        "metadata.jsonl)",
        group="data",
    )
    caption_fallback: bool = setting(
        False, "use --instance_prompt for pictures without a caption when others have one", group="data"
    )
    caption_column: str = setting(
        "text", "the name of the caption in the lines of metadata.jsonl", group="data", metavar="NAME"
    )
    caption_template: str | None = setting(
        None,
        "the text of a picture: with {caption} for its caption (without captions the instance prompt) and {subject} "
        "for --subject_token, as in '{caption}, photo of sks dog'; or a built-in list of such texts: object, style",
        group="data",
        metavar="TEXT",
    )
    caption_template_file: str | None = setting(
        None, "file with one such text a line, of which one is drawn each time", group="data", metavar="FILE",
        decides=False,
    )  # fmt: skip
    caption_dropout_rate: float = setting(
        0.0, "share of samples of the subject of which nothing is said", group="data", minimum=0, maximum=1
    )
    shuffle_caption: bool = setting(
        False, "train on captions with their tags, which commas separate, in several orders", group="data"
    )
    keep_tokens: int = setting(
        0, "tags at the beginning that --shuffle_caption leaves in their place", group="data", minimum=0
    )
    mask_dir: str | None = setting(
        None, "folder with a mask for each photo, of its name and size: white is learned, black is not", group="data",
        metavar="DIR", decides=False,
    )  # fmt: skip
    alpha_mask: bool = setting(False, "learn what is opaque in the photos, not what is transparent", group="data")
    unmasked_weight: float = setting(
        0.0, "what the masked-out part counts for, next to 1 for the rest", group="data", minimum=0, maximum=1
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
    use_dora: bool = setting(
        False, "learn the length of each output apart from its direction (DoRA); slower", group="adapter"
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank), for high ranks", group="adapter")
    init_lora_weights: str = setting(
        "kaiming",
        "how the adapter starts: kaiming and gaussian at random, orthogonal in rows at right angles, pissa and olora "
        "from the base weights",
        group="adapter",
        choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora"),
    )
    train_text_encoder: bool = setting(
        False, "an adapter for the text encoder, too; for both where the model has two", group="adapter"
    )
    placeholder_token: str | None = setting(
        None,
        "learn a new word for the subject as vectors of its own (textual inversion); it has to be in --instance_prompt",
        group="adapter",
        metavar="WORD",
    )
    initializer_token: str | None = setting(
        None, "the word that the new one starts as: 'dog' (default: at random)", group="adapter", metavar="WORD"
    )
    num_vectors: int = setting(1, "tokens that the new word becomes", group="adapter", minimum=1, maximum=75)
    token_learning_rate: float = setting(5e-4, "learning rate of the new word's vectors", group="adapter", above=0)
    train_text_encoder_ti_frac: float = setting(
        1.0,
        "share of the steps after which the new word rests, and only layers learn on (pivotal tuning)",
        group="adapter",
        above=0,
        maximum=1,
    )
    only_token: bool = setting(
        False, "learn the new word alone, without low-rank layers: a file of a few kilobytes", group="adapter"
    )

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
    text_encoder_2_lr: float | None = setting(
        None, "that of SDXL's second text encoder (default: --text_encoder_lr)", group="optimizer", above=0
    )
    scale_lr: bool = setting(
        False, "multiply the learning rates by batch size and accumulation steps", group="optimizer"
    )
    lr_scheduler: str = setting("constant", "course of the learning rate", group="optimizer", choices=SCHEDULES)
    lr_warmup_steps: int = setting(
        0, "steps over which the rate grows from 0 (all schedules but constant)", group="optimizer", minimum=0
    )
    lr_num_cycles: int = setting(1, "restarts of cosine_with_restarts", group="optimizer", minimum=1)
    lr_power: float = setting(1.0, "exponent of polynomial", group="optimizer", above=0)
    optimizer: str = setting(
        "adamw",
        "adamw8bit needs bitsandbytes, prodigy prodigyopt (and --learning_rate 1), schedule-free-adamw schedulefree",
        group="optimizer",
        choices=OPTIMIZERS,
    )
    use_8bit_adam: bool = setting(False, "the same as --optimizer adamw8bit", group="optimizer")
    loraplus_lr_ratio: float | None = setting(
        None, "LoRA+: B learns at this many times the rate of A; 16 is usual (default: off)", group="optimizer", above=0
    )
    adam_beta1: float = setting(0.9, "decay of Adam's first moment", group="optimizer", minimum=0, maximum=0.99999)
    adam_beta2: float = setting(0.999, "decay of Adam's second moment", group="optimizer", minimum=0, maximum=0.999999)
    adam_weight_decay: float = setting(1e-2, "weight decay", group="optimizer", minimum=0)
    adam_epsilon: float = setting(1e-8, "Adam's epsilon", group="optimizer", above=0)
    max_grad_norm: float = setting(
        1.0, "gradients are clipped to this norm; 0 for no clipping", group="optimizer", minimum=0
    )

    use_ema: bool = setting(
        False, "draw and save the average over the course of training, not its last step", group="optimizer"
    )
    ema_decay: float = setting(
        0.9999, "what stays of the average in each step, after a start that is quicker", group="optimizer",
        minimum=0, maximum=0.9999999,
    )  # fmt: skip
    ema_warmup: bool = setting(
        False, "after n steps, an average decays by 1 - (1 + n)^(-2/3) rather than (1 + n) / (10 + n)",
        group="optimizer",
    )  # fmt: skip

    snr_gamma: float | None = setting(
        None, "min-SNR weighting of the loss with this gamma; 5 is usual (default: off)", group="loss", above=0
    )
    soft_min_snr: bool = setting(False, "let min-SNR's weights bend smoothly at gamma", group="loss")
    debiased_estimation_loss: bool = setting(
        False, "weigh the loss by 1 / sqrt(SNR), for v-prediction by 1 / (SNR + 1)", group="loss"
    )
    loss_type: str = setting(
        "l2", "how an error counts: squared, or less than that where it is large", group="loss",
        choices=("l2", "huber", "smooth_l1"),
    )  # fmt: skip
    huber_c: float = setting(
        0.1, "error at which huber and smooth_l1 turn from squared to absolute", group="loss", above=0, maximum=1
    )
    huber_schedule: str = setting(
        "snr", "huber_c at all timesteps, or from 1 without noise down to huber_c", group="loss",
        choices=("constant", "exponential", "snr"),
    )  # fmt: skip
    noise_offset: float = setting(0.0, "strength of a noise that is constant over the picture", group="loss", minimum=0)
    multires_noise_iterations: int = setting(
        0, "levels of ever coarser noise on top; 6 to 10 are usual", group="loss", minimum=0
    )
    multires_noise_discount: float = setting(
        0.3, "strength of a level of coarser noise, as part of that before it", group="loss", minimum=0, maximum=1
    )
    input_perturbation: float = setting(
        0.0, "strength of a noise in the model's input that it is not asked to name; 0.1 is usual", group="loss",
        minimum=0, aliases=("ip_noise_gamma",),
    )  # fmt: skip
    rescale_betas_zero_snr: bool = setting(
        False, "let the noise schedule end in pure noise; only for models that predict v", group="loss",
        aliases=("zero_terminal_snr",),
    )  # fmt: skip
    min_timestep: int | None = setting(None, "train on timesteps from this one (default: 0)", group="loss", minimum=0)
    max_timestep: int | None = setting(
        None, "train on timesteps below this one (default: all, 1000 as a rule)", group="loss", minimum=1
    )

    mixed_precision: str = setting(
        "auto",
        "precision of the frozen base, adapters stay in fp32; auto: bf16 or fp16 on CUDA, no on CPU",
        group="speed and memory",
        choices=("auto", "no", "fp16", "bf16"),
    )
    quantize: str | None = setting(
        None,
        "store the frozen base in fewer bits: nf4 (4 bits, convolutions 8) takes the least memory, int8 is the most "
        "exact, fp8 as small and coarser, but sure of outliers; the adapter fits the full model all the same",
        group="speed and memory",
        choices=("nf4", "int8", "fp8"),
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
    fsdp: bool = setting(
        False,
        "with several processes: each keeps but a part of the frozen base and borrows the rest block by block (FSDP2); "
        "needs accelerate launch or torchrun",
        group="speed and memory",
        decides=False,
    )
    fsdp_cpu_offload: bool = setting(
        False, "with --fsdp: keep the parts of the denoiser in main memory, not on the GPU", group="speed and memory",
        decides=False,
    )  # fmt: skip
    plan: bool = setting(
        True,
        "estimate the memory when the run starts and compare at its end (--no_plan: do not)",
        group="speed and memory",
        decides=False,
    )

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
    keep_best: bool = setting(
        False, "judge every validation's pictures (likeness, prompt following) and keep the best step's adapter as "
        "best.safetensors", group="validation", decides=False,
    )  # fmt: skip
    validation_image_encoder: str = setting(
        "auto", "judges likeness for --keep_best: dino, dinov2, clip, pocket, a folder or a hub id; auto: pocket's own "
        "for pocket, else dino", group="validation", decides=False,
    )  # fmt: skip
    validation_text_encoder: str = setting(
        "auto", "judges prompt following for --keep_best: clip, pocket, none, a folder or a hub id; auto: pocket's own "
        "for pocket, else clip", group="validation", decides=False,
    )  # fmt: skip

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


def learns_text(config: DreamBoothConfig) -> bool:
    """Whether anything that is trained lies in a text encoder: its layers, or a new word."""
    return config.train_text_encoder or config.placeholder_token is not None


def optimizer_name(config: DreamBoothConfig) -> str:
    """The optimizer that `--optimizer` and its older flag ask for."""
    return "adamw8bit" if config.use_8bit_adam else config.optimizer
