"""What the comparisons share: finished runs are found again, intervals are Student's, a run is the recipe's."""

import json
import shutil
import sys
from pathlib import Path

import pytest

LECTURE = Path(__file__).resolve().parents[2] / "examples" / "lecture"
sys.path.insert(0, str(LECTURE))

import runs  # noqa: E402

from train.pocket_text import folder_of  # noqa: E402


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A copy of pocket-bert's folder, to be changed."""
    shutil.copytree(folder_of("pocket-bert"), tmp_path / "model")  # type: ignore[arg-type]
    return str(tmp_path / "model")


def test_finished_runs_are_found_by_another_process(tmp_path: Path, model: str) -> None:
    file = tmp_path / "results" / "some.json"
    one, other = runs.Results(file, model), runs.Results(file, model)
    one.add({"task": "a", "seed": 0}, {"test": 0.5})
    other.add({"task": "a", "seed": 1}, {"test": 0.25})
    assert one.find({"task": "a", "seed": 1}) == {"settings": {"task": "a", "seed": 1}, "test": 0.25}
    assert one.find({"task": "a", "seed": 2}) is None
    assert [run["test"] for run in one.runs()] == [0.5, 0.25]
    one.add({"task": "a", "seed": 0}, {"test": 1.0})
    assert sorted(run["test"] for run in other.runs()) == [0.25, 1.0]


def test_runs_of_other_weights_do_not_count(tmp_path: Path, model: str) -> None:
    file = tmp_path / "some.json"
    before = runs.Results(file, model)
    before.add({"seed": 0}, {"test": 0.5})
    weights = Path(model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(RuntimeError, match="has other weights"):
        before.add({"seed": 1}, {"test": 0.5})
    after = runs.Results(file, model)
    assert after.runs() == []
    after.add({"seed": 1}, {"test": 0.25})
    assert [run["settings"] for run in json.loads(file.read_text())["runs"]] == [{"seed": 1}]


def test_the_interval_is_students() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    values = [0.91, 0.95, 0.97, 0.9, 0.93]
    for count in range(2, 6):
        low, high = scipy_stats.t.interval(
            0.95, count - 1, loc=sum(values[:count]) / count, scale=scipy_stats.sem(values[:count])
        )
        found = runs.Interval.of(values[:count])
        assert found.mean - found.half == pytest.approx(low, abs=1e-4)  # type: ignore[operator]
        assert found.mean + found.half == pytest.approx(high, abs=1e-4)  # type: ignore[operator]
    assert runs.Interval.of([0.9]).percent() == "90.0"
    assert runs.Interval.of([0.9, 0.9]).percent() == "90.0 ± 0.0"


def test_shares_are_all_jobs_once() -> None:
    jobs = list(range(7))
    assert sorted(runs.share_of("1/3", jobs) + runs.share_of("2/3", jobs) + runs.share_of("3/3", jobs)) == jobs
    assert runs.share_of("1/1", jobs) == jobs


def test_a_table_takes_the_place_of_the_one_before() -> None:
    text = "above\n<!-- a: begin -->\n\nold\n\n<!-- a: end -->\nbelow"
    changed = runs.with_table(text, "a", "new\n")
    assert changed == text.replace("old", "new")
    assert runs.with_table(changed, "a", "new") == changed


def test_a_run_is_the_recipes_and_its_head_is_counted(tmp_path: Path) -> None:
    settings = {"method": "head", "seed": 0, "max_train_steps": 2, "learning_rate": 1e-3}
    found = runs.classify("pocket-bert", "topic", settings, keep=tmp_path / "kept.safetensors")
    assert found["learned"] == runs.head_parameters("pocket-bert", runs.labels_of("topic"))
    assert 0 <= found["test"] <= 1 and 0 <= found["validation"] <= 1
    assert (tmp_path / "kept.safetensors").stat().st_size > found["learned"]
