"""The best step of a run: previews are judged as an evaluation judges, and the adapter of the best is kept.

The score (`train.metrics.score`) grows with the likeness to the photos up to that of the photos among themselves, falls
with prompts that are no longer followed, and with pictures that are copies of a photo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from train import metrics
from train.dreambooth_config import DreamBoothConfig
from train.encoders import Encoders, find_encoders
from train.evaluate_figures import Found, Reference, copies, figures
from train.evaluate_plan import plain_words
from train.preview import Preview
from train.record import RunFolder, read_events
from train.saving import BEST_FILE

_FOLLOWS_LESS = 0.9  # of what the best step reaches: prompts are being lost
_VARIES_LESS = 0.5  # of the photos' distance from each other: all pictures become one


def judges_of(config: DreamBoothConfig) -> Encoders | None:
    """The encoders that `--keep_best` needs, or None without it. Raises as `find_encoders`."""
    if not config.keep_best:
        return None
    return find_encoders(
        config.validation_image_encoder, config.validation_text_encoder, config.pretrained_model_name_or_path,
        flags=("--validation_image_encoder", "--validation_text_encoder"),
    )  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What the judges say of the previews of a step; a `score` event holds the same."""

    step: int
    score: float
    likeness: float
    prompt_following: float | None
    diversity: float | None
    copied: int


class Best:
    """Judges the previews of one run.

    Args:
        encoders: who judges.
        photos: of the subject.
        save: writes the adapter as it is now, as the best; called with the step and its scores.
    """

    def __init__(
        self, config: DreamBoothConfig, encoders: Encoders, photos: Iterable[Image.Image], preview: Preview,
        folder: RunFolder, save: Callable[[int, dict[str, Any]], Path],
    ) -> None:  # fmt: skip
        self._encoders, self._preview, self._folder, self._save = encoders, preview, folder, save
        self._plain = plain_words(preview.prompt, config.instance_prompt, config.class_prompt)
        self._photos = torch.cat([encoders.image.embed([photo]) for photo in photos])  # large ones, one at a time
        self._reference: Reference | None = None
        self._known: dict[int, Scores] = {}
        self._warned = False
        self.best: Scores | None = None

    @property
    def file(self) -> Path:
        return self._folder.path / BEST_FILE

    def begin(self, draw: Callable[[str], list[Image.Image]], start_step: int) -> None:
        """Judge the base model's pictures, and remember what an interrupted run found up to `start_step`.

        Args:
            draw: from a prompt to the base model's pictures at the previews' seeds.
        """
        pictures = draw(self._plain)
        if len(pictures) == self._preview.images:
            self._reference = Reference(self._photos, self._look(pictures), None)
        if start_step and self.file.is_file():
            for event in read_events(self._folder.events_file):
                if event["event"] == "score" and event["judged"] == self._judged and event["step"] <= start_step:
                    self._known[event["step"]] = Scores(**{name: event[name] for name in Scores.__annotations__})
        for scores in sorted(self._known.values(), key=lambda one: one.step):
            if self.best is None or scores.score > self.best.score:
                self.best = scores

    def missing(self, step: int, last_step: int) -> bool:
        """Whether a run was interrupted between the checkpoint of a step and the judging of its previews."""
        return step > 0 and self._preview.due(step, last_step) and step not in self._known

    def judge(self, step: int, files: Sequence[Path]) -> None:
        """Score the previews of a step; keep the adapter if there was no better one; tell what was found."""
        if self._reference is None or len(files) < self._preview.images:
            return  # stopped while drawing
        pictures = [_read(file) for file in files]
        scores = self._scored(step, pictures)
        before, self._known[step] = self.best, scores
        if before is None or scores.score > before.score:
            self._save(step, {name: getattr(scores, name) for name in Scores.__annotations__ if name != "step"})
            self.best, self._warned = scores, False
        values = {name: getattr(scores, name) for name in Scores.__annotations__}
        self._folder.emit("score", **values, best=self.best is scores, judged=self._judged, **self._scale())
        if before is not None and self.best is before and not self._warned:
            self._warn(scores, before)

    @property
    def _judged(self) -> str:
        """What scores of one kind have in common; those of another kind are not compared with."""
        names = self._encoders.names
        return (
            f"{self._preview.images} pictures of {self._preview.prompt!r} in {self._preview.steps} steps by "
            f"{names['image']} and {names['text']}"
        )

    def _look(self, pictures: list[Image.Image]) -> Found:
        embeddings = self._encoders.image.embed(pictures).unsqueeze(0)
        text = self._encoders.text
        follows = None if text is None else text.follows(pictures, [self._plain] * len(pictures))
        return Found({"subject": embeddings}, None if follows is None else follows.unsqueeze(0))

    def _scored(self, step: int, pictures: list[Image.Image]) -> Scores:
        assert self._reference is not None
        found = self._look(pictures)
        measured = figures(found, self._reference)
        copied = len(copies(found, self._photos))
        like, follow, varied = (measured[name] for name in ("likeness", "prompt_following", "diversity"))
        assert like is not None
        score = metrics.score(like, follow, copied / len(pictures))
        return Scores(step, round(score, 4), round(like.mean, 4), _mean(follow), _mean(varied), copied)

    def _scale(self) -> dict[str, float | None]:
        """The base model and the photos, between which the scores lie."""
        assert self._reference is not None
        base, among = self._reference.base, metrics.likeness_among(self._photos)
        floor = float(metrics.likeness(base.embeddings["subject"], self._photos).mean())
        follow = None if base.follows is None or bool(base.follows.isnan().any()) else float(base.follows.mean())
        values = {"likeness_floor": floor, "likeness_ceiling": among, "prompt_following_base": follow}
        return {name: None if value is None else round(value, 4) for name, value in values.items()}

    def _warn(self, now: Scores, best: Scores) -> None:
        among = metrics.likeness_among(self._photos)
        lost = []
        follows, followed = now.prompt_following, best.prompt_following
        if follows is not None and followed is not None and follows < _FOLLOWS_LESS * followed:
            lost.append(f"prompt following falls ({followed:.2f} to {follows:.2f})")
        apart, before = now.diversity, best.diversity
        least = None if among is None or before is None else min(before, _VARIES_LESS * (1 - among))
        if apart is not None and least is not None and apart < least:
            lost.append(f"the pictures become one ({before:.2f} to {apart:.2f} apart)")
        if now.copied > best.copied:
            lost.append(f"{now.copied} of {self._preview.images} pictures are copies of a photo")
        if lost and (now.likeness >= best.likeness or now.copied > best.copied):
            self._warned = True
            self._folder.emit(
                "warning",
                message=f"step {now.step} overfits: likeness goes from {best.likeness:.2f} to {now.likeness:.2f} while "
                f"{' and '.join(lost)}; {BEST_FILE} keeps step {best.step}",
            )


def _mean(figure: metrics.Figure | None) -> float | None:
    return None if figure is None else round(figure.mean, 4)


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
