"""What the views share: folder, limits and jobs; and what draws and writes, loaded when it is first asked for."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

from app.web.jobs import Jobs
from app.web.libraries import load_libraries
from app.web.limits import Limits, Place
from app.web.places import Workspace
from lora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from app.web.library import Library
    from app.web.pictures import Pictures
    from app.web.texts import Texts

MODELS = ("pocket", "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0")
TEXT_MODELS = ("pocket-gpt", "pocket-bert", "openai-community/gpt2", "google-bert/bert-base-uncased")
_TEXTS = ("bert", "gpt", "t5", "llama", "qwen", "bloom")


class Context:
    """One app: its folder, limits and jobs.

    Args:
        model, text_model: what the page begins with.
    """

    def __init__(
        self, workspace: Workspace, place: Place | None = None, *, model: str = "pocket", text_model: str = "pocket-gpt"
    ) -> None:
        self.workspace, self.place = workspace, place or Place()
        self.limits: Limits = self.place.limits
        self.jobs = Jobs(workspace, self.limits, self.place)
        self.model, self.text_model = model, text_model
        self.stopped: set[str] = set()  # sessions that wish the drawing or writing that goes on to end

    @cached_property
    def library(self) -> Library:
        from app.web.library import Library

        return Library(self.workspace, self.limits)

    @cached_property
    def pictures(self) -> Pictures:
        from app.web.pictures import Pictures

        load_libraries()
        return Pictures(self.workspace, self.limits, self.library)

    @cached_property
    def texts(self) -> Texts:
        from app.web.texts import Texts

        load_libraries()
        return Texts(self.workspace, self.limits, self.library)

    @property
    def models(self) -> list[str]:
        """Base models for pictures that are offered."""
        return self._offered(self.model, MODELS, text=False)

    @property
    def text_models(self) -> list[str]:
        """Base models for text that are offered."""
        return self._offered(self.text_model, TEXT_MODELS, text=True)

    def _offered(self, first: str, others: tuple[str, ...], *, text: bool) -> list[str]:
        if self.limits.models is None:
            return list(dict.fromkeys((first, *others)))
        return [name for name in self.limits.models if any(word in name.lower() for word in _TEXTS) == text]

    def side(self, model: str) -> int:
        """The side in pixels that a model is trained at, as far as its name tells."""
        side = 64 if model == "pocket" else 1024 if "xl" in model.lower() else 512
        return min(side, self.limits.side)

    def owner(self, visitor: str | None) -> str | None:
        """Whose runs a visitor sees: None on one's own machine, where all runs are everybody's.

        Args:
            visitor: the secret that the visitor's browser, or a client, keeps.

        Raises:
            ConfigError: runs are private here, and no secret came along.
        """
        if not self.limits.private_runs:
            return None
        if not isinstance(visitor, str) or not 16 <= len(visitor) <= 200:
            raise ConfigError("runs are private here and this page has no key yet: load it again (a client gives key=)")
        return hashlib.sha256(visitor.encode()).hexdigest()[:32]
