from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.data.layouts import Column
from eptq_onnx.data.notes import FEWEST, sample_notes
from eptq_onnx.data.samples import Samples

COUNT = 40


def inputs(kind: str, count: int = COUNT, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (
        random.standard_normal((count, 3, 4)).astype(np.float32)
        if kind == "float"
        else random.integers(1, 99, (count, 12))
    )


def notes_of(*arrays: np.ndarray, **named: np.ndarray) -> list[str]:
    values = {**{f"x{k}": a for k, a in enumerate(arrays)}, **named}
    return sample_notes(Samples({name: Column(a, 0) for name, a in values.items()}, None))


@pytest.mark.parametrize("kind", ["float", "int"])
def test_good_samples_need_no_note(kind):
    assert notes_of(inputs(kind)) == []


@pytest.mark.parametrize("count", [1, 2, FEWEST - 1])
def test_few_samples(count):
    (note,) = notes_of(inputs("float", count))
    assert note.startswith(f"{count} sample{'s' if count > 1 else ''}: ")
    assert f"give {FEWEST} at least" in note


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["float", "int"]),
    st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=9),
    st.sampled_from(["zero", "constant", "copy"]),
)
def test_what_is_wrong_with_some_is_counted_and_the_first_named(kind, places, fault):
    array = inputs(kind)
    order = sorted(places)
    if fault == "copy":
        source = next(k for k in range(COUNT) if k not in places)
        array[order] = array[source]
        (note,) = notes_of(array)
        copies = [k for k in sorted([*order, source])][1:]
        verb = "is" if len(places) == 1 else "are"
        assert note.startswith(
            f"{len(places)} of {COUNT} samples {verb} copies of others (sample {copies[0]} is "
        )
        assert "give each sample once" in note
        return
    for n, k in enumerate(order):
        array[k] = 0 if fault == "zero" else n + 1  # none is a copy of another
    note = notes_of(array)[0]
    verb = "is" if len(order) == 1 else "are"
    assert note.startswith(f"{len(order)} of {COUNT} samples (the first: sample {order[0]}) {verb} ")
    assert ("all zero" if fault == "zero" else "constant (one value") in note
    assert "leave them out" in note
    assert len(notes_of(array)) == 1 + (fault == "zero" and len(order) > 1)


def test_masks_and_types_are_no_faults():
    """Inputs of a language model are a mask of ones, types of zeros, and varying ids."""
    mask, types = np.ones((COUNT, 12), np.int64), np.zeros((COUNT, 12), np.int64)
    assert notes_of(inputs("int"), mask, types) == []
    assert len(notes_of(np.zeros_like(inputs("int")), mask, types)) == 2  # and copies of each other
    assert notes_of(inputs("float"), np.ones((COUNT, 1), np.float32)) == []


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_float_input_that_never_varies_is_named(value):
    """The state of a recurrent network is often zero throughout."""
    (note,) = notes_of(inputs("float"), h0=np.full((COUNT, 2, 8), value, np.float32))
    assert note.startswith("input 'h0' is constant in every sample")
    other = np.full((COUNT, 2, 8), value, np.float32)
    other[3, 0, 0] += 1
    assert notes_of(inputs("float"), h0=other) == []


def test_inputs_without_a_batch_axis_and_samples_of_other_sizes():
    ragged: list[np.ndarray] = [
        np.random.default_rng(k).standard_normal((2 + k % 5, 3)).astype(np.float32) for k in range(COUNT)
    ]
    ragged[7] = ragged[2].copy()
    samples = Samples({"x": Column(ragged, 0), "rate": Column(np.array(16000), shared=True)}, None)
    (note,) = sample_notes(samples)
    assert "(sample 7 is sample 2 again)" in note


def test_single_values_are_no_constant_samples():
    assert notes_of(np.arange(COUNT, dtype=np.float32).reshape(COUNT, 1)) == []
