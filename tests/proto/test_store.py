from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, normal, small_convnet

from eptq_onnx import Config, ModelError, OutputError, quantize
from eptq_onnx.graph import io
from eptq_onnx.graph.view import opset_of
from eptq_onnx.graph.widen import widen
from eptq_onnx.proto import store
from eptq_onnx.proto.weights import stored
from eptq_onnx.runtime import Session


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "_HEAVY", 256)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, bool])
def test_a_value_survives_the_round_trip(tmp_path, dtype):
    value = (normal(130, 70, 9) * 3).astype(dtype)
    tensor = store.constant(value, "w", str(tmp_path))
    assert store.is_stored(tensor)
    assert store.value_bytes(tensor) == value.nbytes
    np.testing.assert_array_equal(store.array(tensor), value)
    again = store.stored(onnx.numpy_helper.from_array(value, "w"), str(tmp_path))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(store.loaded(again)), value)


def test_small_weights_stay_in_memory_and_nothing_is_stored_without_a_folder(tmp_path):
    assert not store.is_stored(store.constant(normal(5), "w", str(tmp_path)))
    assert not store.is_stored(store.constant(normal(200, 200), "w", None))


def test_a_stored_model_runs_and_loads_back_unchanged(tmp_path, everything_is_large):
    model = small_convnet()
    apart = stored(model, str(tmp_path))
    assert store.folder_of(apart) == str(tmp_path)
    assert len(apart.SerializeToString()) < len(model.SerializeToString())
    np.testing.assert_array_equal(
        Session(apart).run({"image": images(2)})["logits"], Session(model).run({"image": images(2)})["logits"]
    )
    assert {p.suffix for p in tmp_path.iterdir()} == {".weight"}
    back = store.load_all(apart)
    assert [onnx.numpy_helper.to_array(t).tobytes() for t in back.graph.initializer] == [
        onnx.numpy_helper.to_array(t).tobytes() for t in model.graph.initializer
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "fast"},
        {"weight_bits": 4, "steps": 3},
        {"weight_bits": 4, "start": "nearest", "steps": 2, "engine": "standard"},
    ],
    ids=["fast", "loop", "standard"],
)
def test_a_large_model_is_quantized_as_it_would_be_in_memory(tmp_path, monkeypatch, options):
    config, data = Config(**options), {"image": images(12)}
    expected = quantize(small_convnet(), data, config)
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "_HEAVY", 256)
    onnx.save(
        small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    for source in (tmp_path / "m.onnx", small_convnet()):
        got = quantize(source, data, config)
        assert store.folder_of(got.model) is None
        assert got.report.verification.quantized_bytes > 0
        assert opset_of(got.model) == opset_of(expected.model)
        here, there = (
            {t.name: store.array(t) for t in m.graph.initializer} for m in (got.model, expected.model)
        )
        assert here.keys() == there.keys()
        for name, value in there.items():
            np.testing.assert_allclose(here[name], value, rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.data", "m.onnx"]


def test_weights_in_files_give_the_same_bytes_as_weights_in_memory(monkeypatch):
    # Nothing but copies of graphs depends on where the weights are, unless memory is saved.
    config, data = Config(weight_bits=4, steps=0), {"image": images(12)}
    expected = quantize(small_convnet(), data, config).model.SerializeToString(deterministic=True)
    monkeypatch.setattr(store, "APART", 0)
    monkeypatch.setattr(store, "_HEAVY", 256)
    found = quantize(small_convnet(), data, config).model
    assert store.folder_of(found) is None
    assert found.SerializeToString(deterministic=True) == expected


def test_half_precision_weights_are_widened_in_their_folder(tmp_path, everything_is_large):

    model = small_convnet()
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(
                    onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name
                )
            )
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    wide = widen(stored(model, str(tmp_path)))
    heavy = [t for t in wide.graph.initializer if store.is_stored(t)]
    assert heavy
    assert all(t.data_type == onnx.TensorProto.FLOAT for t in heavy)


def test_missing_external_data_is_asked_for(tmp_path):
    onnx.save(
        small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    with pytest.raises(
        ModelError, match=r"in a file beside the model, whose folder is unknown: give the path of the model"
    ):
        io.load((tmp_path / "m.onnx").read_bytes())


def test_an_unwritable_temporary_folder_is_reported(tmp_path):
    with pytest.raises(
        OutputError,
        match=r"temporary folder .*nowhere: No such file or directory; set TMPDIR to a folder with",
    ):
        store.constant(normal(200, 200), "w", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("location", "length", "message"),
    [
        ("../m.data", "80000", "not below the model's folder"),
        ("m.data", "99999", "w has 99999 bytes instead of 80000"),
        ("short.data", "80000", "ends before the value of w does"),
        ("n.data", "1", "No such file"),
    ],
)
def test_unreadable_external_data_is_reported(tmp_path, monkeypatch, location, length, message):
    monkeypatch.setattr(store, "LARGE", 0)
    (tmp_path / "m.data").write_bytes(bytes(80_000))
    (tmp_path / "short.data").write_bytes(bytes(79_999))
    model = small_convnet()
    model.graph.node.append(onnx.helper.make_node("Identity", ["w"], ["copy"]))
    model.graph.initializer.append(
        store.reference(
            "w", onnx.TensorProto.FLOAT, [20_000], {"location": location, "offset": 0, "length": length}
        )
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=f"external data of .*m.onnx cannot be read: .*{message}"):
        io.load(tmp_path / "m.onnx", str(tmp_path / "folder"))
