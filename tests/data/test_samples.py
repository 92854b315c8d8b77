from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse, small_convnet

from eptq_onnx import data
from eptq_onnx.data import layouts
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
        ({"picture": images(5), "mask": images(5)}, "no array for the model input 'image' .*'picture'"),
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


VAD = parse(
    "g (float[batch,4] x, float[2,batch,3] state, int64 rate) => (float[batch,4] y) { y = Identity (x) }"
)


def test_a_batch_on_another_axis_and_an_input_without_one():
    state = normal(5, 2, 3)
    given: dict[str, Any] = {"x": normal(5, 4), "state": state, "rate": np.int64(16000)}
    samples = data.read(given, VAD)
    assert samples.count == 5
    assert samples.fixed_batch is None
    feeds = samples.take([4, 0])
    np.testing.assert_array_equal(feeds["state"][:, 0], state[4])
    np.testing.assert_array_equal(feeds["state"][:, 1], state[0])
    assert feeds["rate"] == 16000


@pytest.mark.parametrize(
    ("inputs", "axes"),
    [
        ([["n", 3], [2, "n", 5]], [0, 1]),
        ([[None, None], [2, None, 5], []], [0, 1, None]),
        ([[1, 576], [2, 1, 128]], [0, 1]),
        ([["length", 576], [1, 1, 128]], [0, 0]),
        ([[4, 3], [7]], [0, None]),
        ([None, ["n"]], [0, 0]),
        ([["time", "batch", 80]], [1]),
        ([["N", "phonemes"], ["N"], [3]], [0, 0, None]),
        ([["batch", 3], [2, 1, 128], []], [0, 1, None]),
    ],
)
def test_where_the_batch_is(inputs, axes):
    named = {f"x{k}": dims for k, dims in enumerate(inputs)}
    assert list(layouts.batch_axes(named, {})[0].values()) == axes


def test_inputs_without_a_batch_are_checked_too():
    good: dict[str, Any] = {"x": normal(5, 4), "state": normal(5, 2, 3), "rate": np.int64(16000)}
    with pytest.raises(
        DataError,
        match=r"'rate' has shape \(5, 1\), but the model wants \(samples\), "
        r"the same value for all samples, or",
    ):
        data.read({**good, "rate": np.full((5, 1), 16000)}, VAD)
    with pytest.raises(
        DataError, match=r"'state' has shape \(2, 5, 3\), but the model wants \(samples, 2, 3\)"
    ):
        data.read({**good, "state": normal(2, 5, 3)}, VAD)


def test_an_array_with_one_axis_more_holds_what_each_run_takes():
    state, rates = normal(5, 2, 1, 3), np.array([8, 16, 8, 8, 16]) * 1000
    samples = data.read({"x": normal(5, 4), "state": state, "rate": rates}, VAD)
    assert samples.count == 5
    assert samples.fixed_batch == 1
    np.testing.assert_array_equal(samples.take([3])["state"], state[3])
    assert [int(samples.take([k])["rate"]) for k in range(5)] == rates.tolist()
    same = data.read({"x": normal(5, 4), "state": state, "rate": np.full(5, 8000)}, VAD)
    assert same.fixed_batch is None
    np.testing.assert_array_equal(same.take([3, 1])["state"], state[[3, 1], :, 0].swapaxes(0, 1))
    assert same.layout == {
        "x": "batch axis 0",
        "state": "batch axis 1",
        "rate": "no batch axis: one value for all samples",
    }


PICTURE = parse("g (float[3,H,W] x) => (float[3,H,W] y) { y = Identity (x) }")
SOUND = parse("g (float[samples] x) => (float[samples] y) { y = Identity (x) }")
SPEECH = parse("g (int64[N,T] text, float[3] scales) => (int64[N,T] y) { y = Identity (text) }")


def test_inputs_without_a_batch_axis_take_one_entry_a_run(tmp_path):
    for model, one in ((PICTURE, (3, 6, 5)), (SOUND, (40,))):
        x = normal(7, *one)
        for k, value in enumerate(x):
            np.savez(tmp_path / f"{len(one)}{k}.npz", x=value)
        feeds = [{"x": value} for value in x]
        for source in ({"x": x}, {"x": list(x)}, feeds, iter(feeds)):
            samples = data.read(source, model)
            assert (samples.count, samples.fixed_batch) == (7, 1)
            np.testing.assert_array_equal(samples.take([4])["x"], x[4])
    lone = data.load({"x": x[0]}, SOUND).samples
    assert [s.count for s in lone] == [40, 1]
    np.testing.assert_array_equal(lone[1].take([0])["x"], x[0])


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_vector_beside_an_open_batch_is_one_value_for_all(count):
    scales = np.array([0.6, 1, 0.8], np.float32)
    text = np.arange(4 * count).reshape(count, 4)
    for value in (scales, np.tile(scales, (count, 1))):
        samples = data.read({"text": text, "scales": value}, SPEECH)
        assert samples.count == count
        np.testing.assert_array_equal(samples.take([0, 1])["scales"], scales)


def test_the_batch_axis_can_be_said():
    twice = {"x": normal(6, 2, 3)}
    model = parse("g (float[A,B,3] x) => (float[A,B,3] y) { y = Identity (x) }")
    assert data.read(twice, model, {"x": 0}).take([1])["x"].shape == (1, 2, 3)
    assert data.read(twice, model, {"x": 1}).take([1])["x"].shape == (2, 1, 3)
    assert data.read(twice, model, {"x": None}).take([0])["x"].shape == (6, 2, 3)
    with pytest.raises(DataError, match="batch axis of 'z': the model has no such input"):
        data.read(twice, model, {"z": 0})
    with pytest.raises(DataError, match="batch axis 3 of 'x': the input has 3 axes"):
        data.read(twice, model, {"x": 3})


