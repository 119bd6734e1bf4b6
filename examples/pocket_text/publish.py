"""Put the trained models where they are shipped from: python publish.py --work ~/pocket_text

Writes `bert/` and `gpt/` (what transformers' Auto classes load, weights in fp16) and `record/` (what the trainings
wrote).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

HERE = Path(__file__).parent
LIMIT = 8e6  # bytes of one model's weights
CLASSES = {"bert": AutoModelForMaskedLM, "gpt": AutoModelForCausalLM}


def publish(source: Path, name: str) -> int:
    """Write the model that lies in `source` into `<name>/` and return the bytes of its weights."""
    folder, partial = HERE / name, HERE / f"{name}.partial"
    CLASSES[name].from_pretrained(source).to(torch.float16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    # transformers takes the precision of a model from its config: it should compute in fp32 where nobody says otherwise
    _rewrite(partial / "config.json", without=("_name_or_path",), dtype="float32")
    _rewrite(partial / "tokenizer_config.json", without=("is_local", "local_files_only"))
    weights = partial / "model.safetensors"
    weights.chmod(0o644)
    size = weights.stat().st_size
    if size > LIMIT:
        raise SystemExit(
            f"{name} has {size / 1e6:.1f} MB of weights, more than the {LIMIT / 1e6:.0f} MB that may be shipped"
        )
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return size


def _rewrite(file: Path, without: tuple[str, ...], **changed: str) -> None:
    """A JSON file of facts without some of them and with others changed."""
    facts = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(facts | changed, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    (HERE / "record").mkdir(exist_ok=True)
    for name in CLASSES:
        size = publish(args.work / name / "model", name)
        shutil.copy(args.work / name / "record.jsonl", HERE / "record" / f"{name}.jsonl")
        print(f"{name}: {size / 1e6:.1f} MB of weights in {HERE / name}")


if __name__ == "__main__":
    main()
