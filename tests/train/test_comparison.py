"""The picture of pictures: everything that was given is in it, enlarged without blurring small pictures."""

import numpy as np
from PIL import Image

from train.comparison import GAP, MARGIN, TILE, Row, compose

RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_every_picture_is_shown_in_full():
    small, large = Image.new("RGB", (64, 64), RED), Image.new("RGB", (512, 512), BLUE)
    out = np.asarray(compose("title", [Row([small, large], title="a row", side="base", captions=["one", "two"])]))
    for colour in (RED, BLUE):
        shown = (np.abs(out.astype(int) - colour).max(axis=-1) < 8).sum()
        assert shown >= (TILE - 4) ** 2


def test_width_follows_the_longest_row():
    one = Image.new("RGB", (64, 64))
    assert compose("t", [Row([one] * 5), Row([one] * 2)]).width == 2 * MARGIN + 5 * (TILE + GAP) - GAP
