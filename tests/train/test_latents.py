"""Latents: what is encoded, in how little memory, and what is drawn of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import build_tiny_vae
from train.augment import Crop, crops
from train.latents import ENCODE_BATCH, LatentBank, View, encode
from train.randomness import Draws


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return build_tiny_vae().eval()


def crop(height: int, width: int, number: int, mask: torch.Tensor | None = None) -> Crop:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(number)) * 2 - 1
    return Crop(pixels, mask, (height, width, 0, number, height, width))


def view(number: float, sizes: int = 0, side: int = 2) -> View:
    mean = torch.full((1, side, side), number)
    return View(mean, torch.zeros_like(mean), (sizes, 0, 0, 0, 8, 8))


def test_each_crop_is_encoded_in_its_place(vae: Any) -> None:
    pictures = [
        [crop(32, 32, 0), crop(32, 32, 1), crop(32, 32, 2)],
        [crop(32, 32, 3), crop(32, 32, 4), crop(32, 32, 5)],
        [crop(24, 40, 6)],
        [crop(32, 32, 7)],
    ]
    done: list[int] = []
    found = encode(vae, pictures, on_picture=done.append)
    assert [len(views) for views in found] == [3, 3, 1, 1] and done == [2, 2, 3, 4]
    with torch.no_grad():
        for views, originals in zip(found, pictures):
            for one, original in zip(views, originals):
                alone = vae.encode(original.pixels[None]).latent_dist
                torch.testing.assert_close(one.mean, alone.mean[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(one.std, alone.std[0], rtol=1e-4, atol=1e-5)
                assert one.sizes == original.sizes and one.mask is None
    assert found[2][0].mean.shape == (4, 6, 10)
    assert found[0][0].mean.untyped_storage().nbytes() == 4 * 8 * 8 * 4  # not a part of its batch


def test_pictures_are_taken_in_one_by_one(vae: Any) -> None:
    taken, done = 0, 0

    def pictures() -> Iterator[list[Crop]]:
        nonlocal taken
        for number in range(12):
            taken += 1
            assert taken - done <= ENCODE_BATCH + 1
            yield [crop(32, 32, number)]

    def on_picture(count: int) -> None:
        nonlocal done
        done = count

    assert len(encode(vae, pictures(), on_picture=on_picture)) == done == 12


def test_half_precision_is_left_as_it_was(vae: Any) -> None:
    half = build_tiny_vae().eval().to(torch.float16)
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    assert encode(half, [[crop(32, 32, 0)]])[0][0].mean.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())


def test_a_mask_is_the_mean_over_each_place_of_the_latents(vae: Any) -> None:
    mask = torch.zeros(1, 32, 32)
    mask[:, :4, :2] = 1.0  # half of the first place
    mask[:, 8:16, 8:16] = 1.0  # four whole ones
    found = encode(vae, [[crop(32, 32, 0, mask)]])[0][0].mask
    assert found is not None and found.shape == (1, 8, 8) and found.dtype == torch.float32
    assert float(found[0, 0, 0]) == 0.5 and torch.all(found[0, 2:4, 2:4] == 1.0) and float(found.sum()) == 4.5


def test_a_sample_brings_its_crop_mask_sizes_and_text_along() -> None:
    mask = torch.ones(1, 2, 2)
    one = View(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), (9, 8, 1, 2, 8, 8), mask)
    sample = LatentBank([[one]], [("a dog",)], 0.5, "instance").draw(Draws(0), 0, 1000)
    assert torch.equal(sample.latents, torch.full((1, 2, 2), 0.5)) and sample.noise.shape == (1, 2, 2)
    assert sample.caption == "a dog" and sample.sizes == (9, 8, 1, 2, 8, 8) and sample.mask is mask


def test_crops_take_turns_and_mirror_images_are_half() -> None:
    views = [view(number, number) for number in range(6)]  # three crops, then their mirror images
    bank = LatentBank([views], [("",)], 1.0, "instance", flipped=True)
    seen = [bank.draw(Draws(0), position, 10).sizes[0] for position in range(600)]
    assert [number % 3 for number in seen] == [position % 3 for position in range(600)]
    assert 250 < sum(number >= 3 for number in seen) < 350
    plain = LatentBank([views], [("",)], 1.0, "instance")
    assert [plain.draw(Draws(0), position, 10).sizes[0] for position in range(12)] == [*range(6), *range(6)]


def test_texts_are_drawn_and_dropped_as_often_as_was_asked() -> None:
    bank = LatentBank([[view(0)]], [("a", "b", "c")], 1.0, "instance", dropout=0.25)
    seen = Counter(bank.draw(Draws(1), position, 10).caption for position in range(800))
    assert set(seen) == {"", "a", "b", "c"} and 150 < seen[""] < 250
    assert all(150 < seen[text] < 250 for text in "abc")
    never = LatentBank([[view(0)]], [("a",)], 1.0, "instance", dropout=1.0)
    assert {never.draw(Draws(1), position, 10).caption for position in range(20)} == {""}


def test_texts_flips_and_dropout_leave_latents_and_noise_alone() -> None:
    """Each has draws of its own, so that switching one on changes nothing else."""
    plain = LatentBank([[view(0)], [view(1)]], [("a",)] * 2, 1.0, "instance")
    rich = LatentBank(
        [[view(0), view(0)], [view(1), view(1)]], [("a", "b")] * 2, 1.0, "instance", flipped=True, dropout=0.5
    )
    for position in range(20):
        left, right = plain.draw(Draws(0), position, 1000), rich.draw(Draws(0), position, 1000)
        assert torch.equal(left.latents, right.latents) and torch.equal(left.noise, right.noise)
        assert left.timestep == right.timestep


def test_a_draw_follows_from_its_position_alone() -> None:
    pictures = [[view(number, side=2 + number % 2), view(number + 0.5, side=2 + number % 2)] for number in range(5)]
    bank = LatentBank(pictures, [("a", "b")] * 5, 1.0, "instance", group=4, flipped=True, dropout=0.3)
    forwards = [bank.draw(Draws(7), position, 1000, 0.1) for position in range(40)]
    draws = Draws(7)
    for position in reversed(range(40)):
        again = bank.draw(draws, position, 1000, 0.1)
        assert torch.equal(again.latents, forwards[position].latents)
        assert torch.equal(again.noise, forwards[position].noise)
        assert again.caption == forwards[position].caption and again.timestep == forwards[position].timestep


def test_a_picture_and_its_mirror_image_encode_apart(vae: Any) -> None:
    picture = Image.linear_gradient("L").rotate(90).resize((32, 32)).convert("RGB")
    generator = torch.Generator().manual_seed(0)
    ((plain, mirrored),) = encode(vae, [crops(picture, (32, 32), center=True, generator=generator, flip=True)])
    assert not torch.allclose(plain.mean, mirrored.mean, atol=1e-3)
