"""Python sources: tensors of other libraries, loaders, data sets, calibration readers, generators.

The libraries themselves are not installed for the tests: stand-ins have what they are recognised by.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eptq_onnx import Data, DataError, data

MODEL = small_convnet()
TWO = parse("g (float[N,3] a, int64[N,3] b) => (float[N,3] y) { c = Cast <to = 1> (b)  y = Add (a, c) }")
FREE = parse("g (float[N,T] x) => (float[N,T] y) { y = Identity (x) }")
X = images(10)
LABELS = np.arange(10)


class Torch:
    """A tensor of torch: in a gradient graph, on an accelerator."""

    def __init__(self, value: np.ndarray, kind: str = "", *, ready: bool = False) -> None:
        self.value, self.shape, self.dtype = value, value.shape, kind or f"torch.{value.dtype}"
        self.ndim, self.ready = value.ndim, ready

    def detach(self) -> Torch:
        return self

    def cpu(self) -> Torch:
        return Torch(self.value, self.dtype, ready=True)

    def float(self) -> Torch:
        return Torch(self.value.astype(np.float32), ready=self.ready)

    def numpy(self) -> np.ndarray:
        if not self.ready or self.dtype == "torch.bfloat16":
            raise TypeError("can't convert to numpy")
        return self.value

    def __getitem__(self, place: Any) -> Torch:
        return Torch(self.value[place], self.dtype)

    def __len__(self) -> int:
        return len(self.value)


class TensorFlow:
    """An eager tensor of TensorFlow."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def numpy(self) -> np.ndarray:
        return self.value


class Jax:
    """An array that numpy converts."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.shape, self.dtype = value, value.shape, value.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.value


TENSORS = [np.asarray, Torch, TensorFlow, Jax]


class Loader:
    """A DataLoader of torch."""

    def __init__(self, items: list[Any], size: int | None = 4) -> None:
        self.dataset, self.batch_size, self.items = items, size, items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class Rows:
    """A Dataset of torch: indexed, without an iterator."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __getitem__(self, k: int) -> Any:
        return self.items[k]

    def __len__(self) -> int:
        return len(self.items)


