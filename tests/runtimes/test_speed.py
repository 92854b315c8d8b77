"""Speed measurement with given times and profiles, so that no assertion depends on this machine's speed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, silent, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st

import eptq_onnx
from eptq_onnx import Config, runtimes
from eptq_onnx.errors import ModelError
from eptq_onnx.outcome import Pace, Speed
from eptq_onnx.runtimes import ort_profile, speed
from eptq_onnx.runtimes.base import Kernel


class Machine:
    """Two models with given run times, with noise."""

    def __init__(self, seconds: tuple[float, float], noise: float = 0.0, seed: int = 0) -> None:
        self.spent, self._noise, self._random = 0.0, noise, np.random.default_rng(seed)
        self.order: list[int] = []
        self.pair = (lambda: self._run(0, seconds[0]), lambda: self._run(1, seconds[1]))

    def _run(self, k: int, seconds: float) -> float:
        self.order.append(k)
        taken = seconds * float(np.exp(self._noise * self._random.standard_normal()))
        self.spent += taken
        return taken

    def measure(self, effort: speed.Effort = speed.BRIEF):
        return speed.compare(self.pair, 1, effort)


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


def test_more_effort_tells_smaller_differences_apart():
    """Models that differ by a tenth, on a busy machine."""
    found = {}
    for factor in (1, 8):
        effort = speed.Effort(seconds=factor * speed.BRIEF.seconds, pairs=factor * speed.BRIEF.pairs)
        speeds = [Machine((0.02, 0.022), 0.1, seed).measure(effort) for seed in range(40)]
        found[factor] = sum(s.low > 1 for s in speeds)
        assert not any(s.high < 1 for s in speeds)
    assert found[8] > 35
    assert found[1] < found[8]


def test_it_takes_seconds_at_most():
    machine = Machine((0.25, 0.25), noise=0.5)
    machine.measure()
    assert machine.spent < 4 * len(machine.order)
    with pytest.raises(ModelError, match=r"one run takes 2\.5 s"):
        Machine((0.1, 2.5)).measure()
    long = Machine((60.0, 0.1))
    with pytest.raises(ModelError, match=r"one run takes 60\.0 s"):
        long.measure()
    assert long.order == [0]


def test_all_the_time_is_used_where_it_is_asked_for():
    brief, long = Machine((1e-3, 3e-3), 0.02), Machine((1e-3, 3e-3), 0.02)
    assert brief.measure().pairs == 10
    found = long.measure(speed.Effort(longest_run=5, seconds=5, pairs=1000, decided=False))
    assert found.pairs > 20
    assert 5 < long.spent < 5.5


def _event(name: str, kind: str, start: float, length: float, thread: int = 1) -> dict[str, Any]:
    args = {"op_name": kind}
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": start,
        "dur": length,
        "tid": thread,
        "args": args,
    }


def _times(events, kernels, runs):
    return speed.operator_seconds(ort_profile.node_times(events, kernels, runs))


def test_a_recorded_profile_is_summed_up_by_the_float_operator():
    every = [
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
    kernels = [
        Kernel("c", "QLinearConv", "Conv", "uint8"),
        Kernel("d", "FusedConv", "Conv", "float32"),
        Kernel("q", "QuantizeLinear", "QuantizeLinear", "float32", around=("Resize",)),
        Kernel("z", "DequantizeLinear", "DequantizeLinear", "uint8"),
        Kernel("never", "Relu", "Relu", "float32"),
    ]
    assert _times(ort_profile.parse(json.dumps(every)), kernels, runs=3) == pytest.approx(
        {
            "Conv": 110e-6,
            "QuantizeLinear/DequantizeLinear around Resize": 5e-6,
            "QuantizeLinear/DequantizeLinear": 4e-6,
        }
    )


def test_only_the_last_runs_of_a_profile_count_where_the_first_are_slow():
    starts = [{"cat": "Session", "name": "model_run", "ts": 1000 * k, "dur": 9, "tid": 1} for k in range(3)]
    nodes = [_event("c", "Conv", 1000 * k + 1, 100 if k else 900) for k in range(3)]
    events = ort_profile.parse(json.dumps([*starts, *nodes]), last=2)
    assert _times(events, [Kernel("c", "Conv", "Conv", "float32")], runs=2) == pytest.approx({"Conv": 1e-4})


def test_what_is_no_profile_is_told():
    with pytest.raises(ModelError, match="profile cannot be read"):
        ort_profile.parse('[{"cat": ')


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
    kernels = [
        Kernel("loop", "Loop", "Loop", ""),
        *(Kernel(f"n{k}", "MatMulInteger", "MatMul", "uint8") for k in range(len(bodies))),
    ]
    assert _times(events, kernels, runs) == pytest.approx({"Loop": own * 1e-6, "MatMul": sum(bodies) * 1e-6})


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
    feeds = {"image": images(1), "unused": images(1)}
    measured = speed.measure(runtimes.make(), (small_convnet(), result.model), feeds, 1)
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

    def refuse(*_: Any) -> None:
        raise ModelError("one run takes 7.0 s")

    monkeypatch.setattr("eptq_onnx.passes.measure.measure", refuse)
    failed = eptq_onnx.quantize(small_convnet(), images(8), config)
    assert failed.report.speed is None
    assert "speed is not measured: one run takes 7.0 s" in failed.report.notes
    assert isinstance(failed.model, onnx.ModelProto)


@pytest.mark.parametrize("pace", Pace)
def test_a_slower_model_names_the_option_that_helps(measured_speed, monkeypatch, pace):
    found = Speed(pace, 1.0, 2.0, 2.0, 1.9, 2.1, 10, 1)
    monkeypatch.setattr("eptq_onnx.passes.measure.measure", lambda *_: found)
    config = Config(preset="fast", objective="integers")
    report = eptq_onnx.quantize(small_convnet(), images(8), config, progress=silent).report
    assert any("objective=time" in note for note in report.notes) == (pace is Pace.SLOWER)
