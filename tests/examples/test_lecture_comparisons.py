"""The lecture's comparisons: equation 4, templates around wordings, equal budgets, and the committed figures."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

LECTURE = Path(__file__).resolve().parents[2] / "examples" / "lecture"
sys.path.insert(0, str(LECTURE))

import methods  # noqa: E402
import plots  # noqa: E402
import prompts  # noqa: E402
import runs  # noqa: E402
import subspaces  # noqa: E402
import weights_and_ranks  # noqa: E402

from train.text_models import load_text_model, load_tokenizer  # noqa: E402


def test_similarity_is_equation_4() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 20), torch.randn(5, 20)
    found = subspaces.similarity(a, b)
    for i in range(1, 4):
        for j in range(1, 6):
            u, v = torch.linalg.svd(a.double())[2][:i].T, torch.linalg.svd(b.double())[2][:j].T
            assert float(found[i - 1, j - 1]) == pytest.approx(float((u.T @ v).norm() ** 2) / min(i, j), abs=1e-9)


def test_similarity_of_the_same_and_of_nothing_in_common() -> None:
    both = torch.eye(8)
    assert torch.allclose(subspaces.similarity(both[:4], both[:4]).diagonal(), torch.ones(4).double())
    assert float(subspaces.similarity(both[:4], both[4:]).max()) < 1e-12


def test_chance_is_the_mean_of_random_subspaces() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([subspaces.similarity(torch.randn(3, 24), torch.randn(6, 24)) for _ in range(300)])
    assert torch.allclose(drawn.mean(0).float(), subspaces.by_chance(3, 6, 24), atol=0.02)


@pytest.mark.parametrize(
    ("wording", "masked", "causal"),
    [
        ("{x} is from {y} .", "{x} {P:3} is from {P:3} {mask} .", "{x} {P:3} is from {P:3}"),
        ("the home of {x} is in {y} .", "the home of {P:3} {x} {P:3} is in {P:3} {mask} .",
         "the home of {P:3} {x} {P:3} is in {P:3}"),
        ("in {y} lives {x} .", "in {P:3} {mask} {P:3} lives {P:3} {x} {P:3} .", None),
    ],
)  # fmt: skip
def test_virtual_tokens_stand_at_the_borders_of_the_words(wording: str, masked: str, causal: str | None) -> None:
    assert prompts.template_of(wording, 3, True) == masked
    assert prompts.template_of(wording, 0, True) == wording.replace("{y}", "{mask}")
    if causal is None:
        with pytest.raises(ValueError, match="comes before the subject"):
            prompts.template_of(wording, 3, False)
    else:
        assert prompts.template_of(wording, 3, False) == causal


@pytest.mark.parametrize("name", list(prompts.CLASSES))
def test_words_alone_are_asked_as_one_would(name: str) -> None:
    tokenizer = load_tokenizer(name)
    model, _ = load_text_model(name, prompts.CLASSES[name], {}, seed=0)
    rows, wording, masked = prompts.facts("test")[:12], prompts.FREQUENT, name == "pocket-bert"
    found = prompts.encode(tokenizer, prompts.template_of(wording, 0, masked), rows, [])
    right = 0
    for row, logits in zip(rows, found.logits(model).detach()):
        before = wording.partition("{y}")[0].strip().replace("{x}", row["subject"])
        text = f"{before} {tokenizer.mask_token} ." if masked else f"{tokenizer.eos_token} {before}"
        ids = tokenizer(text, return_tensors="pt").input_ids
        place = ids[0].tolist().index(tokenizer.mask_token_id) if masked else -1
        alone = model(input_ids=ids).logits[0, place].detach()
        torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-4)
        right += tokenizer.decode(int(alone.argmax())).strip() == row["answer"]
    assert found.precision(model) == pytest.approx(right / len(rows))


@pytest.mark.parametrize("name", list(prompts.CLASSES))
def test_p_tuning_learns_and_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(name)
    model, _ = load_text_model(name, prompts.CLASSES[name], {}, seed=0)
    few: dict[str, list[dict[str, str]]] = {part: prompts.facts(part)[:32] for part in ("train", "validation", "test")}
    monkeypatch.setattr(prompts, "facts", lambda part: few[part])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = prompts.p_tuning(model, tokenizer, prompts.WORDINGS[0], seed=0, epochs=2)
    assert found == {**prompts.p_tuning(model, tokenizer, prompts.WORDINGS[0], seed=0, epochs=2),
                     "seconds": found["seconds"]}  # fmt: skip
    width = model.config.hidden_size
    lstm = 2 * 2 * 4 * (width // 2) * (width + width // 2 + 2)
    assert found["learned"] == 6 * width + lstm + 2 * (width * width + width)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())


def test_subjects_are_in_one_part_only() -> None:
    parts = [{row["subject"] for row in prompts.facts(part)} for part in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) and min(map(len, parts)) >= 80


def test_the_rate_is_the_best_on_validation_rows(tmp_path: Path) -> None:
    results = runs.Results(tmp_path / "methods.json", methods.MODEL)
    method = methods.LORA
    for rate, validation in zip(method.rates, (0.5, 0.9, 0.9)):
        assert methods.rate_of(method, "topic", results) is None
        settings = {"task": "topic", **methods.settings_of(method, "topic", rate, 0)}
        results.add(settings, {"validation": validation, "validation_loss": rate, "test": 1 - validation})
    assert methods.rate_of(method, "topic", results) == method.rates[1]


def test_pictures_are_drawn(tmp_path: Path) -> None:
    points = [plots.Point("a", "one", 1, 50.0, 4.0), plots.Point("b", "two", 1e6, 90.0)]
    drawn = [
        plots.scatter("title", "under", points, x="x", y="y"),
        plots.bars("title", "under", [("group", [plots.Bar("a", 20.0, 3.0), plots.Bar("b", 99.0, 5.0)])], y="y"),
        plots.heat_maps("title", "under", [[plots.Map("m", [[0.0, 1.0]], "i", "j")]]),
    ]
    for picture in drawn:
        assert len(picture.getcolors(1 << 24) or []) > 10


COMMITTED: dict[str, Any] = {
    "methods": (methods, "methods.json", methods.MODEL),
    "weights_and_ranks": (weights_and_ranks, "weights_and_ranks.json", weights_and_ranks.MODEL),
    "prompts-gpt": (prompts, "prompts-gpt.json", "pocket-gpt"),
    "prompts-bert": (prompts, "prompts-bert.json", "pocket-bert"),
    "subspaces": (subspaces, "subspaces.json", subspaces.MODEL),
}


@pytest.mark.parametrize("name", list(COMMITTED))
def test_the_committed_table_is_of_the_shipped_model_and_what_the_command_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, file, model = COMMITTED[name]
    results = runs.Results(runs.RESULTS / file, model)
    assert results.read()["weights"] == results.weights
    written = (runs.RESULTS / f"{name}.md").read_text(encoding="utf-8")
    readme: list[str] = []
    chosen = weights_and_ranks.rate()
    monkeypatch.setattr(weights_and_ranks, "rate", lambda: chosen)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "put_into_readme", lambda name, text: readme.append(text))
    module.write(results)
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == written
    assert readme[0].strip() in runs.README.read_text(encoding="utf-8")


def test_one_budget_for_all_weights() -> None:
    results = runs.Results(runs.RESULTS / "weights_and_ranks.json", weights_and_ranks.MODEL)
    own = {line.choice.name: line.own for line in weights_and_ranks.lines(results, weights_and_ranks.WEIGHTS)}
    mlp = own.pop("all, with the MLP")
    assert len(own) == 6 and len(set(own.values())) == 1
    assert mlp * 8 == next(iter(own.values())) * 9
