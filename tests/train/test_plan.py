"""The plan of a run against the run itself, the figures for well-known models, and what a plan advises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.errors import ConfigError, ModelNotFoundError
from lora_diffusion.planning.live_bytes import LiveBytes
from train import dreambooth_run, plan_phases
from train.dreambooth import train
from train.dreambooth_config import DreamBoothConfig
from train.plan import RunPlan, plan_run, resolved
from train.plan_advice import advise
from train.plan_cards import CARDS, card_of
from train.plan_config import PlanConfig
from train.plan_config import validate as validate_plan
from train.plan_models import Blueprint, blueprint
from train.quantise import planned_bytes
from train.record import read_events

GIB = 2**30
Make = Callable[..., DreamBoothConfig]


@pytest.fixture(scope="module")
def sd15() -> Blueprint:
    return blueprint("sd15")


@pytest.fixture(scope="module")
def half(sd15: Blueprint) -> RunPlan:
    """Stable Diffusion 1.5 at 512 px in fp16 with checkpointing, the text encoder trained, and previews."""
    settings = {"gradient_checkpointing": True, "train_text_encoder": True, "validation_prompt": "x"}
    return planned(sd15, mixed_precision="fp16", **settings)


def planned(model: Blueprint, device: str = "cuda", **settings: Any) -> RunPlan:
    config = PlanConfig(model.name, **settings)
    return plan_run(resolved(config, model, device=device), model, device=device)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[DreamBoothConfig], LiveBytes]:
    """`count(config)` trains and counts the bytes of all tensors from the time when the model is loaded."""
    go = dreambooth_run.Run.go
    found: list[LiveBytes] = []

    def counting(self: Any, *arguments: Any) -> Any:
        live = LiveBytes()
        with live:
            for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
                for tensor in (*part.parameters(), *part.buffers()):
                    live.adopt(tensor, "weights")
            result = go(self, *arguments)
        found.append(live)
        return result

    def run(config: DreamBoothConfig) -> LiveBytes:
        train(replace(config, plan=False))
        return found[-1]

    monkeypatch.setattr(dreambooth_run.Run, "go", counting)
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_batch_size": 4, "train_text_encoder": True},
        {"train_batch_size": 4, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16", "train_batch_size": 4, "use_ema": True, "lora_dropout": 0.1},
        {"quantize": "int8", "train_batch_size": 4},
        {"placeholder_token": "sks", "only_token": True, "train_batch_size": 4},
        {"placeholder_token": "sks", "num_vectors": 4, "gradient_checkpointing": True, "train_batch_size": 4},
        {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 4, "prior_generation_steps": 2},
        {"validation_prompt": "sks dog", "num_validation_images": 8, "validation_inference_steps": 2},
    ],
)
def test_a_plan_is_what_a_run_takes(settings: Any, make_config: Make, count: Any) -> None:
    config = make_config(max_train_steps=2, **settings)
    model = blueprint(config.pretrained_model_name_or_path)
    plan = plan_run(resolved(config, model, device="cpu"), model, device="cpu")
    tensors = plan.largest.plan.peak
    taken = count(config).peak
    assert 0.97 <= tensors / taken <= 1.10, f"{tensors} planned, {taken} taken"


def test_a_run_plans_itself_and_compares(make_config: Make) -> None:
    result = train(make_config())
    events = read_events(result.output_dir / "events.jsonl")
    plan = next(event for event in events if event["event"] == "plan")
    end = events[-1]
    assert list(plan["phases"]) == ["loading", "encoding", "training", "saving"]
    assert plan["parts"]["weights"] > 0 and plan["parts"]["adapters"] > 0
    assert end["planned_memory_bytes"] == plan["peak"]
    assert end["peak_memory_bytes"] == result.peak_memory_bytes
    assert 0.9 < end["planned_memory_bytes"] / end["peak_memory_bytes"] < 1.25  # of a process that ran other tests


def test_a_plan_changes_nothing_of_the_run(make_config: Make) -> None:
    settings = {"lora_dropout": 0.1, "train_text_encoder": True, "gradient_checkpointing": True}
    with_plan, without = train(make_config("with", **settings)), train(make_config("without", plan=False, **settings))
    assert with_plan.adapter is not None and without.adapter is not None
    assert with_plan.adapter.read_bytes() == without.adapter.read_bytes()
    events = read_events(without.output_dir / "events.jsonl")
    assert "plan" not in {event["event"] for event in events} and events[-1]["planned_memory_bytes"] is None


def test_a_run_does_not_fail_for_want_of_a_plan(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(plan_phases, "build_learner", fail)
    events = read_events(train(make_config(max_train_steps=1)).output_dir / "events.jsonl")
    assert any("cannot be planned: NotImplementedError" in event.get("message", "") for event in events)
    assert events[-1]["event"] == "end"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd21", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840
            },
        ),
    ],
)  # fmt: skip
def test_the_architectures_have_their_models_parameters(name: str, counts: dict[str, int]) -> None:
    modules = blueprint(name).modules
    assert {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()} == counts


def test_stable_diffusion_15_in_half_precision(half: RunPlan) -> None:
    assert half.largest.name == "training"
    assert 2.0 * GIB < half.peak < 2.6 * GIB
    weights = 2 * (859_520_964 + 123_060_480)
    assert weights <= half.largest.plan.parts["weights"] < weights + 2**20
    assert [phase.name for phase in half.phases] == ["loading", "encoding", "training", "previews", "saving"]


def test_stable_diffusion_15_in_four_bits(sd15: Blueprint) -> None:
    plan = planned(sd15, gradient_checkpointing=True, mixed_precision="fp16", train_text_encoder=True, quantize="nf4")
    assert plan.peak < 1.4 * GIB
    training = next(phase.plan for phase in plan.phases if phase.name == "training")
    stored = sum(planned_bytes(sd15.modules[name], "nf4", torch.float16) for name in ("unet", "text_encoder"))
    assert abs(training.parts["weights"] / stored - 1) < 0.005


@pytest.mark.slow
def test_stable_diffusion_xl_fits_on_a_card_of_ten_gigabytes() -> None:
    plan = planned(blueprint("sdxl"), gradient_checkpointing=True, mixed_precision="fp16", train_text_encoder=True)
    assert 6.5 * GIB < plan.peak < plan.needed < CARDS["rtx3080"].memory


def test_drawing_takes_turns_on_a_gpu(half: RunPlan) -> None:
    phases = {phase.name: phase.plan for phase in half.phases}
    assert phases["previews"].peak < phases["training"].peak
    assert phases["encoding"].parts["weights"] < 0.4 * GIB  # the autoencoder alone


def test_more_takes_more(make_config: Make) -> None:
    config = make_config()
    model = blueprint(config.pretrained_model_name_or_path)

    def activations(**changes: Any) -> int:
        one = resolved(replace(config, **changes), model, device="cuda")
        phases = plan_run(one, model).phases
        return next(phase.plan.parts["activations"] for phase in phases if phase.name == "training")

    plain = activations()
    assert activations(train_batch_size=4) > 3 * plain
    assert activations(gradient_checkpointing=True) < plain
    assert activations(resolution=64) > 3 * plain


def test_the_first_change_that_is_enough(make_config: Make) -> None:
    config = make_config(train_batch_size=4, train_text_encoder=True)
    model = blueprint(config.pretrained_model_name_or_path)
    config = resolved(config, model, device="cuda")

    def plan(one: DreamBoothConfig) -> RunPlan:
        return plan_run(one, model)

    asked = plan(config).needed
    assert advise(config, model, plan, asked) is None
    advice = advise(config, model, plan, asked - 1)
    assert advice is not None and advice.fits and len(advice.changes) == 1
    assert advice.changes[0].settings == {"gradient_checkpointing": True}
    assert advice.plan.needed <= asked - 1
    nothing = advise(config, model, plan, 2**20)
    assert nothing is not None and not nothing.fits and nothing.plan.needed < asked


def test_the_changes_together_where_one_is_not_enough() -> None:
    """With plans made up: what each change takes off is known."""
    config = PlanConfig("sd15", train_batch_size=4, train_text_encoder=True, resolution=512, mixed_precision="no")
    asked: list[DreamBoothConfig] = []

    def plan(one: DreamBoothConfig) -> Any:
        asked.append(one)
        needed = 100 - 30 * one.gradient_checkpointing - 5 * (one.train_batch_size == 1)
        needed -= 40 * (one.mixed_precision == "fp16") + 2 * (not one.train_text_encoder)
        return type("Made", (), {"needed": needed, "peak": needed})()

    model: Any = type("Model", (), {"native": 512})()
    advice = advise(config, model, plan, 31)
    assert advice is not None and advice.fits
    assert [change.flags() for change in advice.changes] == ["--gradient_checkpointing", "--mixed_precision fp16"]
    assert len(set(asked)) == len(asked)  # none is planned twice


@pytest.mark.parametrize(
    ("gpu", "memory", "gib"),
    [
        ("t4", None, 14.56), ("T4", None, 14.56), ("RTX 3060", None, 11.76), ("NVIDIA GeForce RTX 4090", None, 23.64),
        (None, "6GB", 6.0), (None, "5632MiB", 5.5), (None, "7.5", 7.5),
    ],
)  # fmt: skip
def test_cards_and_sizes(gpu: str | None, memory: str | None, gib: float) -> None:
    card = card_of(gpu, memory)
    assert card is not None and card.memory == pytest.approx(gib * GIB, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": "rtx3061"}, "--gpu rtx3061 is not known; did you mean rtx3060"),
        ({"memory": "lots"}, "--memory lots is no size"),
        ({"memory": "0GB"}, "--memory 0GB is no size"),
        ({"gpu": "t4", "memory": "6GB"}, "give one of them"),
        ({"gpu": "t4", "device": "cpu"}, "--gpu is a card"),
        ({"train_batch_size": 0}, "--train_batch_size 0 is too small"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate_plan(PlanConfig("sd15", **settings))


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there is no model sd16; .* sd15, sd21, sdxl"):
        blueprint("sd16")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ConfigError, match="is a 'FluxPipeline'"):
        blueprint(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]}')
    (tmp_path / "unet").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"config\.json cannot be read"):
        blueprint(str(tmp_path))


def test_a_resolution_that_the_model_cannot_have(sd15: Blueprint) -> None:
    with pytest.raises(ConfigError, match="--resolution 510 is not a multiple of 8"):
        planned(sd15, resolution=510)
