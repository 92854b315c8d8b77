from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx import data
from eptq_onnx.errors import DataError
from eptq_onnx.graph import replay
from eptq_onnx.method.arrange import agree, arrange, record, stacked_axis
from eptq_onnx.method.normalize import normalize
from eptq_onnx.ops import executed, recorded
from eptq_onnx.runtime import Session

X = normal(12, 4, 6)
W = {"w": normal(6, 5, seed=1)}


def arranged(text: str, source: Any = None, given: Any = None, **constants: np.ndarray):
    model = parse(text, {**W, **constants})
    plain = normalize(model, 13)
    return plain, arrange(plain, data.load({"x": X} if source is None else source, model, given).samples, 0)


def test_samples_that_do_not_disturb_each_other_go_into_one_batch():
    _, found = arranged("g (float[N,4,6] x) => (float[N,4,5] y) { y = MatMul (x, w) }")
    assert found.samples.fixed_batch is None
    assert not found.notes


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "m = ReduceMean <axes = [0]> (x)  d = Sub (x, m)  y = MatMul (d, w)",
            "two in one batch give another y than two runs",
        ),
        (
            "m = ReduceMax <axes = [0, 1, 2]> (x)  d = Div (x, m)  y = MatMul (d, w)",
            "two in one batch give another y than two runs",
        ),
        ("r = Reshape (x, one)  y = MatMul (r, w)", "two in one batch"),
    ],
    ids=["mean of the batch", "largest of the batch", "batch written in"],
)
def test_samples_that_do_run_one_at_a_time(body, why):
    _, found = arranged(f"g (float[N,4,6] x) => (float[N,4,5] y) {{ {body} }}", one=np.array([1, 4, 6]))
    assert found.samples.fixed_batch == 1
    assert found.samples.count == len(X)
    assert any(why in note for note in found.notes)


@pytest.mark.parametrize("shape", ["N,4,C", "N,C,6", "N,C,D", "N,4,6", "B,N,6"])
@pytest.mark.parametrize("count", [4, 6, 12])
def test_axes_that_are_open_without_being_a_batch_change_nothing(shape, count):
    """Where the batch matters, other axes are tried as the batch, and the model does not run on these."""
    body = "m = ReduceMean <axes = [0]> (x)  d = Sub (x, m)  e = MatMul (v, d)  y = MatMul (e, w)"
    text = f"g (float[{shape}] x) => (float y) {{ {body} }}"
    _, found = arranged(text, {"x": X[:count]}, v=normal(3, 4, seed=2))
    assert (found.samples.fixed_batch, found.samples.count) == (1, count)
    assert "two in one batch give another y than two runs" in found.notes[0]


def test_a_batch_that_only_the_graph_prescribes_is_found():
    body = "r = Reshape (x, four)  y = MatMul (r, w)"
    _, found = arranged(f"g (float[N,4,6] x) => (float[4,4,5] y) {{ {body} }}", four=np.array([4, 4, 6]))
    assert found.samples.fixed_batch == 4
    assert "samples run 4 at a time" in found.notes[0]


def test_a_prescribed_batch_whose_order_matters_is_one_sample():
    body = "s = CumSum (x, zero)  y = MatMul (s, w)"
    _, found = arranged(f"g (float[4,4,6] x) => (float[4,4,5] y) {{ {body} }}", zero=np.array(0))
    assert (found.samples.count, found.samples.fixed_batch) == (3, 1)
    np.testing.assert_array_equal(found.samples.take([1])["x"], X[4:8])


def test_the_axis_that_runs_is_the_batchs():
    """The first open axis is time; samples lie along the second."""
    text = "g (float[time,lot,6] x) => (float[time,lot,6] y) { y = CumSum (x, zero) }"
    _, found = arranged(text, zero=np.array(0))
    assert found.samples.layout == {"x": "batch axis 1"}


def test_one_array_may_be_one_run():
    text = "g (float[samples] x) => (float[rest] y) { u = Unsqueeze (x, axes)  y = Conv (u, v) }"
    _, found = arranged(text, {"x": normal(64)}, axes=np.array([0, 1]), v=normal(1, 1, 16))
    assert (found.samples.count, found.samples.fixed_batch) == (1, 1)


