"""Which settings of a text run go together: what can be said before a file is read and before torch is loaded."""

from __future__ import annotations

from lora_diffusion.errors import ConfigError
from lora_diffusion.methods.prompt_template import PromptTemplate
from train.config import check, nearest
from train.text_config import CLOZE, METHODS, PROMPTS, TextConfig, methods_of
from train.text_methods import EXISTING, KINDS, configs_of, parsed_template
from train.text_task_names import TASK_TYPES
from train.text_template import MASK, parse

LANGUAGE = ("causal-lm", "seq2seq-lm")
CLASSIFICATION = ("sequence-classification", "token-classification")

# setting -> the tasks that have a use for it
_OF_TASKS = {
    "template": ("sequence-classification", "masked-lm", *LANGUAGE),
    "text_column": ("sequence-classification", "causal-lm"),
    "pair_column": ("sequence-classification",),
    "label_column": ("sequence-classification", "masked-lm"),
    "prompt_column": (*LANGUAGE, "masked-lm"),
    "answer_column": (*LANGUAGE, "masked-lm"),
    "labels": CLASSIFICATION,
    "positive_label": ("sequence-classification",),
    "regression": ("sequence-classification",),
    "label_words": ("masked-lm",),
    "allowed_words_file": ("masked-lm",),
    "max_answer_length": ("seq2seq-lm", "question-answering"),
    "packing": ("causal-lm",),
    "generate_answers": LANGUAGE,
    "prompt_template": (*CLOZE, "seq2seq-lm"),
}
# setting -> the methods that have a use for it
_OF_METHODS = {
    **dict.fromkeys(("lora_alpha", "lora_dropout", "use_dora", "use_rslora", "loraplus_lr_ratio"), ("lora",)),
    "num_virtual_tokens": (*PROMPTS, "prefix-tuning", "pre-layer"),
    "prompt_template": ("p-tuning",),
    "prompt_init_text": ("prompt-tuning",),
    "encoder": ("p-tuning",),
    "encoder_hidden_size": ("p-tuning", "prefix-tuning"),
    "prefix_projection": ("prefix-tuning",),
    "prefix_dropout": ("prefix-tuning",),
    "leave_out": ("houlsby", "pfeiffer", "lin"),
}


def validate(config: TextConfig) -> None:
    """Check all that can be checked without reading a file.

    Raises:
        ConfigError: one sentence that names the setting, its value and what to do.
    """
    check(config)
    _check_methods(config)
    _check_uses(config)
    _check_data(config)
    _check_template(config)
    if config.max_train_steps is not None and config.lr_warmup_steps > config.max_train_steps:
        raise ConfigError(
            f"--lr_warmup_steps {config.lr_warmup_steps} is more than --max_train_steps {config.max_train_steps}; "
            "the learning rate would never be reached"
        )
    if config.resume_from_checkpoint is not None and config.overwrite:
        raise ConfigError("--overwrite starts again and --resume_from_checkpoint goes on; give one of them")
    if config.fsdp_cpu_offload and not config.fsdp:
        raise ConfigError("--fsdp_cpu_offload needs --fsdp")
    _check_optimizer(config)
    _check_validation(config)
    configs_of(config, TASK_TYPES[config.task], ["head"], config.pretrained_model_name_or_path)


def _check_methods(config: TextConfig) -> None:
    methods = methods_of(config)
    for word in methods:
        if word not in METHODS:
            close = nearest(word, METHODS)
            raise ConfigError(f"--method {word!r} is not one of {', '.join(METHODS)}{close}")
    kinds = [KINDS[word] for word in methods]
    if len(set(kinds)) != len(kinds):
        raise ConfigError(f"--method {config.method} names two of one kind; give each kind once")
    own = [word for word in methods if word in (*EXISTING, "head")]
    if "full" in methods and len(methods) > 1 and not set(methods) <= {"full", *PROMPTS}:
        raise ConfigError(f"--method {config.method}: full learns all weights; join it with virtual tokens at most")
    if len(own) > 1 or ("lora" in methods and own and own != ["head"]):
        raise ConfigError(f"--method {config.method}: {' and '.join(methods)} learn the same weights; give one of them")
    if "head" in methods:
        if len(methods) > 1:
            raise ConfigError("--method head is the frozen model; with another method the head is learned anyway")
        if config.modules_to_save is None and (config.task not in (*CLASSIFICATION, "question-answering")):
            raise ConfigError(f"--method head: {config.task} has no head of its own; name one with --modules_to_save")
        if not config.train_head and config.modules_to_save is None:
            raise ConfigError("--method head learns nothing with --no_train_head; leave one of them out")
    if config.quantize is not None and any(word in EXISTING for word in methods):
        raise ConfigError(f"--method {config.method} learns the base's own weights, which --quantize would fix; take "
                          "lora, or leave --quantize out")  # fmt: skip
    if config.fsdp and config.quantize is not None:
        raise ConfigError("--fsdp cannot take a quantised base apart; leave --quantize out, or --fsdp")
    if config.fsdp and any(word in EXISTING for word in methods):
        raise ConfigError(f"--fsdp takes a frozen base apart, and --method {config.method} learns it; leave one out")
    if config.task == "seq2seq-lm" and "p-tuning" in methods and config.prompt_template is not None:
        inside = PromptTemplate.parse(parsed_template(config.prompt_template))
        if inside.has_mask:
            raise ConfigError("--prompt_template with {mask} is for masked-lm; seq2seq-lm answers in its decoder")


