"""What the pass measures is what a direct calculation gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, known, normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, data
from eptq_onnx.data.splits import share_out
from eptq_onnx.graph import edit
from eptq_onnx.passes.diagnose import Diagnose
from eptq_onnx.report.verdict import Assurance
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.usefixtures("diagnosed")
FAST = Config(preset="fast", weight_bits=4, edge_bits=4, rotate=False, equalize=False)


def chain() -> onnx.ModelProto:
    """Three layers, each the only reader of the one before."""
    return parse(
        """
        chain (float[N,3,6,6] image) => (float[N,5] y)
        {
            c1 = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (image, w1, b1)
            a1 = Relu (c1)
            c2 = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (a1, w2, b2)
            a2 = Relu (c2)
            p = GlobalAveragePool (a2)
            f = Flatten (p)
            y = Gemm (f, w3, b3)
        }
        """,
        {
            "w1": normal(8, 3, 3, 3, seed=1),
            "w2": normal(8, 8, 3, 3, seed=2),
            "w3": normal(8, 5, seed=3),
            "b1": normal(8, seed=4),
            "b2": normal(8, seed=5),
            "b3": normal(5, seed=6),
        },
    )


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return images(64, size=6)


@pytest.fixture(scope="module")
def run(x):
    """The result, with what the pass was given and made."""
    seen: dict[str, Any] = {}
    before = Diagnose.run

    def watched(self, state, ctx):
        after = before(self, state, ctx)
        seen.update(state=state, ctx=ctx, found=after.diagnosis)
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diagnose, "run", watched)
        result = eptq_onnx.quantize(chain(), x, FAST, progress=silent)
    return result, seen


def ratio(exact: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - got).sum()))


def unseen(run, x) -> np.ndarray:
    shares = share_out(data.read(x, chain()), FAST)
    return x[shares.unseen][:8]


def test_own_and_nearest_noise_of_each_layer(run, x):
    result, seen = run
    state, found = seen["state"], seen["found"]
    feeds = {"image": unseen(run, x)}
    layers = state.plan.layers
    results = [layer.result for layer in layers]
    exact = Session(edit.exposing(state.executed, results), integers=False).run(feeds)
    written, stands_for = state.written.marked, state.written.stands_for
    ends = [stands_for.get(r, r) for r in results]
    got = Session(edit.exposing(written, ends)).run(feeds)
    assert found.samples == 8
    for k, (layer, name, end) in enumerate(zip(layers, results, ends, strict=True)):
        own = got[end]
        if k:
            # The part of the written model behind the float values of the layer in front.
            begin = ends[k - 1]
            part = onnx.utils.Extractor(edit.exposing(written, ends)).extract_model([begin], [end])
            own = Session(part).run({begin: exact[results[k - 1]]})[end]
        assert found.own[layer.node] == pytest.approx(ratio(exact[name], own), abs=0.01)
        assert result.report.layers[k].own_db == found.own[layer.node]
    assert found.own[layers[0].node] == pytest.approx(ratio(exact[results[0]], got[ends[0]]), abs=0.01)
    assert all(found.nearest[layer.node] < 40 for layer in layers)
    assert found.nearest[layers[-1].node] <= result.report.layers[-1].sqnr_db + 1, "it is the worse rounding"


def test_causes_of_the_noise_at_the_outputs(run, x):
    result, seen = run
    state, noise = seen["state"], known(seen["found"].noise)
    assert result.report.verdict.assurance is not Assurance.SAFE
    feeds = {"image": unseen(run, x)}
    exact = Session(state.executed, integers=False).run(feeds)["y"]
    variance = state.calibration.variance["y"]
    got = Session(state.written.marked).run(feeds)["y"]
    assert noise.total == pytest.approx(np.square(exact - got).mean() / variance, rel=0.02)
    rounded = onnx.ModelProto()
    rounded.CopyFrom(state.executed)
    for tensor in rounded.graph.initializer:
        if tensor.name in state.rounding.integers:
            grid = state.rounding.weights[tensor.name]
            value = grid.dequantize(state.rounding.integers[tensor.name])
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    for layer in state.plan.layers:
        [bias] = [t for t in rounded.graph.initializer if t.name == layer.bias]
        bias.CopyFrom(onnx.numpy_helper.from_array(state.rounding.biases[layer.bias], layer.bias))
    weights = Session(rounded, integers=False).run(feeds)["y"]
    # Newer runtimes fuse weights with their layers, which moves the result a little.
    assert noise.weights == pytest.approx(np.square(exact - weights).mean() / variance, rel=0.05)
    assert noise.activations < noise.weights, "4 bits against 8"
    assert noise.seen is not None
    assert result.report.noise == noise


def test_ranges_of_the_worst_layers_are_those_of_their_grids(run):
    _, seen = run
    state, found = seen["state"], seen["found"]
    worst = min(found.own, key=found.own.get)
    first, second, *_ = found.histograms
    assert (first.layer, first.what, second.layer, second.what) == (worst, "input", worst, "weights")
    [layer] = [x for x in state.plan.layers if x.node == worst]
    grid = state.rounding.grids[state.plan.quantizer_of[layer.input].name]
    ends = grid.dequantize(np.array([grid.format.qmin, grid.format.qmax], np.float32))
    assert (first.least, first.most) == pytest.approx(tuple(ends))
    form = state.rounding.weights[layer.weight].format
    assert (second.least, second.most) == (form.qmin, form.qmax)
    assert sum(second.counts) == state.rounding.integers[layer.weight].size


def test_causes_are_looked_for_only_where_accuracy_fell(x):
    safe = eptq_onnx.quantize(chain(), x, Config(preset="fast", rotate=False), progress=silent).report
    assert safe.verdict.assurance is Assurance.SAFE
    assert safe.noise is None
    assert all(layer.own_db is not None for layer in safe.layers)
    assert safe.advice == ()


def test_the_worst_samples_are_named_and_shown(run, x):
    result, _ = run
    worst = result.report.verification.worst
    shares = share_out(data.read(x, chain()), FAST)
    exact, got = (Session(m).run({"image": x[shares.unseen]})["y"] for m in (chain(), result.model))
    ratios = [ratio(a, b) for a, b in zip(exact, got, strict=True)]
    order = np.argsort(ratios)
    assert [s.sample for s in worst] == [int(shares.unseen[k]) for k in order][:12]
    assert worst[0].sqnr_db == pytest.approx(min(ratios), abs=0.01)
    assert result.report.exhibits.pictures == (), "6×6 is too small for a picture"
    assert [n.runs for n in result.report.exhibits.network].count("merged") == 2


def test_what_a_run_takes_from_its_workdir_is_the_same(x, tmp_path):
    config = FAST.model_copy(update={"workdir": tmp_path / "w"})
    reports = [eptq_onnx.quantize(chain(), x, config, progress=silent).report for _ in range(2)]
    assert any("diagnose" in note for note in reports[1].notes)
    assert reports[0].noise == reports[1].noise
    assert reports[0].exhibits.histograms == reports[1].exhibits.histograms
