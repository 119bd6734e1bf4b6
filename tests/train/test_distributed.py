"""Two processes on gloo, started as users start them, learn what one process learns with twice the batch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file

from lora_diffusion import ConfigError
from train.checkpoints import steps_in
from train.config import settings_of, to_dict
from train.distributed import ALONE, World, joined
from train.dreambooth import train
from train.dreambooth_checks import validate
from train.dreambooth_config import DreamBoothConfig
from train.record import read_events

Make = Callable[..., DreamBoothConfig]
REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
    "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "classes"
    folder.mkdir()
    for number in range(3):
        noise = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def settings(classes: Path) -> dict[str, Any]:
    """Adam's epsilon is large, so that gradients next to nothing do not turn rounding into steps."""
    return {
        "train_text_encoder": True, "with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 3,
        "class_data_dir": str(classes), "adam_epsilon": 1e-4, "max_train_steps": 4, "checkpointing_steps": 2,
    }  # fmt: skip


def start(launcher: list[str], config: DreamBoothConfig, *extra: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", *launcher, "-m", "app.cli", "dreambooth"]
    values = to_dict(config)
    for item in settings_of(DreamBoothConfig):
        if values[item.name] != item.default:
            words += [f"--{item.name}"] if item.kind is bool else [f"--{item.name}", str(values[item.name])]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, *extra], cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(launcher: list[str], config: DreamBoothConfig, *extra: str) -> tuple[Path, str]:
    """The run's folder and what was printed."""
    process = start(launcher, config, *extra)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return Path(config.output_dir), out + err


def assert_same_adapter(one: Path, other: Path) -> None:
    first, second = load_file(one / "adapter.safetensors"), load_file(other / "adapter.safetensors")
    assert first.keys() == second.keys() and len(first) > 40
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_two_processes_learn_what_one_does_with_twice_the_batch(make_config: Make, settings: dict) -> None:
    """And with accumulation; one of the two writes and speaks."""
    one = train(make_config("one", **settings, train_batch_size=4))
    config = make_config("two", **settings, gradient_accumulation_steps=2)
    folder, said = run(ACCELERATE, config)
    assert_same_adapter(one.output_dir, folder)
    events = read_events(folder / "events.jsonl")
    assert events[0]["processes"] == 2
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    losses = [[e["loss"] for e in read_events(f / "events.jsonl") if e["event"] == "step"]
              for f in (one.output_dir, folder)]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert list(steps_in(folder / "checkpoints")) == [2, 4]
    assert said.count("adapter: ") == 1 and said.count("training on 3 photos") == 1


def test_a_base_in_parts(make_config: Make, settings: dict) -> None:
    """FSDP2 with checkpointing: the adapter, the fingerprint of the base and the previews are the same."""
    seen = {"validation_prompt": "x", "num_validation_images": 1, "validation_inference_steps": 1}
    one = train(make_config("one", **settings, **seen, train_batch_size=2))
    config = make_config("two", **settings, **seen, fsdp=True, gradient_checkpointing=True)
    folder, _ = run(TORCHRUN, config)
    assert_same_adapter(one.output_dir, folder)
    notes = [e["message"] for e in read_events(folder / "events.jsonl") if e["event"] == "note"]
    sizes = [match for note in notes if (match := re.search(r"keeps ([\d.]+) of ([\d.]+) MiB", note))]
    assert len(sizes) == 1 and 0.4 < float(sizes[0][1]) / float(sizes[0][2]) < 0.6
    first, second = (base_of(f / "adapter.safetensors") for f in (one.output_dir, folder))
    assert first == second and first["unet"]["values"]
    pictures = [sorted(path.name for path in (f / "samples").iterdir()) for f in (one.output_dir, folder)]
    assert pictures[0] == pictures[1] and pictures[0]


def base_of(file: Path) -> dict[str, Any]:
    import lora_diffusion as ld

    return ld.read_adapter(file).bases


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"fsdp": True, "fsdp_cpu_offload": True, "use_dora": True},
        {"fsdp": True, "prior_mode": "teacher", "class_data_dir": None, "placeholder_token": "sks", "num_vectors": 2},
        {"instance_data_dir": "rich", "aspect_ratio_buckets": "auto", "noise_offset": 0.1, "input_perturbation": 0.1},
        {"mixed_precision": "fp16", "train_text_encoder": False},
        {"class_data_dir": None, "prior_generation_steps": 1, "sample_batch_size": 1, "scale_lr": True},
    ],
    ids=["offload", "word", "buckets", "fp16", "class pictures"],
)
def test_other_ways_to_learn(make_config: Make, settings: dict, changes: dict, request: Any) -> None:
    changes = {**settings, **changes}
    if changes.get("instance_data_dir") == "rich":
        changes["instance_data_dir"] = str(request.getfixturevalue("rich"))
    alone = {**changes, "fsdp": False, "fsdp_cpu_offload": False, "train_batch_size": 2}
    one = train(make_config("one", **alone))
    folder, _ = run(TORCHRUN, make_config("two", **changes))
    if changes.get("mixed_precision") == "fp16":  # rounds to 11 bits, and not the same for other batches
        first, second = (load_file(f / "adapter.safetensors") for f in (one.output_dir, folder))
        assert max(float((first[name] - second[name]).abs().max()) for name in first) < 2e-3
        return
    assert_same_adapter(one.output_dir, folder)
    if changes["class_data_dir"] is None and "prior_mode" not in changes:
        for name in ("class_0000.png", "class_0001.png", "class_0002.png"):
            drawn = [(f / "class_images" / name).read_bytes() for f in (one.output_dir, folder)]
            assert drawn[0] == drawn[1]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["whole", "parts"])
