"""The plan of a text run against real steps, the figures for well-known models, and what a plan advises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BloomConfig, GPT2Config, LlamaConfig, T5Config

import lora_diffusion as ld
from lora_diffusion.errors import ConfigError, ModelNotFoundError
from lora_diffusion.planning.live_bytes import LiveBytes
from train.quantise import planned_bytes, quantise
from train.record import read_events
from train.text import train
from train.text_config import METHODS
from train.text_methods import configs_of
from train.text_models import new_modules
from train.text_plan import longest, plan_text, resolved_text
from train.text_plan_advice import advise_text
from train.text_plan_architectures import TEXT_ARCHITECTURES
from train.text_plan_batches import example_batch, loss_of
from train.text_plan_config import TextPlanConfig, validate
from train.text_plan_models import text_model
from train.text_plan_parts import base_bytes, on_card
from train.text_plan_phases import TextJob, phases_of_text
from train.text_run import TextRun
from train.text_task_names import TASK_TYPES

GIB = 2**30
ROWS, LENGTH = 4, 48
_SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "bert": lambda: BertConfig(**_SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=1),
    "bloom": lambda: BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2),
    "t5": lambda: T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def folder(place: Path, kind: str, task: str) -> Path:
    """A folder with a tiny model's config, and the model's weights beside it."""
    model = real(kind, task)
    model.save_pretrained(place)
    return place


def real(kind: str, task: str, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    maker = {
        "causal-lm": "AutoModelForCausalLM", "seq2seq-lm": "AutoModelForSeq2SeqLM",
        "masked-lm": "AutoModelForMaskedLM", "sequence-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
    }[task]  # fmt: skip
    config = CONFIGS[kind]()
    config.use_cache, config.pad_token_id = False, 0
    model = getattr(transformers, maker).from_config(config)
    return model.to(dtype).eval().requires_grad_(False)


def filled(task: str, rows: int = ROWS, answer: int = LENGTH - 1) -> dict[str, torch.Tensor]:
    """A batch with values, and padding at the end of one row."""
    batch = example_batch(task, rows, LENGTH, answer)
    for name in ("input_ids", "decoder_input_ids", "targets"):
        if name in batch:
            batch[name] = torch.randint(3, 300, batch[name].shape)
    batch["attention_mask"][0, LENGTH - 5 :] = 0
    if "positions" in batch:
        batch["positions"] = torch.arange(len(batch["positions"]))
    return batch


def _half(precision: torch.dtype) -> torch.dtype | None:
    return None if precision == torch.float32 else precision


def counted(model: Any, batch: dict[str, torch.Tensor], task: str, autocast: Any = None, **options: Any) -> int:
    """The most bytes that tensors take while a real model with an adapter takes three steps and is judged."""
    computing = partial(torch.autocast, "cpu", dtype=autocast, enabled=autocast is not None)
    live = LiveBytes()
    with live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.adopt(tensor, "weights")
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-3)
        before = [torch.empty_like(parameter) for parameter in learned]
        model.train()
        if options.get("gradient_checkpointing"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        for value in batch.values():
            live.adopt(value, "activations")
        for _ in range(3):
            for _ in range(2 if options.get("accumulates") else 1):
                with computing():
                    loss = loss_of(task, model, batch)
                loss.backward()
                del loss
            for parameter, copy in zip(learned, before):
                copy.copy_(parameter.detach())
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad(), computing():
            loss_of(task, model, batch)
    return live.peak


CASES = [
    ("bert", "sequence-classification", "lora", {}),
    ("bert", "token-classification", "lora", {"precision": torch.bfloat16}),
    ("bert", "question-answering", "lora", {"gradient_checkpointing": True}),
    ("bert", "masked-lm", "lora", {"accumulates": True}),
    ("bert", "sequence-classification", "bitfit", {}),
    ("bert", "sequence-classification", "houlsby", {}),
    ("bert", "sequence-classification", "head", {}),
    ("gpt2", "causal-lm", "lora", {}),
    ("gpt2", "causal-lm", "full", {}),
    ("gpt2", "causal-lm", "prefix-tuning", {}),
    ("llama", "causal-lm", "lora", {"gradient_checkpointing": True, "precision": torch.bfloat16}),
    ("llama", "causal-lm", "lora", {"quantize": "int8"}),
    ("llama", "causal-lm", "top-layers", {}),
    ("llama", "causal-lm", "prompt-tuning", {}),
    ("llama", "causal-lm", "p-tuning", {}),
    ("bloom", "causal-lm", "lora", {}),
    ("t5", "seq2seq-lm", "lora", {}),
]


@pytest.mark.parametrize(("kind", "task", "method", "options"), CASES)
def test_a_plan_is_what_steps_take(kind: str, task: str, method: str, options: dict[str, Any]) -> None:
    options = dict(options)
    precision = options.pop("precision", torch.float32)
    model, batch = real(kind, task, precision), filled(task)
    if options.get("quantize"):
        quantise(model, options["quantize"], precision=precision)
    configs = configs_of(TextPlanConfig("x", task, method=method), TASK_TYPES[task], new_modules(model, []))
    ld.add_adapter(model, configs)
    options.pop("quantize", None)
    job = TextJob(partial(loss_of, task), batch, batch, autocast=_half(precision), **options)
    plan = max(phase.plan.peak for phase in phases_of_text(model, job, device="cpu"))
    taken = counted(model, batch, task, autocast=_half(precision), **options)
    assert 0.97 <= plan / taken <= 1.1, f"{plan} planned, {taken} taken"


@pytest.mark.parametrize(
    ("name", "task", "count"),
    [
        ("bert-base", "masked-lm", 109_514_298),
        ("roberta-base", "masked-lm", 124_697_433),
        ("roberta-large", "masked-lm", 355_412_057),
        ("gpt2", "causal-lm", 124_439_808),
        ("gpt2-medium", "causal-lm", 354_823_168),
        ("gpt2-large", "causal-lm", 774_030_080),
        ("t5-3b", "seq2seq-lm", 2_851_598_336),
        ("t0-3b", "seq2seq-lm", 2_849_757_184),
        ("mt5-large", "seq2seq-lm", 1_229_581_312),
        ("mt5-xxl", "seq2seq-lm", 12_921_057_280),
        ("bloom-7b1", "causal-lm", 7_069_016_064),
        ("llama-3.2-1b", "causal-lm", 1_235_814_400),
        ("llama-3.2-3b", "causal-lm", 3_212_749_824),
        ("llama-3.1-8b", "causal-lm", 8_030_261_248),
        ("qwen2.5-0.5b", "causal-lm", 494_032_768),
        ("qwen2.5-1.5b", "causal-lm", 1_543_714_304),
        ("qwen2.5-7b", "causal-lm", 7_615_616_512),
        ("mistral-7b", "causal-lm", 7_241_732_096),
    ],
)
def test_the_architectures_have_their_models_parameters(name: str, task: str, count: int) -> None:
    """The counts that the models' pages and papers give."""
    assert sum(p.numel() for p in text_model(name, task).parameters()) == count


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return text_model(str(folder(tmp_path_factory.mktemp("gpt2"), "gpt2", "causal-lm")), "causal-lm")