def test_what_runs_nowhere_is_told_in_a_sentence_about_batches():
    with pytest.raises(
        DataError,
        match=r"does not run on one sample of the calibration data \(x: \(1, 4, 6\)\)"
        r".*--batch-axis NAME=AXIS",
    ):
        arranged(
            "g (float[N,4,6] x) => (float[M,5] y) { r = Reshape (x, odd)  y = MatMul (r, w) }",
            odd=np.array([7, 6]),
        )


DRAWS = {
    "normal": "e = RandomNormalLike (x)  y = Add (x, e)",
    "uniform": "e = RandomUniformLike (x)  y = Mul (x, e)",
    "one for all": "e = RandomNormal <shape = [1, 4, 6]> ()  y = Add (x, e)",
    "dropout": "y, m = Dropout (x, ratio, yes)",
    "coins": "s = Sigmoid (x)  e = Bernoulli (s)  y = Mul (x, e)",
}
CHOICES = {
    "top": "v, i = TopK <axis = 1> (x, two)  y = Mul (v, v)",
    "unsorted places": "v, i = TopK <axis = 2> (x, two)  y = GatherElements <axis = 2> (x, i)",
    "rows": "p = Relu (x)  n = NonZero (p)  t = Transpose (n)  y = GatherND (x, t)",
    "hard": "h = Hardmax <axis = 2> (x)  y = Mul (x, h)",
    "compress": "q = Exp (x)  g = Greater (q, one)  k = Reshape (g, flat)  y = Compress (x, k)",
    "unique": "y = Unique (x)  z = Exp (y)",
}
CONSTANTS: dict[str, Any] = {
    "ratio": np.float32(0.3), "yes": np.array(True), "two": np.array([2]), "one": np.float32(1),
    "flat": np.array([-1]),
}  # fmt: skip


@pytest.mark.parametrize("body", [*DRAWS.values(), *CHOICES.values()], ids=[*DRAWS, *CHOICES])
def test_what_is_replayed_is_what_was_recorded(body):
    outputs = "float[a] y" if "Unique" not in body else "float[a] z"
    model, found = arranged(f"g (float[N,4,6] x) => ({outputs}) {{ {body} }}", **CONSTANTS)
    samples, played, _ = record(model, found.samples, seed=3)
    assert played.places
    assert all(p.draws == (body in DRAWS.values()) for p in played.places)
    again = Session(executed(model, played))
    recording, names = replay.recording(model, played.places, 3)
    session, plain = Session(recording), Session(model)
    for k in range(samples.count):
        feeds = samples.take([k])
        replayed = again.run(again.taken(feeds))
        values = session.run(session.taken(feeds))
        for place, name in zip(played.places, names, strict=True):
            np.testing.assert_array_equal(feeds[place.name].reshape(-1), values[name].reshape(-1))
        if body in CHOICES.values():
            for name, value in plain.run(plain.taken(feeds)).items():
                np.testing.assert_allclose(replayed[name], value, rtol=1e-6)
        repeated = again.run(again.taken(feeds))
        assert all(np.array_equal(value, repeated[name]) for name, value in replayed.items())


def test_random_numbers_are_no_constants():
    model = normalize(
        parse("g (float[N,4] x) => (float[N,4] y) { e = RandomNormal <shape = [1, 4]> ()  y = Add (x, e) }"),
        13,
    )
    assert [n.op_type for n in model.graph.node] == ["RandomNormal", "Add"]
    assert [p.name for p in replay.places_of(model, recorded)] == [f"recorded/{model.graph.node[0].name}/0"]


def test_a_choice_that_no_float_follows_from_is_not_recorded():
    model = normalize(
        parse("g (float[N,4,6] x) => (int64[N,4] y) { y = ArgMax <axis = 2, keepdims = 0> (x) }"), 13
    )
    assert replay.places_of(model, recorded) == ()


def test_values_agree_up_to_rounding():
    a = normal(5, 7)
    assert agree(a, a * np.float32(1 + 1e-5))
    assert not agree(a, a * np.float32(1.01))
    assert not agree(a, a.T)
    gone = a.copy()
    gone[0, 0] = np.nan
    assert agree(gone, gone)
    assert not agree(gone, a)
    assert stacked_axis(a, a + 1, np.concatenate([a, a + 1], 1)) == 1
    assert stacked_axis(a, a + 1, np.concatenate([a + 1, a], 1)) is None
    assert stacked_axis(a, a + 1, np.concatenate([a + 1, a], 1), values=False) == 1
