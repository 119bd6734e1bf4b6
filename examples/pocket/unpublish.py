"""Make a work folder out of what is shipped, to train on from there: python unpublish.py --work ~/pocket

The weights come back rounded to fp16 and without the optimizer's state, which costs a few hundred steps at most. The
UNet's trainer starts from `unet-start/` where there is no checkpoint yet.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

MODEL = Path(__file__).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    AutoencoderKL.from_pretrained(MODEL / "vae").save_pretrained(args.work / "vae")
    UNet2DConditionModel.from_pretrained(MODEL / "unet").save_pretrained(args.work / "unet-start")
    CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).save_pretrained(
        args.work / "text_encoder"
    )
    shutil.copytree(MODEL / "tokenizer", args.work / "tokenizer")
    judge = MODEL.parent / "judge"
    shutil.copytree(judge, args.work / "judge")
    for record in (MODEL.parent / "record").glob("*.jsonl"):
        shutil.copy(record, args.work / record.name)


if __name__ == "__main__":
    main()