def planned(model: Any, name: str, task: str = "causal-lm", answer: int | None = None, **settings: Any) -> Any:
    config = resolved_text(TextPlanConfig(name, task, **settings), model, device="cuda")
    return plan_text(config, model, answer_length=answer)


def activations(plan: Any) -> int:
    training = next(phase.plan for phase in plan.phases if phase.name == "training")
    return int(training.parts["activations"])


def test_more_takes_more(gpt2: Any) -> None:
    plain = planned(gpt2, "gpt2", train_batch_size=2, max_length=128)
    assert [phase.name for phase in plain.phases] == ["loading", "training", "saving"]
    more = activations(planned(gpt2, "gpt2", train_batch_size=8, max_length=128))
    assert more > 3 * activations(plain)
    assert activations(planned(gpt2, "gpt2", train_batch_size=2, max_length=512)) > 3.9 * activations(plain)
    less = planned(gpt2, "gpt2", train_batch_size=2, max_length=128, gradient_checkpointing=True)
    assert activations(less) < 0.6 * activations(plain)
    assert activations(planned(gpt2, "gpt2", train_batch_size=2, max_length=128, answer=4)) < activations(plain)


def test_a_judged_run_has_a_phase_more(gpt2: Any) -> None:
    names = [phase.name for phase in planned(gpt2, "gpt2", max_length=32, validation_file="rows.jsonl").phases]
    assert names == ["loading", "training", "validation", "saving"]


def test_every_method_can_be_planned(tmp_path: Path) -> None:
    model = text_model(str(folder(tmp_path, "bert", "sequence-classification")), "sequence-classification")
    for method in METHODS:
        plan = planned(model, str(tmp_path), "sequence-classification", max_length=32, method=method)
        assert plan.peak > plan.phases[0].plan.peak, method


def test_learning_everything_takes_what_it_holds_four_times(tmp_path: Path) -> None:
    """Weights, gradients, and two moments, in fp32."""
    model = text_model(str(folder(tmp_path, "llama", "causal-lm")), "causal-lm")
    batch = example_batch("causal-lm", 1, 8, 7)
    size = 4 * sum(p.numel() for p in model.parameters())
    model.requires_grad_(True)
    job = TextJob(partial(loss_of, "causal-lm"), batch, copies=0)
    parts = max((phase.plan for phase in phases_of_text(model, job)), key=lambda plan: plan.peak).parts
    learned = parts["adapters"] + parts["gradients"] + parts["optimizer"]
    assert 3.5 * size < learned < 4.1 * size  # of the gradients, those that are there at the peak


