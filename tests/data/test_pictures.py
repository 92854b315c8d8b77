"""Folders of pictures: what is decoded, how it is prepared, and what of it is guessed."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import parse, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from eptq_onnx import Config, Data, DataError, InstallError, data, quantize
from eptq_onnx.cli.options import options_of
from eptq_onnx.config import Reading
from eptq_onnx.config.recipes import ImageRecipe
from eptq_onnx.data.inputs import inputs_of
from eptq_onnx.data.pictures import Sight, sight_of
from eptq_onnx.data.sheet import contact_sheet

RNG = np.random.default_rng(0)


def model(
    dims: str = "N,3,16,16", kind: str = "float", facts: dict[str, str] | None = None
) -> onnx.ModelProto:
    found = parse(f"g ({kind}[{dims}] x) => ({kind}[{dims}] y) {{ y = Identity (x) }}")
    for key, value in (facts or {}).items():
        found.metadata_props.add(key=key, value=value)
    return found


def picture(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def sight(recipe: str | None, of: onnx.ModelProto | None = None) -> Sight:
    own = of or model()
    return sight_of(own, inputs_of(own), None if recipe is None else ImageRecipe.model_validate(recipe))


def loaded(source: Any, of: onnx.ModelProto | None = None, **options: Any) -> data.Candidates:
    return data.load(Data(source, **options), of or model())


# ---- preparation ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(0, 30),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_crop_is_that_of_the_resized_picture(width, height, rows, columns, more, seed):
    """The usual way is to resize the whole picture and to cut out the middle."""
    source, short = picture(width, height, seed=seed), min(rows, columns) + more
    found = sight(f"raw,size={rows}x{columns},resize={short}", model("N,3,H,W"))(source)
    scale = max(short / min(width, height), columns / width, rows / height)
    whole = (max(int(width * scale), columns), max(int(height * scale), rows))
    left, top = round((whole[0] - columns) / 2), round((whole[1] - rows) / 2)
    wanted = source.resize(whole, Image.Resampling.BILINEAR).crop((left, top, left + columns, top + rows))
    # Pillow rounds to whole colours along each of the two axes: one step for each.
    np.testing.assert_allclose(found.transpose(1, 2, 0), np.asarray(wanted), atol=2)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from(["nchw", "nhwc"]), st.sampled_from(["rgb", "bgr"]),
    st.sampled_from(["crop", "stretch", "letterbox", "letterbox-corner"]),
    st.lists(st.floats(0, 255), min_size=3, max_size=3),
)  # fmt: skip
def test_values_layout_and_colours_are_those_of_the_recipe(width, height, layout, color, fit, mean):
    source = picture(width, height)
    text = f"size=8x12,fit={fit},layout={layout},color={color},units=pixels"
    of = model("N,3,H,W" if layout == "nchw" else "N,H,W,3")
    plain = sight(f"{text},mean=0,std=1", of)(source)
    found = sight(f"{text},mean={','.join(map(str, mean))},std=2,4,8", of)
    shape = (-1, 1, 1) if layout == "nchw" else (-1,)
    want = (plain - np.reshape(mean, shape)) / np.reshape([2, 4, 8], shape)
    np.testing.assert_allclose(found(source), want, rtol=1e-4, atol=1e-3)
    other = "bgr" if color == "rgb" else "rgb"
    turned = sight(f"{text.replace(color, other)},mean=0,std=1", of)(source)
    np.testing.assert_array_equal(np.flip(turned, 0 if layout == "nchw" else -1), plain)
    assert found(source).dtype == np.float32
    # What the sheet of samples shows are the pixels again.
    seen = plain.transpose(1, 2, 0) if layout == "nchw" else plain
    np.testing.assert_array_equal(found.shown(found(source)), seen[..., :: 1 if color == "rgb" else -1])


def test_letterboxes_fill_with_grey_and_keep_the_shape():
    white = Image.new("RGB", (40, 10), (255, 255, 255))
    middle = sight("yolo-letterbox,size=16", model("N,3,H,W"))(white)
    assert middle.shape == (3, 16, 16)
    np.testing.assert_allclose(middle[0, :, 0], [114 / 255] * 6 + [1] * 4 + [114 / 255] * 6)
    corner = sight("yolox,size=16,fill=7", model("N,3,H,W"))(white)
    np.testing.assert_array_equal(corner[0, :, 0], [255] * 4 + [7] * 12)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60))
def test_without_resizing_the_middle_is_cut_out_as_it_is(width, height):
    source = picture(width, height)
    found = sight("raw,resize=none")(source)
    if min(width, height) >= 16:
        left, top = round((width - 16) / 2), round((height - 16) / 2)
        wanted = np.asarray(source)[top : top + 16, left : left + 16].transpose(2, 0, 1)
        np.testing.assert_array_equal(found, wanted)
    else:
        # What is smaller than the crop is scaled up to it.
        np.testing.assert_allclose(found, sight("raw,resize=16")(source))


@pytest.mark.parametrize(("width", "height"), [(1, 60000), (60000, 1), (1, 1), (2, 3)])
def test_extreme_shapes_cost_nothing(width, height):
    source = Image.new("RGB", (width, height), (10, 20, 30))
    for recipe in ("raw", "raw,resize=none", "raw,fit=stretch", "yolo-letterbox", "yolox"):
        assert sight(recipe)(source).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixels_becomes_colours_or_grey(mode, channels):
    gray = Image.new("L", (20, 20), 128)
    if mode == "F":
        source = Image.fromarray(np.full((20, 20), 0.5, np.float32))
    elif mode in ("I", "I;16"):
        source = Image.fromarray(np.full((20, 20), 32896, np.int32 if mode == "I" else np.uint16))
    else:
        source = gray.convert("RGB").convert(mode)
    assert source.mode == mode
    found = sight("raw", model(f"N,{channels},16,16"))(source)
    assert found.shape == (channels, 16, 16)
    np.testing.assert_allclose(found.mean(), 128, atol=1 if mode != "1" else 255)


def test_bytes_and_halves_are_what_the_model_takes():
    assert sight(None, model(kind="uint8"))(picture()).dtype == np.uint8
    assert sight("imagenet", model(kind="float16"))(picture()).dtype == np.float16
    kept = sight("imagenet", model(kind="uint8"))
    assert "pixels stay as they are" in kept.notes[0]
    np.testing.assert_array_equal(kept(Image.new("RGB", (9, 9), (1, 2, 3)))[:, 0, 0], [1, 2, 3])


# ---- what is guessed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "kind", "facts", "part", "unknown"),
    [
        ("N,3,16,20", "float", {}, "size=16x20,resize=16,fit=crop,mean=123.675,116.28,103.53", True),
        ("1,3,H,W", "float", {}, "size=224,resize=256,fit=crop", True),
        ("1,3,192,192", "float", {}, "size=192,resize=219,fit=crop", True),
        ("N,24,16,3", "float", {}, "size=24x16,resize=16,fit=crop,mean=127.5,std=127.5", True),
        ("N,1,28,28", "float", {}, "mean=0,std=255,units=pixels,layout=nchw,color=gray", True),
        ("3,16,16", "float", {}, "layout=nchw,color=rgb", True),
        ("N,28,28", "float", {}, "size=28,resize=28,fit=crop,mean=0,std=255,units=pixels,layout=nhw,color=gray", True),
        ("N,3,16,16", "uint8", {}, "mean=0,std=1", False),
        (
            "N,3,H,W", "float", {"stride": "32", "imgsz": "[64, 96]", "names": "{}", "task": "detect"},
            "size=64x96,fit=letterbox,fill=114,mean=0,std=255", False,
        ),
        ("N,3,H,W", "float", {"author": "Ultralytics", "imgsz": "[64]", "task": "classify"}, "size=64,resize=64,fit=crop,mean=0,std=255", False),
        (
            "N,3,8,8", "float", {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": "Normalized_1_1"},
            "mean=127.5,std=127.5,units=pixels,layout=nchw,color=bgr", False,
        ),
        ("N,3,8,8", "float", {"Image.NominalPixelRange": "NominalRange_0_255"}, "mean=0,std=1,units=pixels", False),
        ("N,3,8,8", "float", {"imgsz": "a lot of" + "9" * 400}, "size=8,", True),
    ],
)  # fmt: skip
def test_the_model_says_what_it_wants_as_far_as_it_does(dims, kind, facts, part, unknown):
    found = sight(None, model(dims, kind, facts))
    assert part in str(found.recipe)
    assert bool(found.notes) == unknown
    assert ("nothing in the model says how pixels are scaled" in "".join(found.notes)) == unknown
    assert any(text.startswith("mean and std") for text in found.guessed)
    assert ImageRecipe.model_validate(str(found.recipe)) == found.recipe


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        ("m = Constant <value = float {127.5}> ()  y = Sub (x, m)", "raw"),
        ("m = Constant <value = float {255.0}> ()  y = Div (x, m)", "raw"),
        (
            "m = Constant <value = float {0.00392}> ()  t = Transpose <perm = [0, 2, 3, 1]> (x)  y = Mul (t, m)",
            "raw",
        ),
        ("m = Constant <value = float {0.45}> ()  y = Sub (x, m)", "unit"),
        ("m = Constant <value = float {4.4}> ()  y = Mul (x, m)", "unit"),
        ("m = Constant <value = float {0.5}> ()  y = Mul (x, m)", ""),
        ("y = Add (x, x)", ""),
        ("y = Relu (x)", ""),
    ],
)
def test_a_model_that_scales_its_input_itself_gets_what_it_scales(nodes, values):
    of = parse(f"g (float[N,3,8,8] x) => (float[A,B,C,D] y) {{ {nodes} }}")
    found = sight(None, of)
    mean, std, _ = found.recipe.in_pixels() or ((), (), None)
    assert bool(found.notes) == (not values)
    if values:
        assert (mean, std) == ((0.0,), (1.0,) if values == "raw" else (255.0,))


@pytest.mark.parametrize(
    ("dims", "recipe", "message"),
    [
        ("N,4,8,8", None, "pictures have 3 channels .*, but the model takes 'x' float32"),
        ("N,3,8,8", "color=gray", "pictures have 1 channels as color=gray"),
        ("N,1,8,8", "color=rgb", "pictures have 3 channels as color=rgb"),
        ("N,8,8,3", "layout=nchw", "say another color or layout with --image"),
        ("N,3,8,8", "size=224", r"size=224x224 does not fit the input 'x' float32 \(any, 3, 8, 8\)"),
        ("N,3,8,8", "resize=7", "resize=7 is smaller than what is cut out of it, 8×8"),
        ("N,8", None, "pictures fill one input with 3 or 4 axes, but the model takes 'x' float32"),
    ],
)
def test_what_the_model_does_not_take_is_told(dims, recipe, message):
    with pytest.raises(DataError, match=message) as e:
        sight(recipe, model(dims))
    assert "\n" not in str(e.value)


def test_a_model_with_more_inputs_is_told():
    of = parse("g (float[N,3,8,8] x, float[N] s) => (float[N,3,8,8] y) { y = Identity (x) }")
    with pytest.raises(DataError, match=r"fill one input .*'s' float32 \(any\): give arrays"):
        sight(None, of)


# ---- folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for k in range(12):
        place = folder / f"class {k % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + k, 20), (k, 2 * k, 3 * k)).save(place / f"{k:02}.png")
    return folder


def test_a_folder_is_read_with_its_subfolders_in_order(photos):
    (photos / "notes.txt").write_text("no picture\n" * 3)
    (photos / ".thumbs").mkdir()
    picture().save(photos / ".thumbs" / "x.png")
    (photos / "again").symlink_to(photos, target_is_directory=True)
    samples = loaded(photos, image="raw").samples[0]
    assert samples.count == 12
    np.testing.assert_array_equal(
        samples.take(range(12))["x"][:, 0, 0, 0], [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    )
    assert loaded(photos / "class 0" / "03.png", image="raw").samples[0].take([0])["x"][0, 1, 0, 0] == 6


@pytest.mark.parametrize(("limit", "wanted"), [(1, [0]), (3, [0, 4, 11]), (12, None), (99, None)])
def test_samples_are_spread_over_the_folder(photos, limit, wanted):
    samples = loaded(photos, image="raw", samples=limit).samples[0]
    found = samples.take(range(samples.count))["x"][:, 0, 0, 0].tolist()
    assert len(found) == min(limit, 12)
    assert wanted is None or found[:1] + found[-1:] == wanted[:1] + wanted[-1:]


def test_orientation_is_that_of_the_camera(tmp_path):
    upright = Image.fromarray(np.tile(np.arange(0, 160, 10).astype(np.uint8)[None, :, None], (16, 1, 3)))
    for orientation, turn in (
        (1, None),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        (upright if turn is None else upright.transpose(turn)).save(
            tmp_path / f"{orientation}.png", exif=exif
        )
    values = loaded(tmp_path, image="raw,resize=16").samples[0].take(range(4))["x"]
    for value in values:
        np.testing.assert_array_equal(value, values[0])


def test_the_first_frame_of_what_moves_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 20), (v, v, v)) for v in (40, 90, 200)]
    for name in ("a.gif", "b.webp", "c.png", "d.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    found = loaded(tmp_path, image="raw").samples[0].take(range(4))["x"]
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 40, atol=2)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_files_in_the_colours_of_print_show_what_others_show(tmp_path, suffix, mode):
    Image.new("RGB", (20, 20), (200, 60, 60)).convert(mode).save(tmp_path / f"a.{suffix}")
    found = loaded(tmp_path, image="raw").samples[0].take([0])["x"][0].mean(axis=(1, 2))
    np.testing.assert_allclose(found, (102, 102, 102) if mode == "L" else (200, 60, 60), atol=4)


def test_16_bits_are_scaled_and_not_cut(tmp_path):
    Image.fromarray(np.full((20, 20), 257 * 77, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((20, 20), 257 * 77, np.uint16)).save(tmp_path / "b.tif")
    found = loaded(tmp_path, image="raw").samples[0].take([0, 1])["x"]
    np.testing.assert_array_equal(found, 77)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares any number of pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def test_broken_pictures_are_named_and_left_out(photos):
    whole = (photos / "class 1" / "01.png").read_bytes()
    (photos / "0 empty.png").write_bytes(b"")
    (photos / "1 text.jpg").write_text("hello")
    (photos / "2 half.png").write_bytes(whole[: len(whole) // 2])
    (photos / "3 bomb.png").write_bytes(bomb(60000, 60000))
    (photos / "4 folder.png").mkdir()
    (photos / "5 gone.png").symlink_to("nowhere.png")
    found = loaded(photos, image="raw")
    assert found.samples[0].count == 12
    [note] = found.origin.notes
    assert note.startswith("5 of 17 pictures cannot be read and are left out: ")
    for text in (
        "0 empty.png",
        "1 text.jpg (cannot identify image file",
        "2 half.png",
        "a decompression bomb",
    ):
        assert text in note
    assert "\n" not in note


@pytest.mark.parametrize("start", range(3))
def test_damaged_bytes_never_end_a_run(photos, start):
    rng = np.random.default_rng(start)
    for kind in ("jpg", "png", "gif", "bmp", "tif", "webp"):
        for k in range(6):
            file = photos / f"{kind}{k}.{kind}"
            picture().save(file)
            content = bytearray(file.read_bytes())
            for place in rng.integers(0, len(content), 1 + 4 * k):
                content[place] = rng.integers(0, 256)
            file.write_bytes(content[: rng.integers(1, len(content) + 1)])
    assert 12 <= loaded(photos).samples[0].count <= 48


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"has no \.npz file, nor pictures"),
        ({"a.png": b""}, "none of the pictures of .* can be read: .*a.png: "),
        ({"a.png": bomb(30000, 30000)}, "a.png: it declares more than 178956970 pixels"),
        ({"notes.pdf": b""}, r"has no \.npz file"),
    ],
)
def test_a_folder_without_pictures_is_told(tmp_path, content, message):
    for name, value in content.items():
        (tmp_path / name).write_bytes(value)
    with pytest.raises(DataError, match=message) as e:
        loaded(tmp_path)
    assert "\n" not in str(e.value)


def test_a_missing_picture_and_a_missing_library_are_told(photos, monkeypatch):
    with pytest.raises(DataError, match=r"nothing\.png does not exist"):
        loaded(photos / "nothing.png")
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(InstallError, match=r"eptq-onnx\[images\]"):
        loaded(photos)


def test_pixels_beside_text_and_arrays_are_what_is_most(photos):
    np.savez(photos / "labels.npz", y=np.zeros(3))
    for k in range(30):
        (photos / f"{k}.txt").write_text("a caption")
    assert loaded(photos, image="raw").samples[0].count == 12


def test_a_run_shows_what_was_done_to_pictures(photos):
    of = parse(
        "g (float[N,3,8,8] x) => (float[N,4] y) { c = Conv (x, w)  p = GlobalAveragePool (c)  y = Flatten (p) }",
        {"w": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)},
    )
    told: list[Any] = []

    def progress(step: str, done: int, total: int, detail: object = "") -> None:
        told.append((step, str(detail)))

    source = Data(photos, image="imagenet")
    result = quantize(of, source, Config(preset="fast", measure_speed=False), progress=progress)
    report = result.report
    assert report.samples == 12
    text = "--image 'size=8,resize=8,fit=crop,mean=123.675,116.28,103.53,std=58.395,57.12,57.375,units=pixels"
    assert [detail for step, detail in told if step == "data"] == [str(report.data)]
    assert text in str(report.data)
    out = io.StringIO()
    report.print(Console(file=out, width=80))
    assert text.replace(" ", "") in "".join(out.getvalue().split())
    assert "guessed: size (" in str(report.data), "a name leaves nothing open but what the model says"
    assert Reading(**options_of(Reading, report.config)) == source.reading
    again = quantize(
        of,
        Data(photos, image=report.data.recipe["image"]),
        Config(preset="fast", measure_speed=False),
        progress=silent,
    )
    assert again.report.verification.outputs == report.verification.outputs
    sheet = np.asarray(Image.open(io.BytesIO(result.contact_sheet)))
    assert sheet.shape == (2 * 132 + 4, 8 * 132 + 4, 3)
    order = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    for k, number in enumerate(order):
        middle = sheet[4 + 132 * (k // 8) + 64, 4 + 132 * (k % 8) + 64]
        np.testing.assert_allclose(middle, [number, 2 * number, 3 * number], atol=1)


@pytest.mark.parametrize("dims", ["N,8,12,3", "1,3,8,12", "3,8,12", "N,8,12", "N,1,8,12"])
@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_the_sheet_shows_pixels_of_any_input(tmp_path, dims, kind):
    for k in range(3):
        Image.new("RGB", (12, 8), (50 * k,) * 3).save(tmp_path / f"{k}.png")
    of = model(dims, kind)
    found = loaded(tmp_path, of)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(found.samples[0], found.origin, of))))
    assert [int(sheet[40, 4 + 132 * k + 64, 0]) for k in range(3)] == pytest.approx([0, 50, 100], abs=1)
    arrays = data.load({"x": found.samples[0].take([0])["x"]}, of)
    assert contact_sheet(arrays.samples[0], arrays.origin, of) == b""
