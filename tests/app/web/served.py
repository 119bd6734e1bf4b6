"""The app as its users have it: a process that serves the page, with a folder of its own, until it is ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[3]
COMMAND = ("-m", "app.cli", "app")
STARTS = 180  # seconds at most, on a machine that does much else
_ADDRESS = re.compile(r"the page is at http://[^:/ ]+:(\d+)")
# What a developer's own shell may say, and what would reach the network.
_UNSET = ("SPACE_ID", "SYSTEM", "SPACES_ZERO_GPU", "LORA_DIFFUSION_TRAINING", "GRADIO_SERVER_PORT", "OAUTH_CLIENT_ID")
_SET = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}


def _hear_ctrl_c() -> None:
    """A shell's background jobs, and what they start, are deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Served:
    """An app in a process; what it says is in `log`. Runs are processes of their own, and outlive it.

    Args:
        root: folder of the app.
        command: what Python is given; None: `lora-diffusion app` on a free port and with this root.
        cwd: where it is started.
        environment: variables beside those of the tests.
    """

    def __init__(
        self, root: Path, *, command: Sequence[str] | None = None, cwd: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.port, self._cwd = root, free_port(), cwd
        self._command = list(command) if command else [*COMMAND, "--root", str(root), "--port", str(self.port)]
        self._environment = {name: value for name, value in os.environ.items() if name not in _UNSET}
        self._environment |= {**_SET, **(environment or {})}
        self._log = root.parent / f"{root.name}.log"
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Start and wait until the page answers."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._command], cwd=self._cwd, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, preexec_fn=_hear_ctrl_c,
            )  # fmt: skip
        wait_until(lambda: self._process.poll() is not None or _ADDRESS.search(self.log) is not None, STARTS)
        found = _ADDRESS.search(self.log)
        assert self._process.poll() is None and found, self.log
        self.port = int(found[1])

    def answer_seconds(self) -> float:
        """How long the page takes to be sent."""
        start = time.monotonic()
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            assert answer.status == 200 and b"gradio" in answer.read()
        return time.monotonic() - start

    def kill(self) -> None:
        """End the app as a power cut would; its runs go on."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(30)

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)

    def workers(self) -> list[psutil.Process]:
        """The processes of its runs."""
        return [process for process in psutil.process_iter() if _works_in(process, self.root / "runs")]

    def end(self) -> None:
        """End the app and all of its runs."""
        if self._process.poll() is None:
            self.kill()
        for process in self.workers():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def served(root: Path, **options: object) -> Iterator[Served]:
    """An app that is gone afterwards."""
    app = Served(root, **options)  # type: ignore[arg-type]
    try:
        yield app
    finally:
        app.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: Callable[[], bool], seconds: float, every: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so after {seconds:g} s"
        time.sleep(every)


def _works_in(process: psutil.Process, runs: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        there = bool(words) and runs in Path(words[-1]).parents
        return there and any(word.endswith("worker") for word in words) and process.status() != psutil.STATUS_ZOMBIE
    return False
