"""Write the labelled data: python write_data.py

`data/<task>/{train,validation,test}.jsonl`, the same bytes every time.
"""

from __future__ import annotations

import json
from pathlib import Path

from textworld.labelled import SIZES, splits

DATA = Path(__file__).parent / "data"


def main() -> None:
    for task in [*SIZES, "facts"]:
        folder = DATA / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits(task).items():
            (folder / f"{split}.jsonl").write_text(
                "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
            )
            print(f"{task}/{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
