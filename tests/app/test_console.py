"""What a run looks like, and how it is asked to stop."""

from __future__ import annotations

import io
import os
import signal

import pytest

from app.console import Console, _clock
from app.signals import StopWish


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(console: Console, count: int) -> None:
    for step in range(1, count + 1):
        console({"event": "step", "step": step, "max_steps": count, "loss": 1.0 / step, "speed": 2.0})


def test_plain_lines_without_a_terminal() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err)
    steps(console, 5)
    console({"event": "warning", "message": "careful"})
    console({"event": "end"})
    console({"event": "something new"})
    assert err.getvalue().startswith("training 5/5, loss 0.") and "2.00 steps/s" in err.getvalue()
    assert err.getvalue().count("\n") == 1 and out.getvalue() == "warning: careful\n"


def test_one_bar_in_a_terminal() -> None:
    out, err = io.StringIO(), Terminal()
    console = Console(out, err)
    console({"event": "prepare", "what": "photos encoded", "done": 3, "total": 3})
    steps(console, 4)
    console.close()
    assert "loss" in err.getvalue() and "4/4" in err.getvalue() and "photos encoded" in err.getvalue()


def test_a_skipped_step_has_no_loss() -> None:
    console = Console(io.StringIO(), io.StringIO())
    console({"event": "step", "step": 1, "max_steps": 1, "loss": None})


def test_times() -> None:
    assert (_clock(5), _clock(65), _clock(3700)) == ("0:05", "1:05", "1:01:40")


def test_the_first_signal_is_a_wish_and_the_second_an_order() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopWish() as stop:
        assert not stop() and stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is before
