"""How much of 500 held-out captions does pocket draw? python evaluate.py --work ~/pocket --out evaluation.json

The judge reads three sets of pictures of the same scenes: true renders, true renders through the autoencoder, and what
the model draws from the caption. Only what the caption says is asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from training import machine
from world import Scene, caption, held_out, render, sample_scene

from train.judge import Judge

SCENES_SEED = 424242


def held_out_scenes(count: int, *, two: bool) -> tuple[list[Scene], list[str], list[Image.Image]]:
    """Scenes of a seed that no training used, captions that name thing, colour and background, and true renders."""
    rng = np.random.default_rng([SCENES_SEED, int(two)])
    found: list[Scene] = []
    texts: list[str] = []
    while len(found) < count:
        scene = sample_scene(rng, two=float(two), forbidden=held_out)
        text = caption(scene, rng)
        said = set(text.replace(",", " ").split())
        if all(t.colour in said and t.kind in said for t in scene.things) and asked_background(scene, text):
            found.append(scene)
            texts.append(text)
    return found, texts, [render(s, rng) for s in found]


def asked_background(scene: Scene, text: str) -> bool:
    from world import background

    return text.endswith(background(scene.place))


def wanted(scene: Scene, text: str) -> dict[str, str]:
    """What the caption asks for, in the judge's words."""
    first = scene.things[0]
    asked = {"count": str(len(scene.things)), "kind": first.kind, "colour": first.colour, "place": scene.place}
    if first.pattern != "plain" and f"{first.pattern} " in text:
        asked["pattern"] = first.pattern
    if len(scene.things) == 2:
        asked["kind_b"], asked["colour_b"] = scene.things[1].kind, scene.things[1].colour
    elif first.side and first.side in text:
        asked["side"] = first.side
    if len(scene.things) == 1 and first.creature is not None:
        c = first.creature
        if " eye" in text:
            asked["eyes"] = str(c.eyes)
        if c.body in text.split():
            asked["body"] = c.body
        if c.top != "nothing" and c.top in text:
            asked["top"] = c.top
    return asked


def score(judge: Judge, images: list[Image.Image], asked: list[dict[str, str]]) -> dict[str, float]:
    """Share of asked attributes that the judge finds, one figure per attribute."""
    right: dict[str, list[bool]] = {}
    for k in range(0, len(images), 100):
        for seen, want in zip(judge.read(images[k : k + 100]), asked[k : k + 100], strict=True):
            for name, value in want.items():
                right.setdefault(name, []).append(seen[name] == value)
    return {name: round(float(np.mean(hits)), 4) for name, hits in sorted(right.items())}


@torch.no_grad()
def through(pipe: StableDiffusionPipeline, images: list[Image.Image]) -> list[Image.Image]:
    out: list[Image.Image] = []
    for k in range(0, len(images), 50):
        x = pipe.image_processor.preprocess(images[k : k + 50])
        y = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
        out += pipe.image_processor.postprocess(y, output_type="pil")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="a training's work folder")
    parser.add_argument("--model", type=Path, help="a pipeline folder instead")
    parser.add_argument("--judge", type=Path, default=Path(__file__).parent / "judge")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    if args.model:
        pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32, safety_checker=None)
    else:
        from grids import assemble

        pipe = assemble(args.work)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge(args.judge)
    report: dict[str, object] = {"machine": machine(), "steps": args.steps, "guidance": args.guidance}
    for name, count, two in (("one thing", args.count, False), ("two things", args.count // 4, True)):
        scenes, texts, truth = held_out_scenes(count, two=two)
        asked = [wanted(s, t) for s, t in zip(scenes, texts, strict=True)]
        began, drawn = time.time(), []
        for k in range(0, count, 25):
            generators = [torch.Generator().manual_seed(k + j) for j in range(len(texts[k : k + 25]))]
            drawn += pipe(texts[k : k + 25], num_inference_steps=args.steps, guidance_scale=args.guidance,
                          generator=generators).images  # fmt: skip
        rows = {
            "true": score(judge, truth, asked),
            "true, through the autoencoder": score(judge, through(pipe, truth), asked),
        }
        rows["pocket"] = score(judge, drawn, asked)
        rows["pocket / true"] = {k: round(rows["pocket"][k] / max(rows["true"][k], 1e-9), 4) for k in rows["pocket"]}
        report[name] = {"captions": count, "seconds_to_draw": round(time.time() - began, 1), **rows}
        print(name, json.dumps(rows, indent=1))
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
