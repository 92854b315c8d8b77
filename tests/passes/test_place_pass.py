"""The choice by time with given times, so that no assertion depends on this machine's speed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, known, normal, parse, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.errors import ConfigError, ModelError, OutputError
from eptq_onnx.graph.view import QUANTIZERS, GraphView, int_attribute
from eptq_onnx.method.allocate import candidates
from eptq_onnx.outcome import Pace, Speed
from eptq_onnx.passes.place import Place
from eptq_onnx.placement import Representation, Way
from eptq_onnx.runtimes.attribute import joined
from eptq_onnx.runtimes.base import Kernel, NodeTime

pytestmark = pytest.mark.once


class Bench:
    """A machine on which integers take half the time, but for depthwise convolutions."""

    runtime, machine = "runtime 1.0", "a machine"
    depthwise = 10.0
    unit = 2e-3
    calls = 0

    def __init__(self, threads):
        self.threads = threads

    def now(self):
        return 0.0

    def seconds(self, model):
        """Time of a model by what its nodes read."""
        type(self).calls += 1
        view, total = GraphView(model), 0.0
        for node in view.nodes:
            makers = [view.producer.get(i) for i in node.input[:2]]
            on_integers = all(m is not None and m.op_type == "DequantizeLinear" for m in makers)
            slow = self.depthwise if int_attribute(node, "group", 1) > 1 else 0.5
            total += self.unit * (slow if on_integers else 1.0) * (node.op_type in ("Conv", "Gemm", "Add"))
            total += self.unit * 0.01 * (node.op_type in ("QuantizeLinear", "DequantizeLinear"))
        return total

    def ways(self, model, surround, seconds, known):
        ends = [
            Representation.INTEGERS if v[0].type.tensor_type.elem_type == 2 else Representation.FLOAT
            for v in (model.graph.input, model.graph.output)
        ]
        return (Way(ends[0], ends[1], self.seconds(model)),)

    def conversions(self, model, seconds):
        return {n.name: self.unit * 0.05 for n in model.graph.node}

    def compare(self, base, other, feeds, seconds):
        first, second = self.seconds(base), self.seconds(other)
        ratio = second / first
        return Speed(Pace.SAME, first, second, ratio, 0.98 * ratio, 1.02 * ratio, 10, 1)

    def profile(self, exact, quantized, feeds):
        return joined(*(self.kernels(model) for model in (exact, quantized)))

    def kernels(self, model):
        view, found = GraphView(model), []
        for node in view.nodes:
            alone = parse_nodes(view, node)
            seconds = self.seconds(alone) if node.op_type in ("Conv", "Gemm", "Add") else 0.0
            stands_for = () if node.op_type in QUANTIZERS else (node.name,)
            kernel = Kernel(node.name, node.op_type, node.op_type, "", stands_for, node.output[0])
            found.append(NodeTime(kernel, seconds))
        return found


def parse_nodes(view, node):
    """A node and the nodes in front of it as a model."""
    nodes = [*(view.producer[i] for i in node.input if i in view.producer), node]
    kept = [n for n in nodes if n.op_type == "DequantizeLinear" or n is node]
    return onnx.helper.make_model(
        onnx.helper.make_graph(kept, "g", [], [], list(view.model.graph.initializer))
    )


def test_a_cache_folder_that_cannot_be_made_is_told(bench, tmp_path):
    (tmp_path / "cache").write_text("a file in its place", encoding="utf-8")
    notes = run().report.notes
    assert any("may choose other operators" in n and "with the option timings" in n for n in notes)


def test_a_damaged_cache_is_measured_again(bench, tmp_path):
    first = run()
    [path] = (tmp_path / "cache" / "timings").iterdir()
    path.write_text("{", encoding="utf-8")
    again = run()
    assert any(note.startswith("measured again: ") for note in again.report.notes)
    assert again.model.SerializeToString() == first.model.SerializeToString()
    assert not any("measured again" in note for note in run().report.notes)


@pytest.fixture
def few(monkeypatch):
    """Not all widths of few weights are counted, which would take seconds."""
    monkeypatch.setattr("eptq_onnx.method.fit_bytes._MOST_TRIED", 0)


@pytest.fixture
def bench(monkeypatch, tmp_path, timed):
    class Own(Bench):
        pass

    monkeypatch.setattr(Place, "bench", Own)
    monkeypatch.setattr("eptq_onnx.runtimes.timings.user_cache_path", lambda name: tmp_path / "cache")
    return Own


def run(**options):
    options = {"preset": "fast", "max_noise": 0, **options}
    return eptq_onnx.quantize(small_convnet(), images(8), Config(**options), progress=silent)


def kept(result):
    return {k.op_type: k.reason for k in result.report.kept_float if "integers would" in k.reason}


def test_what_is_slower_on_integers_stays_float_with_both_times(bench):
    result = run()
    placement = result.report.placement
    assert list(kept(result)) == ["Conv", "Relu"]
    assert kept(result)["Conv"] == "integers would be slower here: 20.1 ms instead of 2 ms"
    assert placement.chosen == "least time"
    [taken] = [c for c in placement.candidates if c.name == "least time"]
    assert taken.high < 1
    assert taken.predicted < placement.candidates[0].predicted
    assert len(result.report.layers) == 3
    onnx.checker.check_model(result.model)


def test_the_objective_integers_measures_nothing(bench):
    result = run(objective="integers")
    assert result.report.placement is None
    assert bench.calls == 0
    assert len(result.report.layers) == 4


def test_the_plan_stays_where_all_is_faster_on_integers(bench):
    bench.depthwise = 0.5
    result = run()
    placement = result.report.placement
    assert placement.chosen == "all integers"
    assert placement.why == "no region is notably slower on integers"
    assert [c.name for c in placement.candidates] == ["all integers", "float"], "few measurements"
    assert not kept(result)
    assert result.model.graph == run(objective="integers").model.graph


def test_a_choice_that_is_no_faster_as_a_whole_is_not_taken(bench, monkeypatch):
    """The times of regions say one thing, those of whole models another: what counts is the whole."""

    def even(self, base, other, feeds, seconds):
        return Speed(Pace.SAME, 0.1, 0.1, 0.99, 0.97, 1.01, 41, 1)

    monkeypatch.setattr(bench, "compare", even)
    result = run()
    assert result.report.placement.chosen == "all integers"
    assert not kept(result)
    assert [c.name for c in result.report.placement.candidates][2] == "least time"


def test_a_choice_is_taken_only_if_it_is_faster_twice(bench, monkeypatch):
    """The fastest of several was lucky, maybe: a second measurement decides."""
    measured: list[float] = []

    def lucky(self, base, other, feeds, seconds):
        low = self.seconds(other) / self.seconds(base) < 0.9
        measured.append(0.8 if low and len(measured) < 2 else 1.0)
        return Speed(Pace.SAME, 0.1, 0.1, measured[-1], measured[-1] - 0.01, measured[-1] + 0.01, 41, 1)

    monkeypatch.setattr(bench, "compare", lucky)
    result = run()
    assert result.report.placement.chosen == "all integers"
    assert not kept(result)
    assert min(measured) == 0.8


def test_where_every_operator_is_slower_one_layer_stays_on_integers(bench, monkeypatch):
    seconds = bench.seconds

    def slow(self, model):
        quantized = any(n.op_type == "DequantizeLinear" for n in model.graph.node)
        return seconds(self, model) * (40 if quantized else 1)

    monkeypatch.setattr(bench, "seconds", slow)
    result = run()
    assert not any("not chosen by time" in note for note in result.report.notes)
    assert [x.activation_bits for x in result.report.layers].count(8) == 1


def test_models_that_take_no_time_are_left_as_planned(bench):
    bench.unit = 1e-5
    result = run()
    assert "one float run takes" in result.report.placement.why
    assert run().report.placement == result.report.placement, "what is read says what was measured"
    assert not kept(result)
    assert result.report.placement.regions == ()


def test_what_cannot_be_timed_is_told(bench, monkeypatch):
    def refuse(self, *_):
        raise ModelError("one run takes 3.0 s")

    monkeypatch.setattr(bench, "compare", refuse)
    assert any("was not chosen by time: one run takes 3.0 s" in note for note in run().report.notes)


@pytest.mark.parametrize("named", [False, True])
def test_what_is_not_timed_in_time_is_chosen_by_whole_models_for_good(bench, monkeypatch, tmp_path, named):
    options = {"timings": tmp_path / "timings.json"} if named else {}
    ticks, now = iter(np.arange(0, 1e6, 1.0)), bench.now
    monkeypatch.setattr(bench, "now", lambda self: float(next(ticks)))
    first = run(**options)
    assert any("regions were timed in whole models only" in note for note in first.report.notes)
    assert not first.report.placement.complete
    assert first.report.placement.untimed > 0
    assert list(kept(first)) == ["Conv", "Relu"], "the profiles of whole models show what is slow"
    monkeypatch.setattr(bench, "now", now)
    calls = bench.calls
    assert run(**options).report.placement == first.report.placement, "the same command gives the same bytes"
    assert bench.calls == calls


def test_other_runtimes_are_not_timed(bench, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ntitle = "Mine"\nextends = "ort-x64"\nverifier = "none"\n', encoding="utf-8"
    )
    result = run(target=str(path))
    assert any("mine is for a runtime other than onnxruntime" in note for note in result.report.notes)


def test_timings_in_a_file_are_read_and_give_the_same_bytes(bench, tmp_path):
    path = tmp_path / "timings.json"
    first = run(timings=path)
    calls, content = bench.calls, path.read_bytes()
    bench.depthwise = 0.1
    again = run(timings=path)
    assert bench.calls == calls
    assert again.model.SerializeToString() == first.model.SerializeToString()
    assert again.report.placement == first.report.placement
    assert path.read_bytes() == content


def test_timings_are_kept_for_the_same_machine(bench):
    first = run()
    calls = bench.calls
    assert run().model.SerializeToString() == first.model.SerializeToString()
    assert bench.calls == calls
    bench.machine = "another machine"
    run()
    assert bench.calls > calls


def test_timings_of_another_network_or_number_of_threads_are_refused(bench, tmp_path):
    path = tmp_path / "timings.json"
    run(timings=path)
    with pytest.raises(ConfigError, match=r"timings\.json was measured for another model, other options"):
        run(timings=path, exclude="op:Gemm")
    with pytest.raises(ConfigError, match=r"with runtime_threads=1: use the same number, or remove it"):
        run(timings=path, runtime_threads=2)


def test_timings_are_for_time_only():
    with pytest.raises(ConfigError, match="timings are only for objective=time"):
        Config(timings="timings.json", objective="integers")


def test_a_file_of_timings_that_cannot_be_written_is_told_before_the_work(bench, tmp_path):
    with pytest.raises(OutputError, match="does not exist"):
        run(timings=tmp_path / "missing" / "timings.json")
    assert bench.calls == 0


def test_the_report_shows_what_was_timed(bench):
    report = run().report
    found = json.loads(report.to_json())["placement"]
    assert found["chosen"] == "least time"
    assert {"all integers", "float", "least time"} <= {c["name"] for c in found["candidates"]}
    from rich.console import Console

    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(report.render())
    text = capture.get()
    assert "least time (chosen)" in text
    assert "regions on integers" in text
    assert "Time of kernels, without conversions" in text


@pytest.mark.usefixtures("timed")
def test_the_installed_runtime_is_timed(monkeypatch, tmp_path):
    """Whatever it finds: the result is a model, and the file gives the same one again."""
    monkeypatch.setattr("eptq_onnx.method.place.search._SHORTEST", 0.0)
    monkeypatch.setattr("eptq_onnx.method.place.search._LITTLE", 0.0)
    monkeypatch.setattr("eptq_onnx.passes.place._SHARE", 1e3)
    path = tmp_path / "timings.json"
    first = run(timings=path)
    placement = first.report.placement
    assert placement.untimed == 0
    assert {r.operators for r in placement.regions} >= {"Conv+Relu", "Conv", "Add"}
    assert all(r.float_seconds > 0 for r in placement.regions if "Conv" in r.operators)
    for c in placement.candidates:
        assert c.predicted > 0
        assert c.low <= c.ratio <= c.high
    assert run(timings=path).model.SerializeToString() == first.model.SerializeToString()


def test_a_network_with_shapes_made_at_run_time_is_timed(bench):
    """Inputs of a piece that are shapes need their values."""
    model = parse(
        """
        g (float[N,8,4,4] x) => (float[N,8,4,4] y) {
            a = Conv (x, w)  s = Shape (a)  r = Reshape (a, minus)  b = Reshape (r, s)  y = Conv (b, v)
        }
        """,
        {"w": normal(8, 8, 1, 1), "v": normal(8, 8, 1, 1), "minus": np.array([0, -1], np.int64)},
    )
    options = Config(preset="fast", max_noise=0)
    result = eptq_onnx.quantize(model, images(8, 8, 4), options, progress=silent)
    assert known(result.report.placement).candidates


def test_the_least_noise_within_a_budget_of_time(bench):
    """Less time, more noise; what is written takes no longer than the budget."""
    bench.depthwise = 0.5
    noises = []
    for seconds in (0.0085, 0.007, 0.0055):
        placement = known(run(objective="noise", budget=f"time={seconds}").report.placement)
        [taken] = [c for c in placement.candidates if c.name == placement.chosen]
        assert taken.seconds <= seconds
        noises.append(known(taken.noise))
        front = [p for p in placement.front if not p.chosen]
        assert len(front) > 2
        assert [p.seconds for p in front] == sorted(known(p.seconds) for p in front)
        assert [p.noise for p in front] == sorted((p.noise for p in front), reverse=True)
    assert noises[0] < noises[1] < noises[2]


def test_a_budget_of_time_that_is_too_small_is_refused_with_the_least(bench):
    with pytest.raises(
        ConfigError, match=r"budget=time=0.001 cannot be met: the fastest choice .* takes 0.0"
    ):
        run(objective="noise", budget="time=0.001")


def test_budgets_that_the_objective_does_not_use_are_refused():
    with pytest.raises(ConfigError, match="objective=noise needs a budget, such as time=SECONDS"):
        Config(objective="noise")
    for objective in ("time", "integers"):
        with pytest.raises(ConfigError, match=f"time=SECONDS does not go with objective={objective}: give"):
            Config(objective=objective, budget="time=1")


# ---- placement and widths together -----------------------------------------------------------------------------


def network():
    """Integers are slow for the depthwise convolution, which has a part of the bytes and of the noise."""
    return parse(
        """
        g (float[N,32,6,6] x) => (float[N,32] y) {
            a = Conv (x, w0)  b = Relu (a)  c = Conv <group = 64, pads = [1,1,1,1]> (b, w1)  d = Relu (c)
            e = Conv (d, w2)  f = Relu (e)  h = Conv (f, w3)  i = GlobalAveragePool (h)  y = Flatten (i)
        }
        """,
        {
            "w0": normal(64, 32, 1, 1),
            "w1": normal(64, 1, 3, 3, seed=1),
            "w2": normal(96, 64, 1, 1, seed=2),
            "w3": normal(32, 96, 3, 3, seed=3),
        },
    )


def quantized(**options):
    config = Config(preset="fast", target="ort-x64-vnni", measure_speed=False, **options)
    return eptq_onnx.quantize(network(), images(16, 32, 6), config, progress=silent)


def chosen(result):
    placement = known(result.report.placement)
    [taken] = [c for c in placement.candidates if c.name == placement.chosen]
    return taken, [p for p in result.report.front if p.chosen]


def floats(result):
    return {k.node for k in result.report.kept_float if "chosen for " in k.reason}


def test_the_least_time_within_limits_of_bytes_and_noise(bench, few):
    """What is float for its time takes bytes, and what is on integers adds noise."""
    fastest = 0.0053
    for budget, most in ((22_000, 0.2), (33_000, 0.002)):
        result = quantized(budget=f"bytes={budget}", max_noise=most)
        taken, [point] = chosen(result)
        assert result.model.ByteSize() <= budget
        assert known(point.noise) <= most
        assert known(point.bytes) <= budget
        assert taken.seconds < fastest
        assert len({p.bytes for p in result.report.front}) > 3
        assert len({p.seconds for p in result.report.front}) > 2


def test_the_least_noise_within_budgets_of_bytes_and_time(bench, few):
    bench.depthwise = 0.5
    found = {}
    for seconds, budget in ((0.006, 60_000), (0.0045, 30_000)):
        result = quantized(objective="noise", budget=(f"time={seconds}", f"bytes={budget}"))
        taken, [point] = chosen(result)
        assert taken.seconds <= seconds
        assert result.model.ByteSize() <= budget
        found[seconds, budget] = point.noise
    assert found[0.006, 60_000] < found[0.0045, 30_000]


def test_the_smallest_file_within_limits_of_time_and_noise(bench, few):
    bench.depthwise = 20.0
    sizes, nodes = {}, {}
    for seconds in (0.1, 0.006):
        result = quantized(objective="bytes", budget=f"time={seconds}", max_noise=0.02)
        taken, [point] = chosen(result)
        assert taken.seconds <= seconds
        assert point.noise <= 0.02
        sizes[seconds] = result.model.ByteSize()
        nodes[seconds] = len(floats(result))
    assert nodes[0.1] > nodes[0.006] > 0, "layers in float need no quantizers, which take bytes"
    assert sizes[0.1] < sizes[0.006] < 1.2 * sizes[0.1]


def test_limits_that_contradict_each_other_are_refused_with_their_options(bench, few):
    with pytest.raises(
        ConfigError, match=r"budget=bytes=2000 cannot be met: the smallest .* about bytes=\d+"
    ):
        quantized(objective="noise", budget=("time=1", "bytes=2000"))
    with pytest.raises(
        ConfigError, match=r"limits max_noise=0.0001, budget=bytes=21000 cannot be met together"
    ):
        quantized(budget="bytes=21000", max_noise=1e-4)


def test_weights_stay_float_only_where_the_noise_needs_it(bench, few, monkeypatch):
    """A weight that no width fits keeps its float values, and others that stay float are stored."""

    def loud(*given):
        found = candidates(*given)
        found["w2"].effects.update(dict.fromkeys(found["w2"].effects, 1.0))
        return found

    monkeypatch.setattr("eptq_onnx.passes.effects.candidates", loud)
    result = quantized(budget="bytes=200e3", max_noise=0.2)
    assert known(result.report.placement).exact == ("w2",)
    assert {x.node: x.activation_bits for x in result.report.layers} == {
        "Conv_0": 8,
        "Conv_2": 32,
        "Conv_6": 8,
    }
    shapes = [tuple(t.dims) for t in result.model.graph.initializer if t.data_type == 1 and len(t.dims) == 4]
    assert shapes.count((96, 64, 1, 1)) == 1
    assert (64, 1, 3, 3) not in shapes


# ---- a limit of noise that gives way ---------------------------------------------------------------------------


def chain():
    """Return three depthwise convolutions and three others, whose quantizers are about as loud."""
    body, constants, x = [], {}, "x"
    for k in range(6):
        body.append(
            f"a{k} = Conv {'<group = 8, pads = [1,1,1,1]>' if k < 3 else ''} ({x}, w{k})  r{k} = Relu (a{k})"
        )
        constants[f"w{k}"] = normal(*((8, 1, 3, 3) if k < 3 else (8, 8, 1, 1)), seed=k)
        x = f"r{k}"
    return parse(
        f"g (float[N,8,6,6] x) => (float[N,8] y) {{ {'  '.join(body)} h = GlobalAveragePool (r5)  y = Flatten (h) }}",
        constants,
    )


FOURTH = "Conv_6"
LOUD: Any = {"preset": "fast", "target": "ort-x64-vnni", "measure_speed": False}


@pytest.mark.parametrize(("depthwise", "regions"), [(0.9, 3), (0.75, 1), (0.5, 0)])
def test_noise_above_its_limit_is_avoided_where_that_takes_little_time(bench, depthwise, regions):
    """No quantizer stands out, so that regions stay float for the noise of all."""
    bench.depthwise = depthwise
    result = eptq_onnx.quantize(chain(), images(16, 8, 6), Config(max_noise=3e-6, **LOUD), progress=silent)
    placement = known(result.report.placement)
    planned, *_, taken = (
        c
        for c in (placement.candidates[0], *placement.candidates)
        if c.name in ("all integers", placement.chosen)
    )
    assert len(floats(result)) == 2 * regions, "with their Relus"
    if regions:
        assert taken.name == "less noise for little time"
        assert known(taken.noise) < known(planned.noise)
        assert taken.ratio <= 1.1
    else:
        assert taken is planned


def test_what_is_slow_only_beside_others_is_learned_from_the_profile(bench, monkeypatch):
    """The fourth convolution takes long behind one in float, which no piece of the network shows."""
    bench.depthwise, seconds, kernels = 0.9, bench.seconds, bench.kernels

    def slow(model):
        view = GraphView(model)
        node = next((n for n in view.nodes if n.name == FOURTH), None)
        while node is not None and (node.name == FOURTH or node.op_type != "Conv"):
            node = view.producer.get(node.input[0])
        source = None if node is None else view.producer.get(node.input[0])
        return 10 * bench.unit * (source is not None and source.op_type != "DequantizeLinear")

    def profiled(self, model):
        return [
            replace(time, seconds=time.seconds + slow(model) * (time.kernel.node == FOURTH))
            for time in kernels(self, model)
        ]

    monkeypatch.setattr(bench, "seconds", lambda self, model: seconds(self, model) + slow(model))
    monkeypatch.setattr(bench, "kernels", profiled)
    config = Config(max_noise=3e-6, **LOUD)
    result = eptq_onnx.quantize(chain(), images(16, 8, 6), config, progress=silent)
    tried = [c for c in known(result.report.placement).candidates if c.name == "less noise for little time"]
    assert len(tried) == 2
    assert tried[0].ratio > 1.1 >= tried[1].ratio
    assert floats(result)


def test_a_choice_for_noise_stays_faster_than_the_float_model(bench):
    """Integers gain little here, and noise must not cost all of it."""
    bench.depthwise, seconds = 0.99, bench.seconds

    def even(self, model):
        quantized = any(n.op_type == "DequantizeLinear" for n in model.graph.node)
        return seconds(self, model) * (1.15 if quantized else 1)

    bench.seconds = even
    result = eptq_onnx.quantize(chain(), images(16, 8, 6), Config(max_noise=3e-6, **LOUD), progress=silent)
    placement = known(result.report.placement)
    *_, taken = (c for c in placement.candidates if c.name == placement.chosen)
    [exact] = (c for c in placement.candidates if c.name == "float")
    assert 1.05 * taken.ratio <= exact.ratio


def test_noise_within_its_limit_costs_no_time(bench):
    bench.depthwise = 0.9
    result = eptq_onnx.quantize(chain(), images(16, 8, 6), Config(max_noise=1e-3, **LOUD), progress=silent)
    assert not floats(result)
    assert known(result.report.placement).chosen == "all integers"