FREE = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Identity (x) }")
SIZES = [8, 6, 8, 8, 6, 4]
PICTURES = [images(1, size=s, seed=k)[0] for k, s in enumerate(SIZES)]


def test_lists_and_arrays_of_objects_are_samples_of_any_size():
    objects = np.empty(len(PICTURES), object)
    objects[:] = PICTURES
    for source in ({"x": PICTURES}, {"x": objects}, {"x": [p[None] for p in PICTURES]}):
        samples = data.read(source, FREE)
        assert samples.count == 6
        assert samples.alike().tolist() == [0, 2, 3]
        assert [p.tolist() for p in samples.batches(range(6), 2)] == [[0, 2], [3], [1, 4], [5]]
        assert [p.tolist() for p in samples.parts([5, 4, 3, 1], 2)] == [[0], [1, 3], [2]]
        np.testing.assert_array_equal(samples.take([4, 1])["x"], np.stack([PICTURES[4], PICTURES[1]]))
        first, last = samples.two_batches(4)
        np.testing.assert_array_equal(first["x"], np.stack([PICTURES[k] for k in (0, 2, 3, 0)]))
        np.testing.assert_array_equal(last["x"], np.stack([PICTURES[k] for k in (3, 2, 0, 3)]))
        some = samples.only([5, 4, 1])
        assert some.alike().tolist() == [1, 2]
        np.testing.assert_array_equal(some.take([2, 1])["x"], np.stack([PICTURES[1], PICTURES[4]]))


def test_a_feed_is_never_cut_up(tmp_path, monkeypatch):
    feeds: list[dict[str, Any]] = [
        {
            "x": normal(2 + k % 2, 4, seed=k),
            "state": normal(2, 2 + k % 2, 3, seed=k),
            "rate": np.int64(8000 + k),
        }
        for k in range(5)
    ]
    for k, feed in enumerate(feeds):
        np.savez(tmp_path / f"{k}.npz", **feed)
    (tmp_path / "my_reader.py").write_text(
        "import numpy as np\ndef samples():\n    for k in range(5):\n"
        "        yield dict(np.load(f'{k}.npz'))\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for k in range(5):
        (tmp_path / "folder" / f"{k}.npz").write_bytes((tmp_path / f"{k}.npz").read_bytes())
    sources: list[Any] = [feeds, iter(feeds), tmp_path / "folder", "my_reader:samples"]
    for source in sources:
        samples = data.read(source, VAD)
        assert (samples.count, samples.micro_batch(16)) == (5, 1)
        assert samples.alike().tolist() == [0, 2, 4]
        for k, feed in enumerate(feeds):
            for name, value in samples.take([k]).items():
                np.testing.assert_array_equal(value, feed[name])


@pytest.mark.parametrize(("shape", "rows"), [((16, 3, 8, 8), 16), ((1, 3, 8, 8), 1)])
def test_a_feed_counts_as_many_rows_as_it_holds(shape, rows):
    assert data.read([{"image": np.zeros(shape, np.float32)}] * 3, MODEL).rows == rows
    assert data.read([{"x": np.zeros(40, np.float32)}] * 3, SOUND).rows == 1
    assert data.read([{"x": np.zeros((3, 6, 5), np.float32)}] * 3, PICTURE).rows == 1


def test_samples_that_cannot_be_told_apart_are_grouped():
    samples = data.read(images(10), MODEL).grouped(4)
    assert (samples.count, samples.fixed_batch) == (2, 1)
    np.testing.assert_array_equal(samples.take([1])["image"], images(10)[4:8])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no samples"),
        (["x"], "item 0 is a str, not a mapping"),
        ([{"y": images(1), "z": images(1)}], "item 0 has no array for the model input 'x'"),
        (
            [{"x": PICTURES[0][None]}, {"x": PICTURES[1][None, :2]}],
            r"feed 1: input 'x' has shape \(1, 2, 6, 6\), "
            r"but the model wants \(any, 3, any, any\) in one run",
        ),
        ({"x": [PICTURES[0], np.full((3, 2, 2), np.nan, np.float32)]}, "sample 1: input 'x' has NaN or Inf"),
        ("nowhere:samples", "data function nowhere:samples: there is no module nowhere"),
        ("os:nothing", "data function os:nothing: the module os has no function nothing"),
        ("os:sep", "the module os has no function sep"),
    ],
)
def test_bad_sources_are_told(source, message):
    with pytest.raises(DataError, match=message) as e:
        data.read(source, FREE)
    assert "\n" not in str(e.value)


def test_values_of_an_input_without_a_batch_must_be_as_many_as_the_samples():
    good: dict[str, Any] = {"x": normal(3, 4), "state": normal(3, 2, 3)}
    with pytest.raises(DataError, match="different numbers of samples: x: 3, state: 3, rate: 2"):
        data.read({**good, "rate": [np.int64(1), np.int64(2)]}, VAD)
    assert data.read({**good, "rate": [np.int64(1), np.int64(2), np.int64(1)]}, VAD).fixed_batch == 1


def test_too_few_of_one_size():
    fixed = parse("g (float[4,3,H,W] x) => (float[4,3,H,W] y) { y = Identity (x) }")
    with pytest.raises(DataError, match="3 samples of one size, but the model takes 4 at a time"):
        data.read({"x": PICTURES}, fixed)
