"""Speed measurement with given clocks and profiles, so that no assertion depends on this machine's speed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, parse, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.errors import ModelError
from eptq_onnx.records import Pace
from eptq_onnx.runtimes import speed


class Machine:
    """A clock that two models advance by their run times, with noise."""

    def __init__(self, seconds: tuple[float, float], noise: float = 0.0, seed: int = 0) -> None:
        self.now, self._noise, self._random = 0.0, noise, np.random.default_rng(seed)
        self.order: list[int] = []
        self.runs = [lambda k=k: self._run(k, seconds[k]) for k in (0, 1)]

    def _run(self, k: int, seconds: float) -> None:
        self.order.append(k)
        self.now += seconds * float(np.exp(self._noise * self._random.standard_normal()))

    def measure(self):
        return speed.compare(*self.runs, samples=1, clock=lambda: self.now)


@pytest.mark.parametrize(
    ("ratio", "pace"),
    [
        (0.3, Pace.FASTER),
        (0.8, Pace.FASTER),
        (1.0, Pace.SAME),
        (1.02, Pace.SAME),
        (1.2, Pace.SLOWER),
        (3.0, Pace.SLOWER),
    ],
)
@pytest.mark.parametrize("seconds", [2e-5, 1e-3, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_pace_is_that_of_the_models(ratio, pace, seconds, noise):
    measured = Machine((seconds, ratio * seconds), noise, seed=3).measure()
    assert measured.pace is pace
    assert measured.ratio == pytest.approx(ratio, rel=3 * noise + 1e-6)
    assert measured.low <= measured.ratio <= measured.high
    assert measured.float_seconds == pytest.approx(seconds, rel=4 * noise + 1e-6)


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_noise_is_not_taken_for_a_difference(noise):
    """Equal models on a busy machine are rarely found to differ."""
    found = [Machine((0.01, 0.01), noise, seed).measure().pace for seed in range(300)]
    assert np.mean([pace is Pace.SLOWER for pace in found]) < 0.03
    assert np.mean([pace is Pace.FASTER for pace in found]) < 0.03


def test_runs_take_turns_and_the_first_changes():
    machine = Machine((0.1, 0.1))
    machine.measure()
    turns = [
        k for n, k in enumerate(machine.order[4:]) if n % 2 == 0
    ]  # each turn: one run to settle, one that counts
    assert turns[:8] == [0, 1, 1, 0, 0, 1, 1, 0]


def test_patience_tells_smaller_differences_apart():
    """Models that differ by a tenth, on a busy machine."""
    found = {}
    for patience in (1, 8):
        machines = [Machine((0.02, 0.022), 0.1, seed) for seed in range(40)]
        speeds = [speed.compare(*m.runs, 1, lambda m=m: m.now, patience) for m in machines]
        found[patience] = sum(s.low > 1 for s in speeds)
        assert not any(s.high < 1 for s in speeds)
    assert found[8] > 35
    assert found[1] < found[8]


def test_it_takes_seconds_at_most():
    machine = Machine((0.25, 0.25), noise=0.5)
    machine.measure()
    assert machine.now < 4 * len(machine.order)
    with pytest.raises(ModelError, match=r"one run takes 2\.5 s"):
        Machine((0.1, 2.5)).measure()
    long = Machine((60.0, 0.1))
    with pytest.raises(ModelError, match=r"one run takes 60\.0 s"):
        long.measure()
    assert long.order == [0]


def _event(name: str, kind: str, start: float, length: float, thread: int = 1) -> dict[str, object]:
    args = {"op_name": kind}
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": start,
        "dur": length,
        "tid": thread,
        "args": args,
    }


def test_a_recorded_profile_is_summed_up_by_the_float_operator():
    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 99, "tid": 1},
        {
            "cat": "Node",
            "name": "c_fence_before",
            "ts": 0,
            "dur": 50,
            "tid": 1,
            "args": {"op_name": "QLinearConv"},
        },
        *[
            e
            for start, slow in ((0, 900), (1000, 100), (2000, 100))
            for e in (
                _event("c", "QLinearConv", start, slow),
                _event("d", "FusedConv", start + 950, 10),
                _event("q", "QuantizeLinear", start + 960, 5),
                _event("z", "DequantizeLinear", start + 970, 4),
            )
        ],
    ]
    found = speed.operator_seconds(events, {"q": "QuantizeLinear/DequantizeLinear around Resize"}, runs=3)
    assert found == pytest.approx(
        {
            "Conv": 110e-6,
            "QuantizeLinear/DequantizeLinear around Resize": 5e-6,
            "QuantizeLinear/DequantizeLinear": 4e-6,
        }
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 40), st.integers(1, 4))
def test_what_runs_inside_a_loop_counts_once(bodies, own, runs):
    """The time of a Loop node includes the nodes of its body and its own work."""
    events, now = [], 0
    for _ in range(runs):
        events.append(_event("loop", "Loop", now, sum(bodies) + own))
        for k, length in enumerate(bodies):
            events.append(_event(f"n{k}", "MatMulInteger", now, length))
            now += length
        now += own + 1
    found = speed.operator_seconds(events, {}, runs)
    assert found == pytest.approx({"Loop": own * 1e-6, "MatMul": sum(bodies) * 1e-6})


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [("QLinearConv", "Conv"), ("FusedConv", "Conv"), ("QGemm", "Gemm"), ("QLinearSigmoid", "Sigmoid"),
     ("MatMulIntegerToFloat", "MatMul"), ("QLinearGlobalAveragePool", "GlobalAveragePool"),
     ("QuickGelu", "QuickGelu"), ("Softmax", "Softmax"), ("ReorderOutput", "layout")],
)  # fmt: skip
def test_kernels_go_by_the_operator_that_they_stand_for(kernel, operator):
    assert speed.stands_for(kernel) == operator


def test_quantizers_are_called_after_the_operators_around_them():
    graph = parse(
        "g (float[1,2,4,4] x, float s) => (float[1,2,4,4] y) {"
        " xq = QuantizeLinear (x, s)  xd = DequantizeLinear (xq, s)  r = Resize (xd, s, s)"
        "  rq = QuantizeLinear (r, s)"
        " rd = DequantizeLinear (rq, s)  a = Softmax (rd)  b = Erf (rd)  c = Add (a, b)"
        "  cq = QuantizeLinear (c, s)"
        " y = DequantizeLinear (cq, s) }"
    ).graph
    for node in graph.node:
        node.name = node.output[0]
    labels = {
        name: text.removeprefix("QuantizeLinear/DequantizeLinear ")
        for name, text in speed.quantizer_labels(graph).items()
    }
    assert labels == {
        "xq": "at an input", "xd": "around Resize", "rq": "around Resize", "rd": "around Erf and Softmax",
        "cq": "around Add", "y": "at an output"
    }  # fmt: skip


def test_what_costs_most_beside_the_float_model_comes_first():
    rows = speed.operator_times(
        {"Conv": 5.0, "Relu": 1.0, "Resize": 1.0}, {"Conv": 4.0, "Resize": 4.0, "Softmax": 1.0}
    )
    assert [r.operator for r in rows] == ["Resize", "Softmax", "Conv", "Relu"]
    assert (rows[1].float_seconds, rows[3].quantized_seconds) == (0.0, 0.0)


def test_both_models_are_run_and_profiled(monkeypatch):
    """Both models are profiled with this machine's onnxruntime, whichever is faster."""
    result = eptq_onnx.quantize(small_convnet(), images(8), Config(preset="fast", measure_speed=False))
    assert result.report.speed is None
    monkeypatch.setattr(speed, "_pace", lambda low, high: Pace.SLOWER)
    measured = speed.measure(small_convnet(), result.model, {"image": images(1), "unused": images(1)}, 1)
    assert measured.pairs == 10
    operators = {o.operator: o for o in measured.operators}
    assert operators["Conv"].float_seconds > 0
    assert operators["Conv"].quantized_seconds > 0
    assert any(name.startswith("QuantizeLinear/DequantizeLinear") for name in operators)


def test_measuring_changes_no_byte_and_a_failure_is_a_note(measured_speed, monkeypatch):
    config = Config(preset="fast")
    plain = eptq_onnx.quantize(small_convnet(), images(8), config.model_copy(update={"measure_speed": False}))
    measured = eptq_onnx.quantize(small_convnet(), images(8), config)
    assert measured.report.speed is not None
    assert plain.model.SerializeToString(deterministic=True) == measured.model.SerializeToString(
        deterministic=True
    )

    def refuse(*_: object) -> None:
        raise ModelError("one run takes 7.0 s")

    monkeypatch.setattr("eptq_onnx.passes.measure.measure", refuse)
    failed = eptq_onnx.quantize(small_convnet(), images(8), config)
    assert failed.report.speed is None
    assert "speed is not measured: one run takes 7.0 s" in failed.report.notes
    assert isinstance(failed.model, onnx.ModelProto)
