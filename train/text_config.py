"""The settings of a text run. Names are those of DreamBooth's where they mean the same, else PEFT's and transformers'.

Light on purpose: the command line reads this file to answer `--help`, so it imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.config import setting
from train.dreambooth_config import OPTIMIZERS, SCHEDULES
from train.text_task_names import TASK_TYPES

DEFAULT_EPOCHS = 3

# method -> its learning rate where none is given (the papers', where they name one for AdamW)
METHODS: dict[str, float] = {
    "lora": 3e-4,
    "full": 5e-5,
    "top-layers": 5e-5,
    "bitfit": 5e-4,
    "houlsby": 5e-4,
    "pfeiffer": 5e-4,
    "lin": 5e-4,
    "prompt-tuning": 1e-2,
    "p-tuning": 1e-3,
    "prefix-tuning": 5e-3,
    "pre-layer": 1e-3,
    "head": 1e-3,
}
PROMPTS = ("prompt-tuning", "p-tuning")  # virtual tokens in the input
CLOZE = ("causal-lm", "masked-lm")  # tasks with a prompt that virtual tokens can be anywhere in

UNSUPPORTED_FLAGS = {
    "hub_token": "a token on a command line ends up in logs; log in once with `hf auth login` instead",
    "local_rank": "start with accelerate launch or torchrun, which number the processes in the environment",
    "deepspeed": "the base in parts, in main memory too, is --fsdp --fsdp_cpu_offload",
    "trust_remote_code": "code that comes with a model is never run",
}


@dataclass(frozen=True)
class TextConfig:
    """Everything that `train.text.train` needs to know; see `lora-diffusion text --help`."""

    pretrained_model_name_or_path: str = setting(
        help="base model: a folder, a hub id, or 'pocket-bert' or 'pocket-gpt', which are shipped along",
        group="model",
        aliases=("model",),
        metavar="MODEL",
    )
    task: str = setting(help="what the model is to learn", group="model", choices=tuple(TASK_TYPES))
    method: str = setting(
        "lora",
        f"how it is adapted: {', '.join(METHODS)} (the frozen model with a trained head); several joined with +, as in "
        "lora+p-tuning",
        group="model",
        metavar="METHOD",
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub model", group="model")
    device: str = setting(
        "auto",
        "where to train; auto takes CUDA where there is one",
        group="model",
        choices=("auto", "cpu", "cuda", "mps"),
        decides=False,
    )

    train_file: str | None = setting(
        None, "rows to learn from: .jsonl, .json, .csv, .tsv or .txt", group="data", metavar="FILE", decides=False
    )
    validation_file: str | None = setting(
        None, "rows to judge by while training", group="data", metavar="FILE", decides=False
    )
    test_file: str | None = setting(
        None, "rows to judge the result by, into metrics.json", group="data", metavar="FILE", decides=False
    )
    dataset: str | None = setting(
        None, "a data set that the library 'datasets' knows, in the place of files: nyu-mll/glue", group="data",
        metavar="NAME",
    )  # fmt: skip
    dataset_config: str | None = setting(None, "its subset: rte", group="data", metavar="NAME")
    dataset_split: str = setting("train", "its part to learn from", group="data", metavar="NAME")
    validation_split: str | None = setting(
        None, "its part to judge by while training", group="data", metavar="NAME", decides=False
    )
    test_split: str | None = setting(
        None, "its part to judge the result by", group="data", metavar="NAME", decides=False
    )
    separator: str | None = setting(
        None, "what stands between the columns of a .txt file: '||'; with --columns", group="data", metavar="TEXT"
    )
    columns: str | None = setting(
        None, "names of the columns of a .txt file, separated by commas", group="data", metavar="NAMES"
    )
    template: str | None = setting(
        None,
        "the text that the model sees, columns in braces: 'Question: {question}\\nAnswer: {answer}' ends with what is "
        "to be learned, '{x} lives in {mask} .' is a cloze (default: from the columns that are there)",
        group="data",
        metavar="TEXT",
    )
    text_column: str | None = setting(None, "the text (default: found by its name)", group="data", metavar="NAME")
    pair_column: str | None = setting(
        None, "the second text of a pair (default: found by its name)", group="data", metavar="NAME"
    )
    label_column: str | None = setting(
        None, "the label of a classification (default: label)", group="data", metavar="NAME"
    )
    prompt_column: str | None = setting(
        None, "what a language model is given (default: found by its name)", group="data", metavar="NAME"
    )
    answer_column: str | None = setting(
        None, "what a language model is to say (default: found by its name)", group="data", metavar="NAME"
    )
    tokens_column: str = setting("tokens", "the words of token-classification", group="data", metavar="NAME")
    tags_column: str = setting("tags", "their tags", group="data", metavar="NAME")
    question_column: str = setting("question", "of question-answering", group="data", metavar="NAME")
    context_column: str = setting("context", "of question-answering", group="data", metavar="NAME")
    answers_column: str = setting(
        "answers", "of question-answering: {'text': […], 'answer_start': […]}", group="data", metavar="NAME"
    )
    labels: str | None = setting(
        None, "the labels in their order, separated by commas (default: those of the rows)", group="data",
        metavar="NAMES",
    )  # fmt: skip
    positive_label: str | None = setting(
        None, "the label that f1 is about, where there are two (default: the last)", group="data", metavar="NAME"
    )
    regression: bool = setting(False, "the label of a sequence-classification is a number", group="data")
    label_words: str | None = setting(
        None, "masked-lm as a classification: the word for each label, 'entailment=yes,not_entailment=no'",
        group="data", metavar="PAIRS",
    )  # fmt: skip
    allowed_words_file: str | None = setting(
        None, "file with the words that masked-lm may choose from, one a line (default: all)", group="data",
        metavar="FILE", decides=False,
    )  # fmt: skip
    on_bad: str = setting(
        "error", "a row that cannot be used ends the run, or is left out and counted", group="data",
        choices=("error", "skip"),
    )  # fmt: skip
    max_length: int | None = setting(
        None, "tokens of a row, virtual ones included (default: what the model takes, 512 at most)", group="data",
        minimum=4,
    )  # fmt: skip
    max_answer_length: int | None = setting(
        None, "tokens of an answer: of seq2seq-lm (default: --max_length), of question-answering (default: 30)",
        group="data", minimum=1,
    )  # fmt: skip
    too_long: str = setting(
        "error", "a longer row ends the run, is cut, left out, or (causal-lm of plain text) split", group="data",
        choices=("error", "truncate", "skip", "split"),
    )  # fmt: skip
    doc_stride: int = setting(
        64, "tokens that two windows of a long context share, in question-answering", group="data", minimum=0
    )
    max_train_samples: int | None = setting(None, "use the first rows only", group="data", minimum=1)
    packing: bool = setting(
        False, "several rows in one, up to --max_length, each seeing itself only (causal-lm)", group="data"
    )
    group_by_length: bool = setting(
        False, "batches of rows of about one length: less padding, a less random order", group="data"
    )

    rank: int = setting(8, "rank of LoRA", group="adapter", minimum=1)
    lora_alpha: float | None = setting(
        None, "LoRA's output is scaled by alpha / rank (default: the rank, so by 1)", group="adapter", above=0
    )
    lora_dropout: float = setting(0.0, "dropout in front of LoRA", group="adapter", minimum=0, maximum=0.95)
    target_modules: str = setting(
        "attention", "which layers get LoRA: a preset (attention, attention-qv, all-linear), names separated by "
        "commas, or a regex", group="adapter",
    )  # fmt: skip
    use_dora: bool = setting(
        False, "learn the length of each output apart from its direction (DoRA); slower", group="adapter"
    )
    use_rslora: bool = setting(False, "scale by alpha / sqrt(rank), for high ranks", group="adapter")
    init_lora_weights: str = setting(
        "kaiming", "how LoRA starts: kaiming and gaussian at random, orthogonal in rows at right angles, pissa and "
        "olora from the base weights", group="adapter", choices=("kaiming", "gaussian", "orthogonal", "pissa", "olora"),
    )  # fmt: skip
    num_virtual_tokens: int | None = setting(
        None, "virtual tokens of a prompt or prefix (default: 20; with --prompt_template: those in it)",
        group="adapter", minimum=1, maximum=1024,
    )  # fmt: skip
    prompt_template: str | None = setting(
        None, "where P-tuning's virtual tokens stand: '{P:3} {mask} {P:3} {x} {P:3}', or the paper's (3,3,3)",
        group="adapter", metavar="TEXT",
    )  # fmt: skip
    prompt_init: str = setting(
        "RANDOM", "what prompt-tuning starts from: at random, from words of the vocabulary, from --prompt_init_text",
        group="adapter", choices=("RANDOM", "SAMPLE_VOCAB", "TEXT"),
    )  # fmt: skip
    prompt_init_text: str | None = setting(
        None, "the text that prompt-tuning starts as", group="adapter", metavar="TEXT"
    )
    encoder: str | None = setting(
        None, "what P-tuning's vectors come from (default: LSTM with --prompt_template, else MLP)", group="adapter",
        choices=("LSTM", "MLP", "NONE"),
    )  # fmt: skip
    encoder_hidden_size: int | None = setting(
        None, "its width, or that of --prefix_projection (default: the method's own)", group="adapter", minimum=1
    )
    prefix_projection: bool = setting(
        False, "let prefix-tuning's keys and values come from a small network", group="adapter"
    )
    prefix_dropout: float = setting(
        0.0, "dropout on prefix-tuning's keys and values", group="adapter", minimum=0, maximum=0.95
    )
    bottleneck_size: int = setting(64, "width of houlsby, pfeiffer and lin", group="adapter", minimum=1)
    leave_out: int = setting(0, "blocks at the beginning without bottlenecks (AdapterDrop)", group="adapter", minimum=0)
    top_layers: int = setting(2, "blocks at the end that top-layers learns", group="adapter", minimum=1)
    train_head: bool = setting(
        True, "learn the head of a classification along, as it is new (--no_train_head: do not)", group="adapter"
    )
    modules_to_save: str | None = setting(
        None, "further modules to learn whole, names separated by commas", group="adapter", metavar="NAMES"
    )

    output_dir: str = setting(
        "runs/text", "the run's folder: settings, events, checkpoints, adapter, metrics", group="run",
        metavar="DIR", decides=False,
    )  # fmt: skip
    overwrite: bool = setting(
        False, "start again in a folder that already holds a run, removing that run", group="run", decides=False
    )
    seed: int = setting(0, "everything random follows from it", group="run", minimum=0, maximum=2**63 - 1)
    max_train_steps: int | None = setting(
        None, f"optimizer steps (default: from --num_train_epochs, else {DEFAULT_EPOCHS} epochs)", group="run",
        minimum=1,
    )  # fmt: skip
    num_train_epochs: int | None = setting(
        None, "passes over the rows; --max_train_steps wins over it", group="run", minimum=1, decides=False
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

    train_batch_size: int = setting(8, "rows in a batch", group="optimizer", minimum=1)
    gradient_accumulation_steps: int = setting(1, "batches that make one optimizer step", group="optimizer", minimum=1)
    learning_rate: float | None = setting(
        None, f"default: {', '.join(f'{name} {rate:g}' for name, rate in METHODS.items())}", group="optimizer", above=0
    )
    prompt_learning_rate: float | None = setting(
        None, "that of virtual tokens joined with another method (default: their own)", group="optimizer", above=0
    )
    head_learning_rate: float | None = setting(
        None, "that of a head that is learned along (default: --learning_rate)", group="optimizer", above=0
    )
    lr_scheduler: str = setting("linear", "course of the learning rate", group="optimizer", choices=SCHEDULES)
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
        False, "judge and save the average over the course of training, not its last step", group="optimizer"
    )
    ema_decay: float = setting(
        0.9999, "what stays of the average in each step, after a start that is quicker", group="optimizer",
        minimum=0, maximum=0.9999999,
    )  # fmt: skip

    mixed_precision: str = setting(
        "auto",
        "precision of the frozen base, what is learned stays in fp32; auto: bf16 or fp16 on CUDA, no on CPU",
        group="speed and memory",
        choices=("auto", "no", "fp16", "bf16"),
    )
    quantize: str | None = setting(
        None,
        "store the frozen base in fewer bits: nf4 (4 bits) takes the least memory, int8 is the most exact, fp8 as "
        "small and coarser, but sure of outliers; the adapter fits the full model all the same",
        group="speed and memory",
        choices=("nf4", "int8", "fp8"),
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about 30 % slower", group="speed and memory"
    )
    attn_implementation: str | None = setting(
        None, "how attention is computed, of what transformers has for the model: sdpa, eager, flash_attention_2",
        group="speed and memory", metavar="NAME",
    )  # fmt: skip
    allow_tf32: bool = setting(False, "TF32 products on Ampere GPUs and later", group="speed and memory")
    fsdp: bool = setting(
        False,
        "with several processes: each keeps but a part of the frozen base and borrows the rest block by block (FSDP2); "
        "needs accelerate launch or torchrun",
        group="speed and memory",
        decides=False,
    )
    fsdp_cpu_offload: bool = setting(
        False, "with --fsdp: keep the parts in main memory, not on the GPU", group="speed and memory", decides=False
    )
    plan: bool = setting(
        True,
        "estimate the memory when the run starts and compare at its end (--no_plan: do not)",
        group="speed and memory",
        decides=False,
    )

    validation_steps: int | None = setting(
        None, "steps between two validations (default: once a pass over the rows)", group="validation", minimum=1,
        decides=False,
    )  # fmt: skip
    validation_batch_size: int | None = setting(
        None, "rows in a batch of a validation (default: --train_batch_size)", group="validation", minimum=1,
        decides=False,
    )  # fmt: skip
    max_validation_samples: int | None = setting(
        None, "judge by the first rows only", group="validation", minimum=1, decides=False
    )
    generate_answers: bool = setting(
        False, "language models: also judge what they write (BLEU, ROUGE, exact match) at the end; slow",
        group="validation", decides=False,
    )  # fmt: skip
    max_new_tokens: int = setting(
        64, "tokens that --generate_answers lets them write", group="validation", minimum=1, decides=False
    )
    metric_for_best: str | None = setting(
        None, "the figure that says which step is the best: the lowest of loss or perplexity, the highest of others "
        "(default: the task's)", group="validation", metavar="NAME", decides=False,
    )  # fmt: skip
    keep_best: bool = setting(
        False, "keep the best step's adapter as best.safetensors, and test that one", group="validation", decides=False
    )
    early_stopping_patience: int | None = setting(
        None, "end after so many validations in a row that were no better than the best (default: never)",
        group="validation", minimum=1,
    )  # fmt: skip

    report_to: str | None = setting(
        None,
        "also log to this tracker, if it is installed; events.jsonl is always written",
        group="reporting",
        choices=("tensorboard", "wandb", "all", "none"),
        decides=False,
    )
    logging_dir: str = setting("logs", "folder of the tracker, inside the run's", group="reporting", decides=False)
    save_peft: bool = setting(
        True, "write the adapter for PEFT too, into peft/, where PEFT has the method (--no_save_peft: do not)",
        group="reporting", decides=False,
    )  # fmt: skip
    push_to_hub: bool = setting(False, "upload the adapter and its card when done", group="reporting", decides=False)
    hub_model_id: str | None = setting(
        None, "repository to upload to (default: the name of the run's folder)", group="reporting", decides=False
    )


def methods_of(config: TextConfig) -> list[str]:
    """The methods that `--method` joins, in their order."""
    return [word.strip() for word in config.method.split("+")]


def learning_rate_of(config: TextConfig, method: str) -> float:
    """The rate of one of the methods."""
    first = next((one for one in methods_of(config) if one not in PROMPTS), methods_of(config)[0])
    if method in PROMPTS and method != first:
        return config.prompt_learning_rate or METHODS[method]
    return config.learning_rate or METHODS[method]
