from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, parse, silent, small_convnet
from onnx import TensorProto, helper

import eptq_onnx
from eptq_onnx import Config, ModelError, OutputError
from eptq_onnx import files as outputs
from eptq_onnx.graph import io
from eptq_onnx.proto import store
from eptq_onnx.runtime import Session


def test_external_data_is_read(tmp_path):
    model = small_convnet()
    expected = Session(model).run({"image": images(2)})["logits"]
    onnx.save(
        small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    loaded = io.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(Session(loaded).run({"image": images(2)})["logits"], expected)


def test_missing_external_data_is_reported(tmp_path):
    onnx.save(
        small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"external data of .*m\.onnx cannot be read"):
        io.load(tmp_path / "m.onnx")


def test_a_large_initializer_of_the_wrong_size_is_reported():
    model = small_convnet()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "spare"))
    model.graph.initializer[-1].dims[0] = 4999
    model.graph.node.append(onnx.helper.make_node("Identity", ["spare"], ["copy"]))
    with pytest.raises(ModelError, match="the initializer spare has 20000 bytes instead of 19996"):
        io.load(model)


def test_unwritable_places(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        outputs.check_writable(tmp_path)
    with pytest.raises(OutputError, match=r"the folder .*nowhere does not exist"):
        outputs.check_writable(tmp_path / "nowhere" / "m.onnx")
    outputs.check_writable(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_large_model_is_saved_and_run_with_external_data(tmp_path, monkeypatch):
    model = small_convnet()
    rows = np.arange(6000, dtype=np.float32).reshape(1200, 5)
    model.graph.initializer.append(onnx.numpy_helper.from_array(rows, "rows"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["rows", "place"], ["row"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1100]), "place"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("row", 1, [1, 5]))
    before = model.SerializeToString()
    expected = Session(model).run({"image": images(2)})
    monkeypatch.setattr(io, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(store, "LARGE", 1000)
    io.save(model, tmp_path / "m.onnx")
    assert model.SerializeToString() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx.data").stat().st_size == rows.nbytes
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    for result in (tmp_path / "m.onnx", io.load(tmp_path / "m.onnx"), model):
        got = Session(result).run({"image": images(2)})
        np.testing.assert_array_equal(got["row"], rows[[1100]])
        np.testing.assert_array_equal(got["logits"], expected["logits"])


def test_an_operator_of_onnxruntime_inside_a_subgraph_is_not_an_error():
    graph = """g (float[N,3] x, bool c) => (float[N,3] y) {
        y = If (c) <
            then_branch = t () => (float[N,3] a) { a = SimplifiedLayerNormalization <axis = -1> (x, scale) },
            else_branch = e () => (float[N,3] b) { b = Neg (x) }
        >
    }"""
    io.load(parse(graph, {"scale": np.ones(3, np.float32)}))


@pytest.mark.parametrize("size", [0, -1, -(2**40)])
@pytest.mark.parametrize("axis", range(4))
def test_impossible_sizes_of_computed_tensors_change_nothing(size, axis):
    """onnxruntime infers them anew; onnx would believe them."""
    plain, declared = small_convnet(), small_convnet()
    shape = [size if k == axis else (None, 8, 8, 8)[k] for k in range(4)]
    declared.graph.value_info.append(helper.make_tensor_value_info("a2", TensorProto.FLOAT, shape))
    first, second = (
        eptq_onnx.quantize(m, {"image": images(8)}, Config(preset="fast"), progress=silent).model
        for m in (plain, declared)
    )
    assert first.graph.node == second.graph.node
    assert first.graph.initializer == second.graph.initializer
