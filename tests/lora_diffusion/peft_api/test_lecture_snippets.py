"""The lecture's code runs with its import line changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def snippets() -> ModuleType:
    path = Path(__file__).parents[3] / "examples" / "lecture" / "snippets.py"
    spec = importlib.util.spec_from_file_location("lecture_snippets", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts(snippets: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trainable, total = snippets.count_parameters()
    assert trainable == snippets.LECTURE_TRAINABLE == 2_359_296
    head = snippets.MT5_LARGE.vocab_size * snippets.MT5_LARGE.d_model
    assert total + head == snippets.LECTURE_TOTAL == 1_231_940_608
    said = capsys.readouterr().out
    assert "trainable params: 2,359,296 || all params: 975,825,920" in said and "= 1,231,940,608" in said


def test_the_rest_runs(snippets: ModuleType, tmp_path: Path) -> None:
    snippets.train_and_save(tmp_path)
    assert snippets.generate(tmp_path).shape[1] > 57
    snippets.learn_a_prompt(tmp_path)
