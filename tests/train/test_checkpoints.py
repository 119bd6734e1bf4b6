"""Checkpoints are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion import ConfigError
from train import checkpoints
from train.record import RunFolder, read_events


def fill(place: Path) -> None:
    (place / "state.json").write_text("{}")


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        checkpoints.write(tmp_path, step, fill, keep=2)
    assert list(checkpoints.steps_in(tmp_path)) == [6, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-6"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, 2, fill)

    def full(place: Path) -> None:
        fill(place)
        raise OSError(28, "No space left on device")

    for step in (2, 4):
        with pytest.raises(OSError, match="No space"):
            checkpoints.write(tmp_path, step, full)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_what_a_kill_leaves_behind_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".new-8").mkdir()
    (tmp_path / ".old-4").mkdir()
    (tmp_path / ".old-6").mkdir()
    (tmp_path / "step-6").mkdir()
    assert list(checkpoints.steps_in(tmp_path)) == [6]
    checkpoints.clean(tmp_path)
    assert list(checkpoints.steps_in(tmp_path)) == [4, 6]  # 4 was about to be replaced, and comes back
    assert len(list(tmp_path.iterdir())) == 2


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    assert checkpoints.find(tmp_path, "latest") is None
    for step in (9, 10):
        checkpoints.write(tmp_path, step, fill)
    newest = tmp_path / "step-10"
    assert checkpoints.find(tmp_path, "latest") == newest
    assert checkpoints.find(tmp_path, "checkpoint-10") == newest
    assert checkpoints.find(tmp_path, str(newest)) == newest
    with pytest.raises(ConfigError, match="step-9, step-10"):
        checkpoints.find(tmp_path, "step-11")


def test_a_torn_event_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "st')
    folder = RunFolder(tmp_path)
    folder.open({}, fresh=False)
    folder.emit("end")
    folder.close()
    assert [event["event"] for event in read_events(tmp_path / "events.jsonl")] == ["start", "end"]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 2


class TestDamage:
    def written(self, folder: Path) -> None:
        for step in (1, 2, 3):
            checkpoints.write(folder, step, lambda place: (place / "state.json").write_text("{}") and None)

    def test_latest_passes_over_what_is_damaged(self, tmp_path: Path) -> None:
        self.written(tmp_path)
        (tmp_path / "step-3" / "state.json").write_text("{ }")
        (tmp_path / "step-2" / "state.json").unlink()
        skipped: list[str] = []
        assert checkpoints.find(tmp_path, "latest", skipped) == tmp_path / "step-1"
        assert "step-3" in skipped[0] and "state.json is not what was written" in skipped[0]
        assert "step-2" in skipped[1] and "state.json is missing" in skipped[1]

    def test_a_named_one_is_refused(self, tmp_path: Path) -> None:
        self.written(tmp_path)
        (tmp_path / "step-3" / "state.json").write_text("{ }")
        for which in ("step-3", str(tmp_path / "step-3")):
            with pytest.raises(ConfigError, match=r"is damaged .* resume from another one"):
                checkpoints.find(tmp_path, which)

    def test_all_damaged_is_an_error_and_not_a_new_beginning(self, tmp_path: Path) -> None:
        self.written(tmp_path)
        for step in (1, 2, 3):
            (tmp_path / f"step-{step}" / "hashes.json").write_text("no")
        with pytest.raises(ConfigError, match=r"every checkpoint is damaged .* --overwrite"):
            checkpoints.find(tmp_path, "latest")

    def test_one_from_before_there_were_hashes(self, tmp_path: Path) -> None:
        self.written(tmp_path)
        (tmp_path / "step-3" / "hashes.json").unlink()
        assert checkpoints.find(tmp_path, "latest") == tmp_path / "step-3"
