from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from graphs import images, small_convnet
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx import parallel
from eptq_onnx.engines.base import GradientSession
from eptq_onnx.errors import GradientError
from eptq_onnx.parallel import Threads, working_on
from eptq_onnx.runtime import ExactSession, Session
from eptq_onnx.workers import packing
from eptq_onnx.workers.packing import Kept, Packer, unpacked


class Store:
    """Entries, as arrays that nobody can change."""

    def __init__(self):
        self.entries: list[list[np.ndarray]] = []

    def put(self, arrays):
        self.entries.append([np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape) for a in arrays])
        return len(self.entries) - 1

    def read(self, message):
        arrays = [self.entries[message.entries[e]][k] for e, k in message.places]
        return unpacked(message.head, arrays)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def packer(store):
    return Packer(pickle.Pickler, store.put)


def large(value=1.0, count=packing.LEAST):
    return np.full(count, value, np.float32)


shapes = st.lists(st.sampled_from([(), (0,), (3,), (packing.LEAST,), (2, packing.LEAST)]), max_size=5)


@given(st.permutations(range(3)), st.booleans(), st.sampled_from([4, 300]))
def test_axes_keep_their_order_in_memory(axes, turned, size):
    array = np.arange(size * 12 * 16, dtype=np.float32).reshape(size, 12, 16).transpose(axes)
    array = array[:, ::-1] if turned else array
    store = Store()
    found = store.read(Packer(pickle.Pickler, store.put).packed([array], Kept(lasting=False)))[0]
    np.testing.assert_array_equal(found, array)
    assert found.strides == np.copy(array, "K").strides
    head, arrays = Packer(pickle.Pickler, store.put).split([array])
    assert unpacked(head, arrays)[0].strides == found.strides


@given(shapes, st.sampled_from(["f4", "f8", "i1", "U3", "?"]), st.booleans())
def test_values_arrive_as_they_were(shapes, kind, frozen):
    store = Store()
    arrays = [np.arange(np.prod(s, dtype=int)).astype(kind).reshape(s) for s in shapes]
    for array in arrays:
        array.flags.writeable = not frozen
    value: dict[str, Any] = {
        "arrays": arrays,
        "again": arrays[:1],
        "turned": [a.T for a in arrays],
        "rest": (1, "x", None),
    }
    found = store.read(Packer(pickle.Pickler, store.put).packed(value, Kept(lasting=False)))
    assert found.keys() == value.keys()
    assert found["rest"] == value["rest"]
    for name in ("arrays", "again", "turned"):
        for got, expected in zip(found[name], value[name], strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


def test_small_arrays_travel_in_the_message(store, packer):
    message = packer.packed([np.arange(9)], Kept(lasting=False))
    assert not message.entries
    assert not store.entries


def test_an_array_is_stored_once_in_a_map(store, packer):
    kept, shared = Kept(lasting=False), large()
    for k in range(5):
        packer.packed({"weights": shared, "x": np.arange(k)}, kept)
    assert len(store.entries) == 1


def test_what_may_have_changed_is_stored_again_in_the_next_map(store, packer):
    array = large()
    packer.packed(array, Kept(lasting=False))
    array[:] = 2
    assert store.read(packer.packed(array, Kept(lasting=False)))[0] == 2


def test_a_view_of_what_may_change_counts_as_such(store, packer):
    array = large()
    view = array.view()
    view.flags.writeable = False
    packer.packed(view, Kept(lasting=False))
    array[:] = 2
    assert store.read(packer.packed(view, Kept(lasting=False)))[0] == 2


def test_what_nobody_can_change_is_stored_once(store, packer):
    array = large()
    array.flags.writeable = False
    for _ in range(3):
        packer.packed([array], Kept(lasting=False))
    assert len(store.entries) == 1


def test_an_array_that_is_gone_is_not_taken_for_the_next_in_its_place(store, packer):
    for value in range(20):
        array = large(value)
        array.flags.writeable = False
        assert store.read(packer.packed([array], Kept(lasting=False)))[0][0] == value
        del array


def test_results_are_not_stored_again(store, packer):
    head, arrays = packer.split({"y": large(3)})
    entry = store.put(arrays)
    found = packer.joined(head, store.entries[entry], entry)
    message = packer.packed({"x": found["y"]}, Kept(lasting=False))
    assert message.entries == [entry]
    assert len(store.entries) == 1


def test_what_the_store_has_lost_is_stored_again(store, packer):
    array = large()
    array.flags.writeable = False
    packer.packed([array], Kept(lasting=False))
    packer.forget()
    packer.packed([array], Kept(lasting=False))
    assert len(store.entries) == 2


class Distant(Threads):
    """Threads that say that they are elsewhere."""

    distant = True


@pytest.mark.parametrize("kind", [Session, ExactSession, GradientSession])
def test_a_session_is_made_again_once(kind, store, packer):
    with working_on(Distant()):
        session = kind(small_convnet(), integers=False)
    message = packer.packed(session, Kept(lasting=False))
    first, second = store.read(message), store.read(message)
    assert first is second
    assert type(first) is kind
    feeds = {"image": images(2)}
    for name, value in session.run(feeds).items():
        np.testing.assert_array_equal(first.run(feeds)[name], value)


def test_sessions_with_other_options_are_others(store, packer):
    with working_on(Distant()):
        sessions = [Session(small_convnet(), integers=i) for i in (True, False)]
    found = [store.read(packer.packed(s, Kept(lasting=False))) for s in sessions]
    assert found[0] is not found[1]


def test_a_session_of_a_run_in_threads_keeps_no_model():
    assert not parallel.are_distant()
    with pytest.raises(TypeError, match="for distant workers"):
        pickle.dumps(Session(small_convnet()))


def test_errors_of_the_package_travel():
    assert str(pickle.loads(pickle.dumps(GradientError("no.")))) == "no."
