"""The lecture's column of trainable parameters: ours, exactly, and the committed table is what the command writes."""

import sys
from pathlib import Path

import pytest

LECTURE = Path(__file__).resolve().parents[2] / "examples" / "lecture"
sys.path.insert(0, str(LECTURE))

import parameters  # noqa: E402

# Worked out by hand from the paper's formulas (section 5.1): what is in each table, in its order.
GLUE = [
    124_645_632,
    12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768 + 768,  # blocks, the embedding's norm, the pooler
    4 * (2 * 768 * 48 + 48 + 768),
    12 * (2 * 768 * 48 + 48 + 768),
    2 * 24 * 768 * 8,
    355_359_744,
    2 * 48 * 1024 * 8,
    24 * (2 * 1024 * 64 + 64 + 1024),
    24 * (2 * 1024 * 16 + 16 + 1024),
    48 * (2 * 1024 * 64 + 64 + 1024),
    48 * (2 * 1024 * 8 + 8 + 1024),
    2 * 48 * 1024 * 8,
    1_564_549_632,
    2 * 96 * 1536 * 16,
]
E2E = [
    354_823_168,
    24 * (2 * 1024 * 6 + 6 + 1024) + 2 * 24 * 1024,
    24 * (2 * 1024 * 224 + 224 + 1024) + 2 * 24 * 1024,
    48 * (2 * 1024 * 112 + 112 + 1024),
    2 * (12 * 1024**2 + 13 * 1024),
    24 * 1024 * 14,
    2 * 48 * 1024 * 4,
    774_030_080,
    36 * (2 * 1280 * 8 + 8 + 1280) + 2 * 36 * 1280,
    36 * (2 * 1280 * 248 + 248 + 1280) + 2 * 36 * 1280,
    36 * 1280 * 17,
    2 * 72 * 1280 * 4,
]


@pytest.fixture(scope="module")
def counted() -> dict[str, list[int]]:
    return {"GLUE": parameters.counts(parameters.GLUE), "E2E": parameters.counts(parameters.E2E)}


def test_the_counts_are_the_papers_formulas(counted: dict[str, list[int]]) -> None:
    assert counted == {"GLUE": GLUE, "E2E": E2E}


def test_every_digit_that_differs_has_its_reason(counted: dict[str, list[int]]) -> None:
    rows = [*zip(parameters.GLUE, counted["GLUE"]), *zip(parameters.E2E, counted["E2E"])]
    differ = [row for row, count in rows if not parameters.agrees(row, count)]
    assert all(row.reason for row in differ)
    assert len(differ) == 11 and len(rows) == 26


def test_the_committed_table_is_what_the_command_writes(
    counted: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "counts", lambda rows: counted["GLUE" if rows is parameters.GLUE else "E2E"])
    readme = parameters.README.read_text(encoding="utf-8")
    assert parameters.with_tables(readme, parameters.tables()) == readme


def test_nearby_sizes_do_not_reach_the_printed_digits() -> None:
    """What the remarks claim: no whole r gives Adapter^H's 11.09M, and 14 and 17 tokens come nearest to 0.1 %."""
    houlsby = [48 * (2 * 1024 * r + r + 1024) for r in range(1, 512)]
    assert not any(f"{count / 1e6:.2f}" == "11.09" for count in houlsby)
    assert min(houlsby, key=lambda count: abs(count - 11_090_000)) == E2E[3]
    for blocks, width, tokens, total in ((24, 1024, 14, 354_920_000), (36, 1280, 17, 774_030_000)):
        assert min(range(1, 99), key=lambda n: abs(blocks * width * n - total / 1000)) == tokens
    assert f"{(2 * 768 * 192 + 192 + 768) / 1e6:.1f}M" == "0.3M"
    assert [f"{(n * 24 * (2 * 1024 * 60 + 60 + 1024)) / 1e6:.1f}M" for n in (1, 2)] == ["3.0M", "6.0M"]
