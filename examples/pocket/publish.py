"""Put a training's results where they are shipped from: python publish.py --work ~/pocket

Writes `model/` (what StableDiffusionPipeline.from_pretrained loads, weights in fp16), `judge/`, `record/` (what the
trainings wrote) and `grid.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from grids import PROMPTS, assemble, sheet

HERE = Path(__file__).parent
LIMIT = 24e6  # bytes of all weights


def publish_model(work: Path, folder: Path) -> int:
    """Write the pipeline in fp16 and return the bytes of its weights."""
    pipe = assemble(work).to(torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # for readers that want CLIP's two files rather than tokenizer.json
        shutil.copy(work / "tokenizer" / name, folder / "tokenizer" / name)
    for part in ("unet", "vae"):  # where the weights lay while they were trained is nobody's business
        config = folder / part / "config.json"
        facts = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    # transformers takes the precision of a model from its config: without this line the text encoder alone would load
    # in fp16 where nobody asked for it.
    config = folder / "text_encoder" / "config.json"
    facts = json.loads(config.read_text())
    facts["dtype"] = "float32"
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    if size > LIMIT:
        raise SystemExit(
            f"the weights have {size / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB that may be shipped"
        )
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    size = publish_model(args.work, HERE / "model")
    if (args.work / "judge").exists():
        shutil.copytree(args.work / "judge", HERE / "judge", dirs_exist_ok=True)
    (HERE / "record").mkdir(exist_ok=True)
    for name in ("vae", "text", "unet", "judge"):
        if (args.work / f"{name}.jsonl").exists():
            shutil.copy(args.work / f"{name}.jsonl", HERE / "record" / f"{name}.jsonl")
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(HERE / "model")
    pipe.set_progress_bar_config(disable=True)
    prompts = [p for p in PROMPTS for _ in range(4)]
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators).images
    sheet(images, 8).save(HERE / "grid.png", optimize=True)
    print(f"weights {size / 1e6:.1f} MB in {HERE / 'model'}")


if __name__ == "__main__":
    main()
