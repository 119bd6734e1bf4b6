"""One text run, from prepared settings to files: what happens in which order, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lora_diffusion as ld
from train import running
from train.distributed import ALONE, World, digest
from train.learner import Learner
from train.memory import MemoryMeter
from train.record import RunFolder
from train.running import seconds_since
from train.shards import shard
from train.text_batches import Batches
from train.text_config import TextConfig
from train.text_data import TextData, evaluate
from train.text_learn import BatchLoss, build_learner, computing, task_loss
from train.text_metrics import generation_metrics
from train.text_models import checkpoint_activations
from train.text_packing import Packed, check_packing, collate_packed
from train.text_parts import TextParts
from train.text_save import TextSaver
from train.text_tasks.task import Batch, Task
from train.text_validation import Validation
from train.trackers import Trackers

PREVIEWS = 2  # rows that are shown before training


@dataclass(frozen=True)
class Result(running.Result):
    """What a run left behind: `train.running.Result`, and figures: {"validation": {name: value}, "test": …}."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)


class TextRun(running.Running):
    """One call of `train.text.train`, after everything that could be refused has been checked.

    Args:
        new: the modules that the task has of its own, see `train.text_models.new_modules`.
    """

    saver: TextSaver

    def __init__(
        self, config: TextConfig, model: Any, new: list[str], parts: TextParts, folder: RunFolder, saver: TextSaver,
        device: torch.device, meter: MemoryMeter, should_stop: Callable[[], bool], world: World = ALONE,
    ) -> None:  # fmt: skip
        super().__init__(config, folder, saver, device, meter, should_stop, world)
        self.model, self.parts, self.new = model, parts, new
        self.validation: Validation | None = None
        if parts.validation is not None:
            self.validation = Validation(
                config, config.metric_for_best or parts.task.best_by, lambda: self._measure(parts.validation), folder,
                saver.save_best,
            )  # fmt: skip

    def go(self, checkpoint: Path | None, tracking: Trackers, started: float) -> Result:
        config, folder, parts = self.config, self.folder, self.parts
        start_step = 0 if checkpoint is None else self.saver.step_of(checkpoint)
        learned, total = self._parameters()
        folder.emit(
            "start", recipe="text", model=config.pretrained_model_name_or_path, task=config.task, method=config.method,
            rows=len(parts.train.examples), device=str(self.device), precision=config.mixed_precision,
            max_steps=self.last_step, learned_parameters=learned, model_parameters=total,
            resumed_from=start_step or None, torch=torch.__version__,
            **({"processes": self.world.size} if self.world.size > 1 else {}),
        )  # fmt: skip
        self.say_how_it_begins(checkpoint)
        if self.new:
            listed = ", ".join(self.new[:4]) + (", …" if len(self.new) > 4 else "")
            if config.train_head:
                folder.emit("note", message=f"the task's own layers are learned as a whole: {listed}")
            else:
                folder.emit("warning", message=f"the task's own layers, {listed}, are not learned: --no_train_head")
        for part, data in parts.all().items():
            folder.emit("note", message=f"{part} on {data.describe()}")
            for remark in data.remarks:
                folder.emit("warning", message=remark)
        folder.emit("preview", rows=parts.train.previews(PREVIEWS))
        batches = self._batches()
        planned = self._plan(batches)
        learner = build_learner(config, self.model)
        if checkpoint is not None:
            learner.load(checkpoint)
        if config.fsdp:
            kept, whole = shard(self.model, ["model"], self.device, cpu_offload=config.fsdp_cpu_offload)
            words = f"each of {self.world.size} processes keeps {kept / 2**20:.2f} of {whole / 2**20:.2f} MiB"
            folder.emit("note", message=f"the frozen base is in parts: {words}")
        if self.world.size > 1:
            first = digest(learner.parameters)
            self.world.agree({"the rows": self.saver.fingerprint, "the adapter's first values": first})
        if self.validation is not None:
            self.validation.begin(start_step)
            if self.world.any(self.validation.missing(start_step, self.last_step)):
                self._validate(start_step, learner)
        loss = BatchLoss(config, self.model, parts.task, batches, self.device)
        end, seconds = self.take_steps(loss, learner, start_step, tracking)
        self.save_result(end.step, learner)
        figures = {} if end.stopped else self._figures(learner)
        if self.world.main:
            with learner.averaged():
                self._save_peft()
            if figures:
                self.saver.save_metrics({"step": end.step, **figures})
            self.saver.save_card(end.step, figures, (learned, total))
        best = self.validation if self.validation is not None and config.keep_best else None
        result = Result(
            folder.path, folder.adapter_file, end.step, self.mean_loss(), end.stopped, seconds,
            seconds_since(started), self.meter.peak(), best=None if best is None else best.file,
            best_step=None if best is None else best.best_step, figures=figures,
        )  # fmt: skip
        self.finish(result, end.skipped, planned)
        return result

    def watch(self, step: int, learner: Learner) -> None:
        if self.validation is not None and self.validation.due(step, self.last_step):
            self._validate(step, learner)

    def show(self, step: int, learner: Learner) -> None:
        """Measure what a validation measures, unless that was just done. For the best step it does not count."""
        if self.validation is None:
            self.folder.emit("note", message="there is nothing to judge by: no validation was given")
            return
        if self.validation.due(step, self.last_step):
            return
        if self._measures():
            with learner.averaged():
                figures = self._measure(self.parts.validation)
            self.folder.emit("metrics", part="asked", step=step, figures=figures)
        self.world.wait()

    def enough(self) -> bool:
        """Process 0 knows the figures."""
        if self.config.early_stopping_patience is None or self.validation is None:
            return False
        return self.world.any(self.validation.enough())

    def set_training(self, mode: bool) -> None:
        self.model.train(mode)
        if mode and self.config.gradient_checkpointing:
            checkpoint_activations(self.model)

    def _validate(self, step: int, learner: Learner) -> None:
        """Process 0 judges, or all of them where each has but a part of the model."""
        assert self.validation is not None
        if self._measures():
            with learner.averaged():
                self.validation.judge(step)
        self.world.wait()

    def _measures(self) -> bool:
        return self.world.main or self.config.fsdp

    def _measure(self, data: TextData | None) -> dict[str, float]:
        assert data is not None, "asked for where there is one"
        config = self.config
        with computing(config, self.device):
            found = evaluate(
                self.model, self.parts.task, data.examples,
                batch_size=config.validation_batch_size or config.train_batch_size,
            )  # fmt: skip
        return {name: round(value, 6) for name, value in found.items()}

    def _figures(self, learner: Learner) -> dict[str, dict[str, float]]:
        """Of the result, the best step's where it is kept: validation and test, and what a language model writes."""
        found: dict[str, dict[str, float]] = {}
        if self.validation is not None and self.validation.best is not None:
            found["validation"] = {"step": float(self.validation.best_step or 0), **self.validation.best}
        test = self.parts.test
        judged = test or self.parts.validation
        if judged is not None and self._measures() and (test is not None or self.config.generate_answers):
            with learner.averaged(), self._best_in_place():
                if test is not None:
                    found["test"] = self._measure(test)
                    self.folder.emit("metrics", part="test", step=self.last_step, figures=found["test"])
                if self.config.generate_answers:
                    found["written"] = self._written(judged)
                    self.folder.emit("metrics", part="written", step=self.last_step, figures=found["written"])
        self.world.wait()
        return found

    def _written(self, data: TextData) -> dict[str, float]:
        """What the model writes for each prompt, beside all answers that the rows have for this prompt."""
        task: Any = self.parts.task
        answers: dict[tuple[int, ...], list[str]] = {}
        asked: dict[tuple[int, ...], Any] = {}
        for example in data.examples:
            prompt = tuple(task.prompt_ids(example))
            answers.setdefault(prompt, []).append(str(example.reference))
            asked.setdefault(prompt, example)
        size = self.config.validation_batch_size or self.config.train_batch_size
        examples, written = list(asked.values()), []
        self.model.eval()
        for start in range(0, len(examples), size):
            with computing(self.config, self.device):
                written += task.generate(
                    self.model, examples[start : start + size], max_new_tokens=self.config.max_new_tokens
                )
        return {name: round(value, 6) for name, value in generation_metrics(written, list(answers.values())).items()}

    def _best_in_place(self) -> Any:
        from train.text_best import in_place

        best = self.validation.file if self.validation is not None and self.config.keep_best else None
        return in_place(self.model, best)

    def _batches(self) -> Batches:
        config, parts = self.config, self.parts
        if parts.packs is not None:
            check_packing(self.model, parts.task)
            count = len(parts.train.examples)
            self.folder.emit("note", message=f"{count:,} rows to learn from share {len(parts.packs):,}")
        return Batches(
            parts.task, parts.packs or parts.train.examples, batch_size=config.train_batch_size, seed=config.seed,
            group=config.gradient_accumulation_steps * self.world.size, by_length=config.group_by_length,
            multiple=8 if self.device.type == "cuda" else 1,
        )  # fmt: skip

    def _parameters(self) -> tuple[int, int]:
        """How many are learned, and how many the model has of its own."""
        learned = {id(p): p.numel() for ps in ld.adapter_parameters(self.model).values() for p in ps}
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in learned)
        return sum(learned.values()), total

    def _save_peft(self) -> None:
        if not self.config.save_peft:
            return
        why = self.saver.save_peft()
        if why is not None:
            self.folder.emit("note", message=f"no folder for PEFT: {why.partition(': not written, ')[2] or why}")

    def _plan(self, batches: Batches) -> int | None:
        """Say how much memory the run will take; the end says how much it was. Of a base in parts, nothing is known."""
        if not self.config.plan or not self.world.main or self.config.fsdp:
            return None
        from train.text_plan import longest, plan_of_text_run

        config, task, parts = self.config, self.parts.task, self.parts
        size = config.validation_batch_size or config.train_batch_size
        judged = parts.validation or parts.test
        try:
            plan = plan_of_text_run(
                config, self.model, self.device, self.meter,
                loss=partial(task_loss, config, task, self.device),
                batch=_collated(longest(batches.examples, config.train_batch_size), task),
                validation=None if judged is None else task.collate(longest(judged.examples, size)),
            )  # fmt: skip
        except Exception as problem:  # a run is not to fail for want of an estimate
            what = " ".join(str(problem).split())[:200]
            self.folder.emit("warning", message=f"its memory cannot be planned: {type(problem).__name__}: {what}")
            return None
        self.folder.emit("plan", **plan.to_dict())
        return int(plan.peak)


def _collated(chosen: list[Any], task: Task) -> Batch:
    packed = isinstance(chosen[0], Packed)
    return collate_packed(chosen, task) if packed else task.collate(chosen)