def test_stopped_and_resumed(make_config: Make, settings: dict, fsdp: bool) -> None:
    """SIGTERM to the launcher saves and ends; going on gives the bytes of a run that was never stopped."""
    settings = {**settings, "max_train_steps": 150, "lora_dropout": 0.2, "fsdp": fsdp, "checkpointing_steps": 1000}
    whole, _ = run(TORCHRUN, make_config("whole", **settings))
    config = make_config("parts", **settings)
    folder = Path(config.output_dir)
    process = start(TORCHRUN, config)
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "error" not in err.split("Traceback")[0], err  # what comes after is the launcher's own
    stopped = list(steps_in(folder / "checkpoints"))
    assert len(stopped) == 1 and 3 <= stopped[0] < 150
    assert read_events(folder / "events.jsonl")[-1]["stopped"] is True
    assert f"stopped after step {stopped[0]}" in out
    run(TORCHRUN, replace(config, resume_from_checkpoint="latest"))
    assert (folder / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    events, deadline = folder / "events.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if events.is_file() and f'"step": {step},' in events.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()}")


@pytest.mark.slow
def test_resumed_by_another_number_of_processes(make_config: Make, settings: dict) -> None:
    """With as many pictures in a step the run goes on; with others it is refused."""
    whole = train(make_config("whole", **settings, train_batch_size=2))
    config = make_config("two", **settings)
    folder, _ = run(TORCHRUN, config)
    again = replace(config, resume_from_checkpoint="step-2")
    with pytest.raises(ConfigError, match=r"made by 2 processes with 2 pictures in a step, with 1 there are 1"):
        train(again)
    train(replace(again, train_batch_size=2))
    assert_same_adapter(whole.output_dir, folder)


@pytest.mark.slow
def test_a_process_that_fails_takes_the_others_with_it(make_config: Make, settings: dict, photos: Path) -> None:
    """Process 1 finds other photos than process 0: both end, and say why."""
    config = make_config("two", **settings)
    code = (
        "import os, sys; from app.cli import main; rank = os.environ['RANK']\n"
        "sys.argv[1:] = [word.replace('seed3', '3' + rank) for word in sys.argv[1:]]; sys.exit(main())"
    )
    script = Path(config.output_dir).parent / "start.py"
    script.write_text(code)
    words = [
        "dreambooth", "--model", config.pretrained_model_name_or_path, "--instance_data_dir", str(photos),
        "--instance_prompt", "a photo of sks dog", "--output_dir", config.output_dir, "--seed", "seed3",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(script), *words], cwd=REPOSITORY, env=environment, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "differ in --seed (30, 31)" in done.stderr
    assert not (Path(config.output_dir) / "events.jsonl").exists()


def exchange(rank: int, folder: str) -> None:
    """What two processes say to each other; the first writes down what it heard."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with joined(torch.device("cpu")) as world:
        both, one, none, resting = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(4))
        both.grad = torch.full((2, 3), 1.0 + rank)
        if rank:
            one.grad = torch.ones(2, 3)
        resting.requires_grad_(False)
        mean = world.average([both, one, none, resting], torch.tensor(2.0 * rank))
        heard = {"mean": mean, "both": both.grad, "one": one.grad, "none": none.grad, "resting": resting.grad,
                 "any": (world.any(bool(rank)), world.any(False))}  # fmt: skip
        world.agree({"this": 1})
        try:
            world.agree({"this": 1, "that": rank})
        except ConfigError as problem:
            heard["problem"] = str(problem)
        torch.save(heard, f"{folder}/{rank}.pt")
    os._exit(0)


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    mp.spawn(exchange, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        heard = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert heard["mean"] == 1.0 and heard["any"] == (True, False)
        assert torch.equal(heard["both"], torch.full((2, 3), 1.5))
        assert torch.equal(heard["one"], torch.full((2, 3), 0.5))
        assert heard["none"] is None and heard["resting"] is None
        assert "processes 0 and 1 of this run differ in that (0, 1)" in heard["problem"]


def test_alone_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient = torch.ones(2)
    loss = torch.tensor(3.0)
    assert ALONE.average([parameter], loss) is loss and parameter.grad is gradient
    assert ALONE.main and ALONE.any(True) and not ALONE.any(False)
    with joined(torch.device("cpu")) as world:
        assert world is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined(torch.device("cpu")) as world:
        assert world is ALONE and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("said", "device", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "cpu", "make no sense"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "cpu", "make no sense"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "mps", "several processes need CUDA"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "99", "MASTER_ADDR": "127.0.0.1"}, "cuda", "no GPU of its own"),
    ],
)
def test_what_a_launcher_says_wrong(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], device: str, message: str
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), joined(torch.device(device)):
        pass


def test_settings_that_do_not_go_together(make_config: Make) -> None:
    with pytest.raises(ConfigError, match="--fsdp_cpu_offload needs --fsdp"):
        validate(make_config(fsdp_cpu_offload=True))
    with pytest.raises(ConfigError, match="quantised base"):
        validate(make_config(fsdp=True, quantize="int8"))
    with pytest.raises(ConfigError, match="--fsdp needs a launcher"):
        train(make_config(fsdp=True))


def test_a_process_has_its_own_positions() -> None:
    from train.loop import LoopSettings, _accumulate

    class Kept:
        def backward(self, loss: torch.Tensor) -> None:
            pass

    found = {}
    for rank in (0, 1):
        seen: list[int] = []

        def losses(position: int, seen: list[int] = seen) -> list[torch.Tensor]:
            seen.append(position)
            return [torch.tensor(1.0)]

        for step in (1, 2):
            _accumulate(losses, Kept(), LoopSettings(2, 0, accumulation=2), step, World(rank, 2))
        found[rank] = seen
    assert found == {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}
