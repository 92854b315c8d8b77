from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet

from eptq_onnx import ModelError, OutputError
from eptq_onnx.graph import io
from eptq_onnx.runtime import Session


def test_external_data_is_read(tmp_path):
    model = small_convnet()
    expected = Session(model).run({"image": images(2)})["logits"]
    onnx.save(small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    loaded = io.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(Session(loaded).run({"image": images(2)})["logits"], expected)


def test_missing_external_data_is_told(tmp_path):
    onnx.save(small_convnet(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"external data of .*m\.onnx cannot be read"):
        io.load(tmp_path / "m.onnx")


def test_a_large_initializer_of_the_wrong_size_is_told():
    model = small_convnet()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "spare"))
    model.graph.initializer[-1].dims[0] = 4999
    with pytest.raises(ModelError, match="the initializer spare has 20000 bytes instead of 19996"):
        io.load(model)


def test_unwritable_places(tmp_path):
    with pytest.raises(OutputError, match="is a folder"):
        io.check_writable(tmp_path)
    with pytest.raises(OutputError, match=r"the folder .*nowhere does not exist"):
        io.check_writable(tmp_path / "nowhere" / "m.onnx")
    io.check_writable(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