def test_a_base_in_four_bits_takes_what_quantise_makes_of_it() -> None:
    model = text_model("qwen2.5-0.5b", "causal-lm")
    plan = planned(model, "qwen2.5-0.5b", quantize="nf4", max_length=64, train_batch_size=1)
    stored = planned_bytes(model, "nf4", torch.bfloat16)
    training = next(phase.plan for phase in plan.phases if phase.name == "training")
    assert abs(training.parts["weights"] / stored - 1) < 0.005


def test_t5_keeps_its_wo_in_eight_bits(tmp_path: Path) -> None:
    """It would cast activations to a 4-bit weight's storage type."""
    model = text_model(str(folder(tmp_path, "t5", "seq2seq-lm")), "seq2seq-lm")
    small = {"max_length": 16, "max_answer_length": 4, "train_batch_size": 1, "mixed_precision": "bf16"}
    plan = planned(model, str(tmp_path), "seq2seq-lm", quantize="nf4", **small)
    weights = plan.phases[0].plan.parts["weights"]
    assert weights == planned_bytes(model, "nf4", torch.bfloat16)
    wide = sum(layer.weight.numel() for path, layer in model.named_modules() if path.endswith(".wo"))
    assert weights > wide + sum(p.numel() for p in model.parameters()) // 2


def test_bloomz_fits_in_four_bits() -> None:
    model = text_model("bloomz-7b1", "causal-lm")
    one: dict[str, Any] = {"max_length": 512, "train_batch_size": 1, "gradient_checkpointing": True}
    assert planned(model, "bloomz-7b1", quantize="nf4", **one).needed < 8 * GIB


@pytest.mark.slow
def test_bloomz_fits_in_half_precision() -> None:
    model = text_model("bloomz-7b1", "causal-lm")
    short: dict[str, Any] = {"max_length": 64, "train_batch_size": 1}
    long: dict[str, Any] = {"max_length": 512, "train_batch_size": 1, "gradient_checkpointing": True}
    assert planned(model, "bloomz-7b1", **short).needed < 17 * GIB
    assert planned(model, "bloomz-7b1", **long).needed < 17 * GIB
    assert planned(model, "bloomz-7b1", quantize="nf4", **short).needed < 8 * GIB


def test_a_base_in_parts(tmp_path: Path) -> None:
    model = text_model(str(folder(tmp_path, "llama", "causal-lm")), "causal-lm")
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    rest = base_bytes(model) - 2 * block
    assert on_card(model, processes=1, offload=True) == [0, max(2 * rest, rest + 3 * block)]
    assert on_card(model, processes=4, offload=False)[0] == base_bytes(model) // 4
    one: dict[str, Any] = {"max_length": 64, "train_batch_size": 1}
    whole, parts = (
        next(phase.plan.parts for phase in planned(model, str(tmp_path), **more).phases if phase.name == "training")
        for more in (one, {**one, "fsdp": True, "fsdp_cpu_offload": True})
    )
    assert parts["weights"] == max(2 * rest, rest + 3 * block) // 2  # bf16
    assert abs(parts["activations"] / whole["activations"] - 1) < 0.01


def test_in_half_precision_norms_and_softmax_are_computed_in_full(gpt2: Any) -> None:
    """As CUDA's autocast does; the CPU's does not."""
    batch = example_batch("causal-lm", 1, 128, 127)
    job = TextJob(partial(loss_of, "causal-lm"), batch, None, ld.LoraConfig(target_modules="attention"), torch.bfloat16)
    plain, cast = (
        phases_of_text(gpt2, replace(job, autocast=autocast))[1].plan.parts["activations"]
        for autocast in (None, torch.bfloat16)
    )
    assert cast > 1.03 * plain
    checkpointed = replace(job, autocast=torch.bfloat16, gradient_checkpointing=True)
    assert phases_of_text(gpt2, checkpointed)[1].plan.parts["activations"] < cast


