from __future__ import annotations

from collections import Counter

import pytest
from graphs import images, silent, small_convnet

from eptq_onnx import CapabilityError, Config, ConfigError, devices, quantize
from eptq_onnx.devices import ABOUT, AUTO, CPU
from eptq_onnx.execute.blocks import Block, observe
from eptq_onnx.runtime import ExactSession, Session, computing_on, load

ABSENT = [
    n
    for n in ABOUT
    if n not in (CPU, AUTO) and devices._PROVIDERS[n].name not in load().get_available_providers()
]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_there_is_told(name):
    with pytest.raises(
        CapabilityError, match=rf"device {name}: onnxruntime.* has no .*: install onnxruntime"
    ):
        quantize(small_convnet(), images(8), Config(device=name), progress=silent)


def test_an_unknown_device_is_told():
    with pytest.raises(ConfigError, match="device 'tpu' is unknown: choose one of cpu, auto, cuda"):
        quantize(small_convnet(), images(8), Config(device="tpu"), progress=silent)


@pytest.mark.parametrize(("known", "found"), [(["CUDAExecutionProvider"], "cuda"), ([], CPU)])
def test_auto_takes_cuda_if_it_is_there(known, found):
    with devices.on(AUTO, known, "onnxruntime"):
        assert devices.chosen() == found
    assert devices.chosen() == CPU


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> str:
    """A provider that is there and computes nothing, in place of that for CUDA."""
    name = "AzureExecutionProvider"
    if name not in load().get_available_providers():
        pytest.skip(f"this onnxruntime has no {name}")
    monkeypatch.setitem(
        devices._PROVIDERS, "cuda", devices._PROVIDERS["cuda"]._replace(name=name, options={})
    )
    return name


def test_what_a_device_leaves_to_the_cpu_is_told(another):
    config = Config(weight_bits=4, steps=2, preset="fast")
    there = quantize(
        small_convnet(), images(8), config.model_copy(update={"device": "cuda"}), progress=silent
    )
    here = quantize(small_convnet(), images(8), config, progress=silent)
    notes = [note for note in there.report.notes if note not in here.report.notes]
    assert any("device cuda computed float networks" in note for note in notes)
    if hasattr(Session(small_convnet())._session, "get_provider_graph_assignment_info"):
        assert any("the CPU computed these operators for it: " in note for note in notes)
    assert [n.op_type for n in there.model.graph.node] == [n.op_type for n in here.model.graph.node]
    assert {i.name: i.raw_data for i in there.model.graph.initializer} == {
        i.name: i.raw_data for i in here.model.graph.initializer
    }


def test_only_sessions_that_compute_floats_go_there(another):
    with computing_on("cuda"):
        assert ExactSession(small_convnet())._session.get_providers()[0] == another
        assert Session(small_convnet())._session.get_providers() == ["CPUExecutionProvider"]
        found = dict(observe([Block(small_convnet())], [{"image": images(1)}], ["logits"]))
        assert found[0]["logits"].size
    assert ExactSession(small_convnet())._session.get_providers() == ["CPUExecutionProvider"]


class Refusing:
    """An onnxruntime whose sessions fail on a device, or do not get it."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.calls = fails, Counter[str]()

    def InferenceSession(self, model, options, providers, disabled_optimizers):
        first = providers[0][0] if isinstance(providers[0], tuple) else providers[0]
        self.calls[first] += 1
        if self.fails and first != "CPUExecutionProvider":
            raise RuntimeError("no kernel for this")
        return Refused()


class Refused:
    def get_providers(self):
        return ["CPUExecutionProvider"]


class Options:
    def add_session_config_entry(self, name, value):
        pass


def test_a_session_that_the_device_refuses_runs_on_the_cpu_and_is_told():
    ort = Refusing(fails=True)
    with devices.on("cuda", ["CUDAExecutionProvider"], "onnxruntime"):
        assert isinstance(devices.session(ort, b"", Options(), [], moves=True), Refused)
        assert (
            "1 sessions ran on the CPU, because CUDAExecutionProvider refused them: no kernel"
            in devices.told()[-1]
        )
    assert ort.calls == {"CUDAExecutionProvider": 1, "CPUExecutionProvider": 1}


def test_a_device_that_onnxruntime_silently_leaves_out_is_an_error():
    told = pytest.raises(CapabilityError, match="cannot start its CUDAExecutionProvider")
    with devices.on("cuda", ["CUDAExecutionProvider"], "onnxruntime"), told:
        devices.session(Refusing(fails=False), b"", Options(), [], moves=True)


def test_the_default_device_changes_no_hash():
    from eptq_onnx import targets

    target = targets.load("portable")
    assert Config().digest(target) == Config(device=CPU).digest(target)
    assert Config().digest(target) != Config(device="cuda").digest(target)
