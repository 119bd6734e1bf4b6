"""Ctrl-C and SIGTERM as a wish: the step is finished and saved, then the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopWish:
    """Context manager whose `__call__` says whether a stop was asked for. A second Ctrl-C stops at once.

    Outside the main thread, where signals cannot be caught, it never says so.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended because of this signal."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopWish:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        sys.stderr.write("\nstopping after this step; once more to stop at once\n")
