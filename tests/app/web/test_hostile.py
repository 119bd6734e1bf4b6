"""Everything in `hostile.py` is sent once more: what becomes of it, and what does not happen on the way."""

from __future__ import annotations

import re
import resource
import tempfile
import time
from pathlib import Path

import pytest

from tests.app.web.hostile import CASES, DOCS, Case, Room, outcome, row

MOST_SECONDS = 10.0  # on a busy machine
MOST_MEMORY = 500 * 2**20  # bytes beyond what the process had before


@pytest.mark.parametrize("case", CASES, ids=[f"{case.where}: {case.what}"[:80] for case in CASES])
def test_case(case: Case, tmp_path: Path) -> None:
    room = Room(tmp_path)
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, said = outcome(case, room)
    assert time.monotonic() - start < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MOST_MEMORY
    assert refused == case.refused, said
    assert said.isprintable() and len(said) < 700, said
    assert str(room.root) not in said and ".new-" not in said and "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) in (["app", "files"], ["files"])
    assert not (Path(tempfile.gettempdir()) / "a-pickle-was-run").exists()
    left = [path for path in room.workspace.root.rglob("*") if path.is_file() and path.name.startswith(".new-")]
    assert left == []


def test_the_page_has_every_case() -> None:
    written = DOCS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (refused|taken) \|", written, re.MULTILINE)
    wanted = [re.findall(r"^\| (.+?) \| (refused|taken) \|", row(case, case.refused, ""))[0] for case in CASES]
    assert rows == wanted, "run `python -m tests.app.web.hostile`"