class Table(Rows):
    """A Dataset of Hugging Face."""

    @property
    def column_names(self) -> list[str]:
        return list(self.items[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Calibration:
    """onnxruntime's CalibrationDataReader."""

    def __init__(self, feeds: list[Any]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)


def batches(*values: np.ndarray) -> list[list[np.ndarray]]:
    """Batches of 4, 4 and 2, as a loader of torch collates them."""
    return [[v[k : k + 4] for v in values] for k in (0, 4, 8)]


def loaded(source: Any, model: Any = MODEL, **options: Any) -> data.Candidates:
    return data.load(Data(source, **options), model)


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize(
    "source",
    [
        lambda t: t(X),
        lambda t: {"image": t(X)},
        lambda t: {"image": [t(x) for x in X]},
        lambda t: {"picture": t(X)},
        lambda t: [t(x) for x in X],
        lambda t: [t(x[None]) for x in X],
        lambda t: (t(x) for x in X),
        lambda t: ((t(x), k) for k, x in enumerate(X)),
        lambda t: [{"image": t(x)} for x in X],
        lambda t: Loader([t(b) for (b,) in batches(X)]),
        lambda t: Loader([[t(b), t(y)] for b, y in batches(X, LABELS)]),
        lambda t: Loader([(t(b), t(y)) for b, y in batches(X, LABELS)]),
        lambda t: Loader([{"image": t(b), "label": t(y)} for b, y in batches(X, LABELS)]),
        lambda t: Loader([({"image": t(b)}, t(y)) for b, y in batches(X, LABELS)]),
        lambda t: Loader([{"pixel_values": t(b), "labels": t(y)} for b, y in batches(X, LABELS)]),
        lambda t: Loader([[t(x), k] for k, x in enumerate(X)], None),
        lambda t: Rows([(t(x), k) for k, x in enumerate(X)]),
        lambda t: Table([{"image": t(x), "label": k} for k, x in enumerate(X)]),
        lambda t: Table([{"image": x.tolist(), "label": k} for k, x in enumerate(X)]),
        lambda t: Table([{"pixels": x.tolist(), "label": k, "boxes": [[1], [2, 3]]} for k, x in enumerate(X)]),
    ],
)  # fmt: skip
def test_samples_come_out_whatever_holds_them(tensor, source):
    found = loaded(source(tensor))
    samples = found.samples[0]
    assert (samples.count, samples.fixed_batch) == (10, None)
    np.testing.assert_array_equal(samples.take(range(10))["image"], X)
    assert samples.take([0])["image"].dtype == np.float32


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("stream", [list, iter, Calibration])
def test_feeds_are_runs_and_stay_whole(tensor, stream):
    feeds = [{"image": tensor(X[:3])}, {"image": tensor(X[3:6])}]
    samples = loaded(stream(feeds)).samples[0]
    assert (samples.count, samples.fixed_batch, samples.rows) == (2, 1, 3)
    np.testing.assert_array_equal(samples.take([1])["image"], X[3:6])


def test_a_tensor_without_a_type_in_numpy_is_widened():
    assert loaded(Torch(X, "torch.bfloat16")).samples[0].count == 10


def test_what_is_left_out_or_taken_for_an_input_is_told():
    items = [({"pixels": b, "mask": b[:, 0]}, y) for b, y in batches(X, LABELS)]
    notes = loaded(Loader(items)).origin.notes
    assert notes == (
        "'mask' (float32 (4, 8, 8)) of the items is left out: the model takes 'image'",
        "'part 1' (int64 (4,)) of the items is left out: the model takes 'image'",
        "the array 'pixels' was taken for the model's only input, 'image'",
    )
    assert loaded({"pixels": X}).origin.notes == (
        "the array 'pixels' was taken for the model's only input, 'image'",
    )


def test_tuples_hold_inputs_in_order():
    a, b = normal(10, 3), np.arange(30).reshape(10, 3)
    for items in (batches(a, b, LABELS), [((x, y), z) for x, y, z in batches(a, b, LABELS)]):
        samples = loaded(Loader(items), TWO).samples[0]
        np.testing.assert_array_equal(samples.take(range(10))["a"], a)
        np.testing.assert_array_equal(samples.take(range(10))["b"], b)


def test_batches_of_several_lengths_become_samples_of_several_lengths():
    items = [normal(4, 5), normal(4, 7), normal(2, 5)]
    samples = loaded(Loader(items), FREE).samples[0]
    assert samples.count == 10
    assert len(samples.alike()) == 6


def test_a_model_with_its_batch_written_in_takes_batches_of_any_size():
    fixed = small_convnet()
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert loaded(Loader(batches(X, LABELS)), fixed).samples[0].count == 10


@pytest.mark.parametrize(
    ("limit", "source", "wanted"),
    [
        (3, lambda: X, [0, 4, 9]),
        (3, lambda: {"image": X}, [0, 4, 9]),
        (3, lambda: {"image": list(X)}, [0, 4, 9]),
        (3, lambda: list(X), [0, 4, 9]),
        (3, lambda: [{"image": x[None]} for x in X], [0, 4, 9]),
        (3, lambda: Rows(list(X)), [0, 4, 9]),
        (3, lambda: Table([{"image": x} for x in X]), [0, 4, 9]),
        (3, lambda: iter(X), [0, 1, 2]),
        (3, lambda: Calibration([{"image": x[None]} for x in X]), [0, 1, 2]),
        (6, lambda: Loader(batches(X, LABELS)), [0, 1, 3, 4, 6, 7]),
        (10, lambda: iter(X), list(range(10))),
        (99, lambda: X, list(range(10))),
    ],
)
def test_samples_are_spread_over_what_is_there_and_the_first_of_what_comes(limit, source, wanted):
    found = loaded(source(), samples=limit)
    samples = found.samples[0]
    assert samples.count == len(wanted)
    for k, place in enumerate(wanted):
        np.testing.assert_array_equal(samples.take([k])["image"].reshape(3, 8, 8), X[place])
    told = any("the first ones" in note for note in found.origin.notes)
    assert told == (limit < 10 and isinstance(source(), (Iterator, Calibration, Loader)))


class Tracked(np.ndarray):
    """An array that can be watched."""


def test_what_comes_one_by_one_is_never_held_all_at_once():
    alive: list[weakref.ref[Any]] = []
    most = 0

    def items() -> Iterator[Any]:
        nonlocal most
        for x in X:
            most = max(most, sum(r() is not None for r in alive))
            value = x.copy().view(Tracked)
            alive.append(weakref.ref(value))
            yield {"image": value[None].view(np.ndarray)}

    samples = loaded(items()).samples[0]
    np.testing.assert_array_equal(samples.take([9])["image"], X[9:])
    assert most <= 2


def test_an_endless_generator_ends_at_the_samples_that_are_wanted():
    def items() -> Iterator[Any]:
        while True:
            yield X[0]

    assert loaded(items(), samples=5).samples[0].count == 5


def test_pictures_in_rows_are_prepared_like_files():
    model = parse("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Identity (x) }")
    rows = [{"image": Image.new("RGB", (20, 10), (k, 0, 0)), "label": k} for k in range(4)]
    found = loaded(Table(rows), model, image="raw")
    np.testing.assert_array_equal(found.samples[0].take(range(4))["x"][:, 0, 0, 0], range(4))
    assert found.origin.recipe["image"].startswith("size=8,")
    assert loaded([Image.new("L", (20, 10), 9)] * 4, model, image="raw").samples[0].count == 4


class Odd:
    """Pretends to be a tensor."""

    shape, dtype = (1,), "float32"

    def numpy(self) -> np.ndarray:
        raise RuntimeError("no\nway")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "has no samples"),
        (iter(()), "has no samples"),
        (Loader([]), "has no samples"),
        (Calibration([]), "has no samples"),
        ([()], "item 0 has no array for the model input 'image'.*the item has nothing"),
        ([None], "item 0 is a NoneType, not a mapping"),
        (["photo.jpg"], "item 0 is a str, not a mapping"),
        ([{"a": X, "b": X}], r"item 0 has no array .*the item has 'a' float32 \(10, 3, 8, 8\); 'b' float32"),
        ([X, None], "item 1 is a NoneType"),
        ([Odd()], "item 0, 'image', is a Odd that is no array: no way"),
        ([[[1, 2], [3]]], "item 0, 'image', is a list that is no array"),
        ([X[:, :2]], r"input 'image' has shape \(10, 2, 8, 8\)"),
        ([X.astype(np.float64)], "has type float64, but the model wants float32"),
        ([normal(4)], r"feed 0: input 'image' has shape \(4,\)"),
        (3, "is a int, from which nothing can be read"),
        ({"train": Table([{"image": X[0]}])}, r"several splits: give one of them, such as data\['train'\]"),
        ({"image": [[1, 2], [3]]}, "'image' is a list that is no array"),
        ({}, "has no array for the model input 'image'"),
    ],
)
def test_what_holds_no_samples_is_told(source, message):
    with pytest.raises(DataError, match=message) as e:
        loaded(source)
    assert "\n" not in str(e.value)


