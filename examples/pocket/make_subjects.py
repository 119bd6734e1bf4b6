"""Draw the shipped subjects: python make_subjects.py

For each held-out subject five photos to train on, and four sheets for the likeness scale: the subject in twenty other
scenes, twenty pictures with one attribute wrong, twenty in which it is only half there (through the shipped
autoencoder), twenty random things of its class.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from diffusers import AutoencoderKL
from train_judge import half_formed, one_wrong
from world import SUBJECTS, Scene, Thing, background, held_out, render
from world.palette import NAMES as COLOURS
from world.places import NAMES as PLACES
from world.places import PLACES as PLACE_TABLE
from world.scene import sample_thing

PHOTO_PLACES = {  # where the photos were taken; everything else is new to the adapter
    "zorp": ("beach", "snow", "red", "meadow", "cyan"),
    "mib": ("forest", "night", "white", "city", "green"),
    "tolo": ("desert", "space", "blue", "snow", "orange"),
    "mug": ("meadow", "city", "pink", "sunset", "white"),
}
SHEET = 20


def fits(thing: Thing, place: str) -> bool:
    """Would `thing` be seen in front of `place`?"""
    colours = {thing.colour} | ({thing.colour2} if thing.pattern != "plain" else set())
    return not colours & (PLACE_TABLE[place][1] if place in PLACE_TABLE else {place})


def elsewhere_scene(thing: Thing, places: list[str], rng: np.random.Generator) -> Image.Image:
    """`thing` in one of `places` where it can be seen."""
    while not fits(thing, place := places[int(rng.integers(len(places)))]):
        pass
    return render(Scene((thing,), place), rng)


def sheet(images: list[Image.Image]) -> Image.Image:
    """Pictures in one row, no gaps: cut again every 64 pixels."""
    out = Image.new("RGB", (64 * len(images), 64))
    for k, image in enumerate(images):
        out.paste(image, (64 * k, 0))
    return out


def as_pictures(x: torch.Tensor) -> list[Image.Image]:
    """(n, 3, h, w) in [-1, 1] as pictures."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in pixels]


def main() -> None:
    vae = AutoencoderKL.from_pretrained(Path(__file__).parent / "model" / "vae").float().eval()
    for number, (name, thing) in enumerate(SUBJECTS.items()):
        rng = np.random.default_rng([31, number])
        folder = Path(__file__).parent / "subjects" / name
        (folder / "photos").mkdir(parents=True, exist_ok=True)
        for k, place in enumerate(PHOTO_PLACES[name]):
            size = ("", "big", "", "big", "")[k]
            shot = Thing(**{**thing.__dict__, "size": size, "side": ("", "", "", "on the left", "on the right")[k]})
            render(Scene((shot,), place), rng).save(folder / "photos" / f"{k + 1:02d}.png")
        elsewhere = [p for p in (*PLACES, *COLOURS) if p not in PHOTO_PLACES[name] and fits(thing, p)]

        true = [elsewhere_scene(thing, elsewhere, rng) for _ in range(SHEET)]
        wrong = [elsewhere_scene(one_wrong(thing, rng), elsewhere, rng) for _ in range(SHEET)]
        random = []
        while len(random) < SHEET:
            other = sample_thing(rng, "night", thing.kind)
            if not held_out(other):
                random.append(elsewhere_scene(Thing(**{**other.__dict__, "size": "", "side": ""}), elsewhere, rng))
        rng = np.random.default_rng([32, number])
        places = [p for p in elsewhere if fits(thing, p)]
        scenes = [Scene((thing,), places[int(rng.integers(len(places)))]) for _ in range(SHEET)]
        half = as_pictures(half_formed(vae, thing, scenes, rng))
        for role, images in (("true", true), ("one_wrong", wrong), ("half_formed", half), ("random", random)):
            sheet(images).save(folder / f"{role}.png")
        (folder / "subject.json").write_text(json.dumps(facts(name, thing), indent=1) + "\n")


def facts(name: str, thing: Thing) -> dict:
    """Prompts for `thing`, and what the judge should find in their pictures."""
    word = f"sks {thing.kind}"
    new = [p for p in PLACES if p not in PHOTO_PLACES[name] and fits(thing, p)][:4]
    new += [c for c in COLOURS if c not in PHOTO_PLACES[name] and fits(thing, c) and c != thing.colour2][:1]
    places = [
        {"prompt": f"a photo of {word} {background(p)}", "asks": {"count": "1", "kind": thing.kind, "place": p}}
        for p in new
    ]
    company = [
        {
            "prompt": f"a photo of {word} and a {colour} {kind} {background(place)}",
            "asks": {"count": "2", "kind": thing.kind, "kind_b": kind, "colour_b": colour, "place": place},
        }
        for colour, kind, place in (("red", "car", new[0]), ("blue", "house", new[-1]))
    ]
    return {
        "class": thing.kind,
        "instance_prompt": f"a photo of {word}",
        "class_prompt": f"a photo of a {thing.kind}",
        "places": places,
        "company": company,
    }


if __name__ == "__main__":
    main()
