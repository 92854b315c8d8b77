"""Two files side by side; which is slower is given by how often each computes the same."""

from __future__ import annotations

import json
from itertools import repeat

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, small_convnet
from PIL import Image

import eptq_onnx
from eptq_onnx import CapabilityError, ConfigError, Data, DataError, ModelError, runtimes
from eptq_onnx.runtimes import bench as benching
from eptq_onnx.runtimes.bench import Bench
from eptq_onnx.runtimes.feeds import inputs_of


def products(count: int, *, size: int = 192) -> onnx.ModelProto:
    """A chain of matrix products, which take their time."""
    nodes = " ".join(f"h{k + 1} = MatMul (h{k}, w)" for k in range(count))
    text = f"g (float[N,{size}] h0, float[{size},{size}] w) => (float[N,{size}] h{count}) {{ {nodes} }}"
    return parse(text, {"w": normal(size, size) / size**0.5})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A quick file, and one that takes thirty times as long."""
    folder = tmp_path_factory.mktemp("bench")
    places = {"quick": folder / "quick.onnx", "slow": folder / "slow.onnx"}
    onnx.save(products(1), places["quick"])
    onnx.save(products(30), places["slow"])
    return places


@pytest.fixture(autouse=True)
def one_load(monkeypatch):
    """Each load is a process."""
    monkeypatch.setattr(benching, "_LOADS", 1)


def test_the_slower_file_is_found_whichever_comes_first(files):
    sample = {"h0": normal(64, 192)}
    slower = eptq_onnx.bench(files["quick"], files["slow"], sample, seconds=0.3)
    assert isinstance(slower, Bench)
    assert slower.slower
    assert slower.speed.low > 3
    faster = eptq_onnx.bench(files["slow"], files["quick"], sample, seconds=0.3)
    assert not faster.slower
    assert faster.speed.high < 1 / 3


def test_all_that_is_measured_is_in_the_result(files):
    found = eptq_onnx.bench(files["quick"], files["slow"], seconds=0.2, threads=2)
    assert (found.runtime, found.threads, found.clock) == ("onnxruntime", 2, "time")
    assert found.shapes == {"h0": "1×192"}
    assert any("h0: 1×192" in note for note in found.notes)
    assert found.float_file.bytes == files["quick"].stat().st_size
    assert found.quantized_file.load_seconds > 0
    assert found.quantized_file.load_memory > 0
    [row] = [o for o in found.speed.operators if o.operator == "MatMul"]
    assert row.quantized_seconds > row.float_seconds > 0
    again = json.loads(found.to_json())
    assert again["slower"] is True
    assert again["speed"]["pace"] == "slower"


def test_the_size_of_a_file_is_with_its_weights(tmp_path, files):
    path = tmp_path / "apart.onnx"
    onnx.save(products(1), path, save_as_external_data=True, location="w.data", size_threshold=0)
    found = eptq_onnx.bench(path, files["quick"], seconds=0.1)
    assert found.float_file.bytes == path.stat().st_size + (tmp_path / "w.data").stat().st_size
    assert found.float_file.bytes > 192 * 192 * 4


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_sample_is_run(tmp_path, count):
    model = small_convnet()
    onnx.save(model, tmp_path / "m.onnx")
    pair = (tmp_path / "m.onnx", tmp_path / "m.onnx")
    x = images(5)
    found = inputs_of(runtimes.make(), pair, {"image": x})
    np.testing.assert_array_equal(found.feeds["image"], x[:1])
    assert found.samples == 1
    assert not found.notes
    feeds = [{"image": x[k : k + count]} for k in range(2)]
    assert inputs_of(runtimes.make(), pair, feeds).feeds["image"].shape[0] == count


def test_no_more_is_read_than_one_run_may_take(tmp_path):
    onnx.save(small_convnet(), tmp_path / "m.onnx")
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "a.png")
    pair = (tmp_path / "m.onnx", tmp_path / "m.onnx")
    endless = inputs_of(runtimes.make(), pair, repeat(images(1)[0]))
    assert any("the first ones" in note for note in endless.notes)
    seen = inputs_of(runtimes.make(), pair, Data(tmp_path / "a.png", image="unit"))
    np.testing.assert_array_equal(seen.feeds["image"][0, :, 0, 0], [1, 0, 0])
    assert seen.notes[0].startswith("samples: ")
    assert "--image 'size=8," in seen.notes[0]


def test_files_of_two_models_are_refused(tmp_path, files):
    onnx.save(small_convnet(), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"has the inputs image, .* has h0: give two files of the same"):
        eptq_onnx.bench(files["quick"], tmp_path / "other.onnx")


def test_what_cannot_be_measured_is_said(monkeypatch, files):
    with pytest.raises(ConfigError, match="runtime 'tvm' is unknown"):
        eptq_onnx.bench(files["quick"], files["slow"], runtime="tvm")
    with pytest.raises(CapabilityError, match="reference cannot time models here"):
        eptq_onnx.bench(files["quick"], files["slow"], runtime="reference")
    with pytest.raises(ConfigError, match="takes no libraries of custom operators"):
        eptq_onnx.bench(files["quick"], files["slow"], runtime="reference", custom_ops=["x.so"])
    with pytest.raises(DataError, match="h0"):
        eptq_onnx.bench(files["quick"], files["slow"], {"h0": normal(4, 7)})
    with pytest.raises(
        ModelError, match=r"one run takes .* s, and the limit is .*: allow more with --seconds"
    ):
        eptq_onnx.bench(files["quick"], files["slow"], {"h0": normal(64, 192)}, seconds=1e-7)


def test_a_file_that_cannot_be_loaded_alone_is_told(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"broken\.onnx cannot be loaded in a separate process: .*refuses"):
        runtimes.make().load_cost(tmp_path / "broken.onnx")
