"""What the views share: folder, limits and jobs; and what draws and writes, loaded when it is first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from app.web.jobs import Jobs
from app.web.libraries import load_libraries
from app.web.limits import Limits, Place
from app.web.places import Workspace
from lora_diffusion.errors import ConfigError, LoraDiffusionError

if TYPE_CHECKING:
    from app.web.library import Library
    from app.web.pictures import Pictures
    from app.web.texts import Texts

MODELS = ("pocket", "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0")
TEXT_MODELS = ("pocket-gpt", "pocket-bert", "openai-community/gpt2", "google-bert/bert-base-uncased")
GPU_SECONDS = 60  # that one request has the GPU on ZeroGPU
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
        self._on_gpu = self._gpu()
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

    def compute(self, part: str, method: str, *asked: Any, **hooks: Any) -> Any:
        """What `pictures` or `texts` make of a request. On ZeroGPU that happens in a process which has the GPU for the
        time, where neither progress nor a wish to stop gets through.

        Args:
            part: pictures or texts; method: its name there.
            asked: the request, and what comes after it.
            hooks: on_progress, should_stop.
        """
        if self._on_gpu is not None:
            load_libraries()  # here, and to its end: a process that begins in the middle of it waits for ever
            found = self._on_gpu(part, method, asked)
            if isinstance(found, LoraDiffusionError):
                raise found
            return found
        return getattr(getattr(self, part), method)(*asked, **hooks)

    def _gpu(self) -> Callable[[str, str, tuple[Any, ...]], Any] | None:
        """On ZeroGPU, a function that has the GPU while it runs; its process knows all that this one knew."""
        if not self.place.zero_gpu:
            return None
        try:
            import spaces  # type: ignore[import-not-found]
        except ModuleNotFoundError:  # Hugging Face installs it there; elsewhere only the environment says ZeroGPU
            return None

        def compute(part: str, method: str, asked: tuple[Any, ...]) -> Any:
            try:
                return getattr(getattr(self, part), method)(*asked)
            except LoraDiffusionError as problem:  # as a value: of what is raised there, only the kind comes back
                return LoraDiffusionError(str(problem))

        return cast(Callable[[str, str, tuple[Any, ...]], Any], spaces.GPU(duration=GPU_SECONDS)(compute))

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