def _check_uses(config: TextConfig) -> None:
    """A setting that nothing would read is a mistake."""
    defaults = TextConfig(config.pretrained_model_name_or_path, config.task)
    methods = methods_of(config)
    for name, tasks in _OF_TASKS.items():
        if getattr(config, name) != getattr(defaults, name) and config.task not in tasks:
            raise ConfigError(f"--{name} is for {' and '.join(tasks)}; --task {config.task} has no use for it")
    for name, users in _OF_METHODS.items():
        if getattr(config, name) != getattr(defaults, name) and not set(users) & set(methods):
            raise ConfigError(f"--{name} is for {' and '.join(users)}; --method {config.method} has no use for it")
    if config.prompt_init == "TEXT" and config.prompt_init_text is None:
        raise ConfigError("--prompt_init TEXT needs --prompt_init_text, the text to start from")
    if config.prompt_init_text is not None and config.prompt_init != "TEXT":
        raise ConfigError("--prompt_init_text needs --prompt_init TEXT")
    if config.prompt_learning_rate is not None and not (len(methods) > 1 and set(methods) & set(PROMPTS)):
        raise ConfigError("--prompt_learning_rate is for virtual tokens beside another method; give --learning_rate")
    if config.encoder_hidden_size is not None and "p-tuning" not in methods and not config.prefix_projection:
        raise ConfigError("--encoder_hidden_size needs --prefix_projection")


def _check_data(config: TextConfig) -> None:
    if (config.train_file is None) == (config.dataset is None):
        what = "neither is given" if config.train_file is None else "both are given"
        raise ConfigError(f"give --train_file or --dataset: {what}")
    if config.dataset is None:
        for name in ("dataset_config", "validation_split", "test_split"):
            if getattr(config, name) is not None:
                raise ConfigError(f"--{name} needs --dataset")
    for part in ("validation", "test"):
        if getattr(config, f"{part}_file") is not None and getattr(config, f"{part}_split") is not None:
            raise ConfigError(f"--{part}_file and --{part}_split are two sources; give one of them")
    if (config.separator is None) != (config.columns is None):
        raise ConfigError("--separator and --columns belong together: the columns of a .txt file")
    if config.label_words is not None and config.allowed_words_file is not None:
        raise ConfigError("--label_words and --allowed_words_file exclude each other: the words are what is allowed")
    words_of(config.label_words)
    if config.too_long == "split" and config.task != "causal-lm":
        raise ConfigError("--too_long split is for causal-lm of plain text; truncate or skip")
    if config.packing and config.group_by_length:
        raise ConfigError("--packing and --group_by_length both save padding; give one of them")
    if config.regression and (config.labels is not None or config.positive_label is not None):
        raise ConfigError("--regression predicts a number: leave --labels and --positive_label out")
    if config.max_length is not None and config.doc_stride >= config.max_length and config.task == "question-answering":
        raise ConfigError(f"--doc_stride {config.doc_stride} must be below --max_length {config.max_length}")


def _check_template(config: TextConfig) -> None:
    if config.template is not None:
        names = [name for _, name in parse(config.template)]
        if config.task == "masked-lm" and names.count(MASK) != 1:
            raise ConfigError(f"--template {config.template!a} needs one {{mask}}: it is where the answer goes")
        if config.task != "masked-lm" and MASK in names:
            raise ConfigError(f"--template {config.template!a}: {{mask}} is for --task masked-lm")
    if config.prompt_template is None:
        if config.task == "masked-lm" and config.template is None:
            raise ConfigError("masked-lm needs a --template with {mask}, or P-tuning's --prompt_template")
        return
    if config.template is not None:
        raise ConfigError("--template and --prompt_template are two texts for one row; give one of them")
    found = PromptTemplate.parse(parsed_template(config.prompt_template))
    if config.task == "masked-lm" and not found.has_mask:
        raise ConfigError(f"--prompt_template {config.prompt_template!a} needs {{mask}}: it is where the answer goes")
    if config.task == "causal-lm" and found.has_mask:
        raise ConfigError("--prompt_template with {mask} is for masked-lm; causal-lm answers after the last token")


def words_of(pairs: str | None) -> dict[str, str] | None:
    """`--label_words` as {label: word}. Raises ConfigError."""
    if pairs is None:
        return None
    found: dict[str, str] = {}
    for pair in pairs.split(","):
        label, equals, word = (part.strip() for part in pair.partition("="))
        if not (label and equals and word) or label in found:
            raise ConfigError(f"--label_words {pairs!a}: write label=word,label=word, each label once")
        found[label] = word
    if len(found) < 2:
        raise ConfigError(f"--label_words {pairs!a}: give two labels or more")
    return found


def _check_optimizer(config: TextConfig) -> None:
    if config.optimizer == "prodigy":
        rates = {config.learning_rate, config.head_learning_rate or config.learning_rate}
        if len(rates) > 1 or config.loraplus_lr_ratio is not None or len(methods_of(config)) > 1:
            raise ConfigError("--optimizer prodigy finds one learning rate for all; give no other for a part")
    if config.optimizer == "schedule-free-adamw":
        if config.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise ConfigError(
                f"--optimizer schedule-free-adamw needs no --lr_scheduler {config.lr_scheduler}; give constant, or "
                "constant_with_warmup"
            )
        if config.use_ema:
            raise ConfigError("--optimizer schedule-free-adamw saves an average by itself; leave --use_ema out")
        if not config.adam_beta1:
            raise ConfigError("--optimizer schedule-free-adamw needs an --adam_beta1 above 0; 0.9 is usual")


def _check_validation(config: TextConfig) -> None:
    judged = config.validation_file is not None or config.validation_split is not None
    for name in ("keep_best", "early_stopping_patience", "metric_for_best", "validation_steps"):
        if getattr(config, name) and not judged:
            raise ConfigError(f"--{name} goes by a validation; give --validation_file or --validation_split")