def test_the_longest_rows() -> None:
    class Row:
        def __init__(self, length: int, counted: int) -> None:
            self.length, self.counted = length, counted

    rows = [Row(3, 1), Row(9, 1), Row(9, 4), Row(5, 5)]
    assert [(one.length, one.counted) for one in longest(rows, 2)] == [(9, 4), (9, 1)]


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("sequence-classification", {}),
        ("sequence-classification", {"method": "houlsby", "train_batch_size": 2, "validates": True}),
        ("causal-lm", {"gradient_accumulation_steps": 2, "validates": True}),
        ("causal-lm", {"method": "full"}),
        ("seq2seq-lm", {"mixed_precision": "bf16"}),
        ("masked-lm", {"gradient_checkpointing": True}),
    ],
)
def test_a_runs_own_plan_is_what_it_takes(
    task: str, settings: dict[str, Any], make_text_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors counted from the time when the model is loaded, and the process as a whole."""
    settings = dict(settings)
    config = make_text_config(task, max_train_steps=4, **{k: v for k, v in settings.items() if k != "validates"})
    if settings.get("validates"):
        config = replace(config, validation_file=config.train_file, validation_steps=2)
    config = replace(config, plan=False)
    live, plans, go = LiveBytes(), [], TextRun.go

    def counting(self: TextRun, *arguments: Any) -> Any:
        self.config = replace(self.config, plan=True)
        assert self._plan(self._batches()) is not None
        plans.append(read_events(self.folder.path / "events.jsonl")[-1])
        self.config = replace(self.config, plan=False)
        with live:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                live.adopt(tensor, "weights")
            return go(self, *arguments)

    monkeypatch.setattr(TextRun, "go", counting)
    result = train(config)
    (plan,) = plans
    tensors = max(phase["peak"] for phase in plan["phases"].values())
    assert 0.97 <= tensors / live.peak <= 1.1, f"{tensors} planned, {live.peak} taken"
    assert 0.9 < plan["peak"] / result.peak_memory_bytes < 1.25  # of a process that ran other tests


def test_the_first_change_that_is_enough(tmp_path: Path) -> None:
    model = text_model(str(folder(tmp_path, "llama", "causal-lm")), "causal-lm")
    config = resolved_text(TextPlanConfig(str(tmp_path), "causal-lm", max_length=48), model, device="cuda")
    asked = plan_text(config, model).needed
    assert advise_text(config, partial(plan_text, model=model), asked) is None
    advice = advise_text(config, partial(plan_text, model=model), asked - 1)
    assert advice is not None and advice.fits and advice.plan.needed < asked
    assert advice.changes[0].settings == {"gradient_checkpointing": True}


def test_changes_together() -> None:
    """With plans made up: what each change takes off is known."""
    config = TextPlanConfig("x", "causal-lm", max_length=512, mixed_precision="no")

    def plan(one: TextPlanConfig) -> Any:
        needed = 100 - 30 * one.gradient_checkpointing - 20 * (one.train_batch_size == 1)
        needed -= 30 * (one.mixed_precision == "bf16") + {"nf4": 15, "int8": 10, None: 0}[one.quantize]
        return type("Made", (), {"needed": needed - 12 * one.fsdp_cpu_offload, "peak": needed})()

    def flags(room: int) -> tuple[bool, list[str]]:
        advice = advise_text(config, plan, room)
        assert advice is not None
        return advice.fits, [change.flags() for change in advice.changes]

    batch = "--train_batch_size 1 --gradient_accumulation_steps 8"
    assert flags(70) == (True, ["--gradient_checkpointing"])
    assert flags(40) == (True, ["--gradient_checkpointing", "--mixed_precision bf16"])
    assert flags(10) == (True, ["--gradient_checkpointing", batch, "--mixed_precision bf16", "--quantize int8"])
    fits, last = flags(1)
    assert not fits and "--quantize nf4" in last and not any("fsdp" in words for words in last)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": "rtx3061"}, "--gpu rtx3061 is not known; did you mean rtx3060"),
        ({"gpu": "t4", "memory": "6GB"}, "give one of them"),
        ({"gpu": "t4", "device": "cpu"}, "--gpu is a card"),
        ({"train_batch_size": 0}, "--train_batch_size 0 is too small"),
        ({"fsdp_cpu_offload": True}, "--fsdp_cpu_offload needs --fsdp"),
        ({"quantize": "nf4", "method": "full"}, "--quantize would fix"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(TextPlanConfig("gpt2", "causal-lm", **settings))


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there is no model gpt5; .* bert-base, "):
        text_model("gpt5", "causal-lm")
    with pytest.raises(ModelNotFoundError, match=r"there is no config\.json in"):
        text_model(str(tmp_path), "causal-lm")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "big"')
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        text_model(str(tmp_path), "causal-lm")
    with pytest.raises(ConfigError, match="gpt2 is a gpt2, of which transformers has no masked-lm model"):
        text_model("gpt2", "masked-lm")


def test_the_models_are_on_meta_and_frozen() -> None:
    assert set(TEXT_ARCHITECTURES) >= {"bloomz-7b1", "mt0-xxl", "t0-3b"}
    for parameter in text_model("bert-base", "sequence-classification", labels=3).parameters():
        assert parameter.is_meta and not parameter.requires_grad