def test_a_batch_of_arrays_that_do_not_go_together_is_told():
    with pytest.raises(DataError, match=r"item 0 is no batch: .*a: \(4, 3\), b: \(5, 3\)"):
        loaded(Loader([(normal(4, 3), np.ones((5, 3), np.int64))]), TWO)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.booleans(), st.data())
def test_any_split_into_batches_gives_the_same_samples(sizes, named, labelled, drawn):
    values = normal(sum(sizes), 6)
    parts = np.split(values, np.cumsum(sizes)[:-1])
    tensor = drawn.draw(st.sampled_from(TENSORS))
    items: list[Any] = []
    for part in parts:
        item: Any = {"x": tensor(part)} if named else tensor(part)
        items.append((item, np.zeros(len(part))) if labelled else item)
    samples = loaded(Loader(items), FREE).samples[0]
    np.testing.assert_array_equal(samples.take(range(samples.count))["x"], values)


# ---- made up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Identity (x) }",
        "g (float[4,3] x) => (float[4,3] y) { y = Identity (x) }",
        "g (float[A,B,3] x, float[3] s) => (float[A,B,3] y) { y = Identity (x) }",
        "g (uint8[N,8,8,3] x) => (uint8[N,8,8,3] y) { y = Identity (x) }",
        "g (float16[N,T] x, bool[N,T] m) => (float16[N,T] y) { y = Identity (x) }",
        "g (float[2,batch,3] state, float[batch,4] x, int64 rate) => (float[2,batch,3] y) { y = Identity (state) }",
    ],
)
def test_random_fits_every_model(model):
    found = loaded("random", parse(model))
    assert found.origin.made_up
    assert found.samples[0].count >= 8
    first, second = (next(iter(found.samples[0].take([k]).values())) for k in (0, 1))
    assert not np.array_equal(first, second)


def test_random_numbers_of_rows_are_in_the_table():
    model = parse(
        "g (int64[N,T] ids, int64[N,T] attention_mask) => (float[N,T,2] y) { y = Gather (table, ids) }",
        {"table": normal(5, 2)},
    )
    feeds = loaded("random", model, samples=7).samples[0].take(range(7))
    assert set(np.unique(feeds["ids"])) == set(range(5))
    assert (feeds["attention_mask"] == 1).all()
    with pytest.raises(DataError, match="nothing can be made up for the input 'x' text"):
        loaded("random", parse("g (string[N] x) => (string[N] y) { y = Identity (x) }"))
