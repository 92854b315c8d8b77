from __future__ import annotations

import numpy as np
import pytest
from graphs import images, normal, parse, small_convnet

from eptq_onnx import data
from eptq_onnx.errors import DataError

MODEL = small_convnet()
TWO = parse("g (float[N,3] a, int64[N,3] b) => (float[N,3] y) { c = Cast <to = 1> (b)  y = Add (a, c) }")


def test_npz_mapping_and_array(tmp_path):
    np.savez(tmp_path / "d.npz", image=images(5))
    for source in (tmp_path / "d.npz", str(tmp_path / "d.npz"), {"image": images(5)}, images(5)):
        samples = data.read(source, MODEL)
        assert samples.count == 5
        np.testing.assert_array_equal(samples.take([1, 3])["image"], images(5)[[1, 3]])


def test_batches_of_a_model_that_prescribes_its_batch():
    model = small_convnet()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    samples = data.read(images(10), model)
    assert samples.micro_batch(16) == 4
    assert [len(p) for p in samples.batches(range(10), 4)] == [4, 4]
    free = data.read(images(10), MODEL)
    assert [len(p) for p in free.batches(range(10), 4)] == [4, 4, 2]


def _bad_value(value: float) -> np.ndarray:
    array = images(5)
    array[3, 0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"picture": images(5)}, "no array for the model input 'image' .*'picture'"),
        ({}, "no array for the model input 'image' .*none"),
        ({"image": images(5), "mask": images(5)}, "an array 'mask', but the model has no such input"),
        ({"image": images(5).astype(np.float64)}, "type float64, but the model wants float32"),
        ({"image": images(5)[:, :2]}, r"shape \(5, 2, 8, 8\), but the model wants \(samples, 3, 8, 8\)"),
        ({"image": images(5)[0]}, r"shape \(3, 8, 8\), but the model wants"),
        ({"image": images(0)}, "has no samples"),
        ({"image": _bad_value(np.nan)}, "NaN or Inf in sample 3"),
        ({"image": _bad_value(np.inf)}, "NaN or Inf in sample 3"),
    ],
)
def test_bad_data_is_told_in_one_sentence(source, message):
    with pytest.raises(DataError, match=message) as e:
        data.read(source, MODEL)
    assert "\n" not in str(e.value)


def test_several_inputs_must_agree():
    good = {"a": normal(4, 3), "b": np.ones((4, 3), np.int64)}
    assert data.read(good, TWO).count == 4
    with pytest.raises(DataError, match="different numbers of samples: a: 4, b: 3"):
        data.read({**good, "b": good["b"][:3]}, TWO)
    with pytest.raises(DataError, match="model has 2 inputs"):
        data.read(normal(4, 3), TWO)


def test_fewer_samples_than_the_batch():
    model = small_convnet()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    with pytest.raises(DataError, match="5 samples, but the model takes 8 at a time"):
        data.read(images(5), model)


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        data.read(tmp_path / "none.npz", MODEL)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        data.read(tmp_path / "text.npz", MODEL)
    np.save(tmp_path / "one.npy", images(2))
    with pytest.raises(DataError, match="model has 2 inputs"):
        data.read(tmp_path / "one.npy", TWO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no \.npz file"):
        data.read(tmp_path / "empty", MODEL)


VAD = parse("g (float[batch,4] x, float[2,batch,3] state, int64 rate) => (float[batch,4] y) { y = Identity (x) }")


def test_a_batch_on_another_axis_and_an_input_without_one():
    state = normal(5, 2, 3)
    samples = data.read({"x": normal(5, 4), "state": state, "rate": np.int64(16000)}, VAD)
    assert samples.count == 5
    assert samples.fixed_batch is None
    feeds = samples.take([4, 0])
    np.testing.assert_array_equal(feeds["state"][:, 0], state[4])
    np.testing.assert_array_equal(feeds["state"][:, 1], state[0])
    assert feeds["rate"] == 16000


@pytest.mark.parametrize(
    ("inputs", "axes", "batch"),
    [
        ([["n", 3], [2, "n", 5]], [0, 1], None),
        ([[None, None], [2, None, 5], []], [0, 1, None], None),
        ([[1, 576], [2, 1, 128]], [0, 1], 1),
        ([["length", 576], [1, 1, 128]], [0, 0], 1),
        ([[4, 3], [7]], [0, None], 4),
        ([None, ["n"]], [0, 0], None),
    ],
)
def test_where_the_batch_is(inputs, axes, batch):
    assert data._batch_axes(inputs) == (axes, batch)


def test_inputs_without_a_batch_are_checked_too():
    good = {"x": normal(5, 4), "state": normal(5, 2, 3), "rate": np.int64(16000)}
    with pytest.raises(DataError, match=r"'rate' has shape \(5,\), but the model wants \(\), the same value for all samples"):
        data.read({**good, "rate": np.full(5, 16000)}, VAD)
    with pytest.raises(DataError, match=r"'state' has shape \(2, 5, 3\), but the model wants \(samples, 2, 3\)"):
        data.read({**good, "state": normal(2, 5, 3)}, VAD)


FREE = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Identity (x) }")
SIZES = [8, 6, 8, 8, 6, 4]
PICTURES = [images(1, size=s, seed=k)[0] for k, s in enumerate(SIZES)]


