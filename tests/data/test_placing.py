"""Where a picture lies in what a model sees: points found by their colour go back to where they were drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import parse
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eptq_onnx
from eptq_onnx.config.recipes import ImageRecipe
from eptq_onnx.data.inputs import inputs_of
from eptq_onnx.data.pictures import sight_of

FITS = ("crop", "stretch", "letterbox", "letterbox-corner")
MODEL = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Identity (x) }")


def placed(size: tuple[int, int], fit: str, rows: int, columns: int, more: str = ""):
    sight = sight_of(
        MODEL, inputs_of(MODEL), ImageRecipe.model_validate(f"raw,fit={fit},size={rows}x{columns}{more}")
    )
    return sight.fitted(Image.new("RGB", size))[1]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(FITS), st.integers(30, 200), st.integers(30, 200), st.integers(24, 120),
    st.integers(24, 120), st.floats(0.3, 0.7), st.floats(0.3, 0.7),
)  # fmt: skip
def test_a_bright_block_is_found_where_it_was_drawn(fit, width, height, rows, columns, x, y):
    """The centre of a block in the input, mapped back, is that of the block in the picture."""
    side = max(6, min(width, height) // 6)
    left, top = round(x * width - side / 2), round(y * height - side / 2)
    picture = Image.new("RGB", (width, height))
    picture.paste((255, 255, 255), (left, top, left + side, top + side))
    bars = ",fill=0" if fit.startswith("letterbox") else ""
    recipe = ImageRecipe.model_validate(f"raw,fit={fit}{bars},size={rows}x{columns}")
    pixels, found = sight_of(MODEL, inputs_of(MODEL), recipe).fitted(picture)
    weight = pixels[0].astype(np.float64)
    corners = found.to_input([left, top, left + side, top + side])
    if corners.min() < 1 or corners[2] > columns - 1 or corners[3] > rows - 1:
        return  # a crop cuts it off
    grid = np.mgrid[:rows, :columns] + 0.5
    centre = [(grid[axis] * weight).sum() / weight.sum() for axis in (1, 0)]
    wanted = (left + side / 2, top + side / 2)
    step = 1 / min(found.scale)  # a pixel of the input
    np.testing.assert_allclose(found.to_picture(centre), wanted, atol=0.35 * max(step, 1))
    assert found.size == (width, height)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FITS), st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(1, 90),
    st.lists(st.floats(-100, 400), min_size=12, max_size=12),
)  # fmt: skip
def test_there_and_back_is_the_same_for_boxes_and_key_points(fit, width, height, rows, columns, values):
    found = placed((width, height), fit, rows, columns)
    for shape in ((12,), (3, 4), (1, 2, 6), (6, 2)):
        points = np.reshape(values, shape)
        np.testing.assert_allclose(found.to_picture(found.to_input(points)), points, atol=1e-6)


def test_letterboxes_have_bars_where_the_picture_ends():
    assert placed((40, 10), "letterbox", 16, 16).offset == (0, 6)
    assert placed((40, 10), "letterbox-corner", 16, 16).offset == (0, 0)
    assert placed((40, 10), "letterbox", 16, 16).scale == pytest.approx((0.4, 0.4))
    np.testing.assert_allclose(
        placed((40, 10), "letterbox", 16, 16).to_picture([0, 6, 16, 10]), [0, 0, 40, 10]
    )
    cropped = placed((40, 10), "crop", 10, 10, ",resize=10")
    np.testing.assert_allclose(cropped.to_picture([0, 0, 10, 10]), [15, 0, 25, 10])


def test_samples_of_a_folder_say_it_and_a_picture_is_held_upright(tmp_path: Path):
    tags = Image.Exif()
    tags[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 10)).save(tmp_path / "turned.jpg", exif=tags)
    Image.new("RGB", (40, 10)).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = {
        s.name: s.placed
        for s in eptq_onnx.samples(MODEL, eptq_onnx.Data(tmp_path, image="yolo-letterbox,size=16"))
    }
    assert sorted(found) == ["turned.jpg", "wide.png"]
    turned, wide = found["turned.jpg"], found["wide.png"]
    assert turned is not None
    assert wide is not None
    assert (turned.size, turned.offset) == ((10, 40), (6, 0))
    assert (wide.size, wide.offset) == ((40, 10), (0, 6))


def test_other_samples_have_no_place():
    [sample] = eptq_onnx.samples(MODEL, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    assert sample.placed is None
