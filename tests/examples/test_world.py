"""The pocket world draws what its captions say, the same each time, and never a held-out subject."""

import sys
from pathlib import Path

import numpy as np
import pytest

POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket"
sys.path.insert(0, str(POCKET))

from world import SUBJECTS, Scene, background, caption, held_out, render, sample_scene  # noqa: E402
from world.palette import COLOURS  # noqa: E402
from world.scene import KINDS  # noqa: E402


def scenes(count: int, seed: int = 0, **options: object) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, forbidden=held_out, **options) for _ in range(count)]


def test_the_same_seed_draws_the_same_pictures():
    one, two = (
        [np.asarray(render(s, np.random.default_rng(k))) for k, s in enumerate(scenes(20, seed=3))] for _ in range(2)
    )
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_training_scenes_hold_no_subject_and_every_kind():
    found = [thing for scene in scenes(4000) for thing in scene.things]
    assert not any(held_out(thing) for thing in found)
    assert {thing.kind for thing in found} == set(KINDS)


def test_every_subject_is_held_out():
    assert all(held_out(thing) for thing in SUBJECTS.values())


def test_captions_say_nothing_untrue():
    rng = np.random.default_rng(5)
    for scene in scenes(500, seed=6, two=0.0):
        thing, text = scene.things[0], caption(scene, rng)
        said = set(text.replace(",", " ").split())
        assert thing.kind in said
        allowed = {thing.colour, thing.colour2} | ({scene.place} if background(scene.place) in text else set())
        allowed |= {thing.creature.mark_colour} if thing.creature else set()
        assert said & set(COLOURS) <= allowed, text


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_shows_its_colours(name):
    thing = SUBJECTS[name]
    pixels = np.asarray(render(Scene((thing,), "black"), np.random.default_rng(0))).astype(int)
    for colour in (thing.colour, thing.colour2):
        near = (np.abs(pixels - np.array(COLOURS[colour])).max(axis=-1) < 40).sum()
        assert near > 40, colour


def test_pictures_are_rgb_of_64_pixels():
    image = render(scenes(1)[0], np.random.default_rng(0))
    assert image.size == (64, 64)
    assert image.mode == "RGB"