def test_feeds_lists_folders_and_functions_are_the_same(tmp_path, monkeypatch):
    for k in (0, 2, 4):
        together = PICTURES[k : k + 2] if SIZES[k] == SIZES[k + 1] else None
        pairs = [np.stack(together)] if together else [p[None] for p in PICTURES[k : k + 2]]
        for n, pair in enumerate(pairs):
            np.savez(tmp_path / f"{k}{n}.npz", x=pair)
    (tmp_path / "my_reader.py").write_text(
        "import numpy as np\ndef samples():\n    for k in range(3):\n        yield {'x': np.full((1, 3, 4 + k, 4), k, np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    objects = np.empty(len(PICTURES), object)
    objects[:] = PICTURES
    for source in (tmp_path, [{"x": p[None]} for p in PICTURES], ({"x": p[None]} for p in PICTURES), {"x": PICTURES}, {"x": objects}):
        samples = data.read(source, FREE)
        assert samples.count == 6
        assert samples.alike().tolist() == [0, 2, 3]
        assert [p.tolist() for p in samples.batches(range(6), 2)] == [[0, 2], [3], [1, 4], [5]]
        assert [p.tolist() for p in samples.parts([5, 4, 3, 1], 2)] == [[0], [1, 3], [2]]
        np.testing.assert_array_equal(samples.take([4, 1])["x"], np.stack([PICTURES[4], PICTURES[1]]))
        first, last = samples.two_batches(4)
        np.testing.assert_array_equal(first["x"], np.stack([PICTURES[k] for k in (0, 2, 3, 0)]))
        np.testing.assert_array_equal(last["x"], np.stack([PICTURES[k] for k in (3, 2, 0, 3)]))
    made = data.read("my_reader:samples", FREE)
    assert [made.take([k])["x"].shape for k in range(3)] == [(1, 3, 4, 4), (1, 3, 5, 4), (1, 3, 6, 4)]


def test_feeds_of_one_size_are_one_array(tmp_path):
    feeds = [{"x": normal(3, 4, seed=k), "state": normal(2, 3, 3, seed=k), "rate": np.int64(8000)} for k in range(3)]
    samples = data.read(feeds, VAD)
    assert samples.count == 9
    assert {n: v.shape for n, v in samples.take([0, 1]).items()} == {"x": (2, 4), "state": (2, 2, 3), "rate": ()}
    np.testing.assert_array_equal(samples.take([3, 4, 5])["state"], feeds[1]["state"])
    other = data.read([*feeds, {**feeds[0], "rate": np.int64(16000)}], VAD)
    assert other.alike().tolist() == list(range(9))
    assert [p.tolist() for p in other.batches(range(7, 12), 8)] == [[7, 8], [9, 10, 11]]
    assert [int(other.take([k])["rate"]) for k in (8, 9)] == [8000, 16000]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no samples"),
        ([images(1)], "item 0 is a ndarray, not a mapping"),
        ([{"y": images(1)}], "feed 0 has no array for the model input 'x'"),
        ([{"x": PICTURES[0][None]}, {"x": PICTURES[1][None, :2]}], r"sample 1: input 'x' has shape \(1, 2, 6, 6\), but the model wants"),
        ({"x": [PICTURES[0], np.full((3, 2, 2), np.nan, np.float32)]}, "sample 1: input 'x' has NaN or Inf"),
        ("nowhere:samples", "data function nowhere:samples cannot be imported"),
        ("os:nothing", "data function os:nothing cannot be imported"),
        ("os:sep", "is no function"),
    ],
)
def test_bad_sources_are_told(source, message):
    with pytest.raises(DataError, match=message) as e:
        data.read(source, FREE)
    assert "\n" not in str(e.value)


def test_batches_of_different_sizes_in_one_feed_are_told():
    with pytest.raises(DataError, match="feed 0 has batches of different sizes: x: 3, state: 2"):
        data.read([{"x": normal(3, 4), "state": normal(2, 2, 3), "rate": np.int64(1)}], VAD)


def test_values_of_an_input_without_a_batch_must_be_as_many_as_the_samples():
    good = {"x": normal(3, 4), "state": normal(3, 2, 3)}
    with pytest.raises(DataError, match="different numbers of samples: x: 3, state: 3, rate: 2"):
        data.read({**good, "rate": [np.int64(1), np.int64(2)]}, VAD)
    assert data.read({**good, "rate": [np.int64(1), np.int64(2), np.int64(1)]}, VAD).alike().tolist() == [0, 2]


def test_too_few_of_one_size():
    fixed = parse("g (float[4,3,H,W] x) => (float[4,3,H,W] y) { y = Identity (x) }")
    with pytest.raises(DataError, match="3 samples of one size, but the model takes 4 at a time"):
        data.read({"x": PICTURES}, fixed)
