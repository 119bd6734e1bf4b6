"""The frozen model with a learned head: what is learned are the modules of `modules_to_save`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from .config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig(MethodConfig):
    """Nothing but `modules_to_save`: a linear probe, where that is the classifier. Raises ConfigError without any."""

    kind: ClassVar[str] = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save is None:
            raise ConfigError("modules_to_save names no module: a head that is learned alone has to be named")
