"""Layers whose inputs are quantized in every run, through the whole road: file, emulation, gradient, storage."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import normal, parse, silent
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config, ConfigError, quantize, runtimes, targets
from eptq_onnx.api import Result
from eptq_onnx.cli import app
from eptq_onnx.engines.base import ATTENTION
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.integer_products import integer_products
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.qdq import write
from eptq_onnx.report.command import command_of
from eptq_onnx.runtime import Session
from eptq_onnx.training import loop

BLOCK = """
g (float[N,6,16] x) => (float[N,6,16] y) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    qb = Add (q, bq)
    t = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul (qb, t)
    a = Softmax <axis = -1> (s)
    c = MatMul (a, v)
    o = MatMul (c, wo)
    r = Add (o, x)
    n = LayerNormalization <axis = -1> (r, gain, shift)
    h = MatMul (n, w1)
    hb = Add (h, b1)
    g = Relu (hb)
    f = MatMul (g, w2)
    y = Add (f, n)
}
"""


def block(seed: int = 0, **scales: float) -> ModelProto:
    """One layer of a transformer, in which a few channels of the residual stream are loud."""
    shapes = {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16), "w1": (16, 32), "w2": (32, 16)}
    constants = {
        n: normal(*s, seed=seed + k, scale=scales.get(n, 0.3)) for k, (n, s) in enumerate(shapes.items())
    }
    constants |= {"bq": normal(16, seed=7), "b1": normal(32, seed=8), "shift": normal(16, seed=9)}
    constants["gain"] = np.ones(16, np.float32)
    return parse(BLOCK, constants)


def tokens(count: int = 24, seed: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": normal(count, 6, 16, seed=seed)}


def dynamic(model: ModelProto, data: Any = None, **options: Any) -> Result:
    config = Config(**{"activations": "dynamic", "preset": "fast", **options})
    return quantize(model, tokens() if data is None else data, config, progress=silent)


def operators(model: ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def test_the_file_has_one_quantizer_for_layers_that_read_one_tensor():
    found = operators(dynamic(block()).model)
    assert found["MatMulInteger"] == 6
    assert found["DynamicQuantizeLinear"] == 4  # x for q, k, v; c; n; g
    assert not {"QuantizeLinear", "DequantizeLinear"} & found.keys()


def test_the_runtime_makes_its_fused_kernels_of_all_layers():
    result = dynamic(block())
    kernels = Counter(k.kernel for k in runtimes.make().kernels(result.model))
    assert kernels["DynamicQuantizeMatMul"] == 3
    assert kernels["MatMulIntegerToFloat"] == 3
    assert kernels["DynamicQuantizeLinear"] == 1
    report = result.report.verification
    assert report.planned == report.kernels == {"MatMul": 6}


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(2, 4),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    turned=st.booleans(),
    alpha=st.sampled_from([1.0, 0.5]),
    bits=st.sampled_from([8, 4, 2]),
    seed=st.integers(0, 99),
)
def test_a_product_in_the_file_is_that_of_the_rounded_factors(rank, sizes, bias, turned, alpha, bits, seed):
    inner, columns = sizes
    if rank == 2:
        text = f"y = Gemm <transB = {int(turned)}, alpha = {alpha}> (x, w{', b' if bias else ''})"
    else:
        text = "p = MatMul (x, w)  y = Add (p, b)" if bias else "y = MatMul (x, w)"
    dims = ",".join(str(k + 2) for k in range(rank - 2))
    shape = [k + 2 for k in range(rank - 2)] + [inner]
    weight = normal(columns, inner, seed=seed) if rank == 2 and turned else normal(inner, columns, seed=seed)
    model = parse(
        f"g (float[N,{dims + ',' if dims else ''}{inner}] x) => (float y) {{ {text} }}",
        {"w": weight, "b": normal(columns, seed=seed + 1)},
    )
    data = {"x": normal(12, *shape, seed=seed + 2)}
    result = dynamic(model, data, weight_bits=bits, edge_bits=bits, storage="int8")
    integers = [n for n in result.model.graph.node if n.op_type == "MatMulInteger"]
    assert len(integers) == 1
    values = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    scales = [n for n in result.model.graph.node if n.op_type == "Mul" and n.input[1] in values]
    rounded = values[integers[0].input[1]] * values[scales[0].input[1]].astype(np.float64)
    x = data["x"][:1].astype(np.float64)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    step = np.float32(high - low) / np.float32(255) or 1.0
    zero = np.clip(np.rint(-low / step), 0, 255)
    own = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    expected = own @ rounded
    adds = [n for n in result.model.graph.node if n.op_type == "Add"]
    expected = expected + (values[adds[0].input[1]] if adds else 0.0)
    found = Session(result.model).run({"x": data["x"][:1]})["y"]
    # The quantizer may round one value at the border of two steps to the other.
    most = step * np.abs(rounded).max(initial=0.0) + 1e-4 * np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(found, expected, atol=most)


@pytest.mark.parametrize("bits", [4, 3])
def test_packed_weights_are_the_same_integers(bits):
    model = parse(
        "g (float[N,3,128] x) => (float[N,3,96] y) { h = MatMul (x, w1)  y = MatMul (h, w2) }",
        {"w1": normal(128, 128), "w2": normal(128, 96, seed=1)},
    )
    data = {"x": normal(16, 3, 128, seed=2)}
    made = {s: dynamic(model, data, weight_bits=bits, edge_bits=bits, storage=s) for s in ("packed", "int8")}
    assert made["packed"].model.ByteSize() < 0.75 * made["int8"].model.ByteSize()
    one, other = (Session(r.model).run({"x": data["x"][:2]})["y"] for r in made.values())
    np.testing.assert_array_equal(one, other)
    assert runtimes.make().kernels(made["packed"].model)[-1].kernel in (
        "DynamicQuantizeMatMul",
        "MatMulIntegerToFloat",
    )


def test_samples_share_no_range_with_others_in_a_batch():
    # One loud sample beside quiet ones: in one batch, the quiet ones would lose all steps.
    data = tokens(32)
    data["x"][::2] *= 100
    result = dynamic(block(), data)
    assert result.report.verification.outputs["y"] > 25


def trained(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Result, list[Any]]:
    """A result with a few steps, and what the optimization was given: network, start, graph."""
    seen: list[Any] = []

    def spying(*given: Any) -> Any:
        seen.extend(given[:3])
        return loop.optimize(*given)

    monkeypatch.setattr("eptq_onnx.passes.optimize.optimize", spying)
    result = dynamic(block(), preset="balanced", steps=3, patience=0, **options)
    trace = result.report.optimization
    assert trace is not None, result.report.notes
    assert trace.steps == 3
    assert all(np.isfinite(trace.losses))
    assert not [note for note in result.report.notes if "no gradient" in note or "is not optimized" in note]
    return result, seen


@pytest.mark.parametrize("bits", [8, 4])
def test_the_training_graph_computes_what_the_file_computes(each_engine, bits, monkeypatch):
    _, (network, start, graph) = trained(monkeypatch, engine=each_engine.name, weight_bits=bits)
    assert graph.micro_batch == 1
    [last] = [layer for layer, is_last in zip(network.plan.layers, graph.last, strict=True) if is_last]
    marked, _ = write(network.model, network.plan, start)
    x = {"x": tokens(1, seed=11)["x"]}
    parameters = {
        **{n: start.weights[n].dequantize(start.integers[n]) for n in network.plan.weight_specs},
        **start.biases,
    }
    session = Session(edit.exposing(graph.evaluate, [last.output]))
    feeds = session.taken({**x, **parameters, ATTENTION: np.ones((1, sum(graph.channels) + 1), np.float32)})
    emulated = session.run(feeds, [last.output])[last.output]
    found = Session(edit.exposing(integer_products(marked), [last.output])).run(x, [last.output])[last.output]
    exact = Session(edit.exposing(network.model, [last.output])).run(x, [last.output])[last.output]
    # Values at the border of two steps may be rounded to either: a part of the noise, never more.
    assert np.abs(emulated - found).max() < 0.5 * np.abs(found - exact).max()
    assert np.abs(emulated - found).mean() < 0.1 * np.abs(found - exact).mean()


def test_the_gradient_passes_straight_through_a_dynamic_quantizer(each_engine):
    text = """
    g (float[3,8] x, float[8,8] v) => (float loss) {
        h = MatMul (x, v)
        q, s, z = DynamicQuantizeLinear (h)
        d = DequantizeLinear (q, s, z)
        p = MatMul (d, w)
        e = Mul (p, p)
        loss = ReduceSum <keepdims = 0> (e)
    }
    """
    w, x, v = normal(8, 5), normal(3, 8, seed=1), normal(8, 8, seed=2)
    model = infer_shapes(parse(text, {"w": w}))
    found = each_engine.differentiate(model, "loss", ["v"])
    feeds = {"x": x, "v": v}
    gradient = Session(found.model, integers=False).run(feeds, [found.gradients["v"]])[found.gradients["v"]]
    d = Session(edit.exposing(model, ["d"])).run(feeds, ["d"])["d"]
    assert np.abs(d - x @ v).max() > 0
    np.testing.assert_allclose(gradient, x.T @ (2 * (d @ w) @ w.T), rtol=1e-4, atol=1e-5)


def test_a_dynamic_range_brings_less_noise_where_samples_differ():
    data = tokens(48)
    data["x"] *= np.geomspace(0.02, 2, 48, dtype=np.float32)[:, None, None]
    found = {
        how: dynamic(block(), data, activations=how, objective="integers").report.verification.outputs["y"]
        for how in ("static", "dynamic")
    }
    assert found["dynamic"] > found["static"] + 3


@pytest.mark.parametrize("name", [n for n in targets.names() if not targets.load(n).dynamic])
def test_targets_without_kernels_refuse(name):
    with pytest.raises(
        ConfigError, match=f"activations=dynamic is not for target {name}, which has no kernels"
    ):
        dynamic(block(), target=name)


@pytest.mark.parametrize("name", ["ort-x64", "ort-x64-vnni", "ort-arm64", "ort-web"])
def test_targets_of_onnxruntime_have_them(name):
    made = plan(normalize(block(), 13), targets.load(name), Config(activations="dynamic"))
    assert sum(layer.dynamic for layer in made.layers) == 6


def test_other_widths_of_activations_are_refused():
    with pytest.raises(ConfigError, match="quantizes activations to 8 bits, not 4"):
        dynamic(block(), activation_bits=4)


def test_what_no_product_is_keeps_float_activations():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,5] y) "
        "{ c = Conv <pads = [1, 1, 1, 1]> (x, k)  r = Relu (c)  p = GlobalAveragePool (r) "
        "f = Flatten (p)  y = Gemm (f, w, b) }",
        {"k": normal(16, 3, 3, 3), "w": normal(16, 5, seed=1), "b": normal(5, seed=2)},
    )
    result = dynamic(model, {"x": normal(24, 3, 8, 8, seed=3)})
    bits = {layer.op_type: layer.activation_bits for layer in result.report.layers}
    assert bits == {"Conv": 32, "Gemm": 8}
    assert operators(result.model)["MatMulInteger"] == 1


def test_no_samples_are_needed():
    result = quantize(block(), config=Config(activations="dynamic"), progress=silent)
    assert operators(result.model)["MatMulInteger"] == 6
    report = result.report
    assert report.verdict.assurance.value == "check"
    assert "there were no samples" in str(report.verdict)
    assert any("with samples (--data), layers are reconstructed" in note for note in report.notes)
    assert "--data" not in command_of("m.onnx", report.data, report.config)
    # It is as good as nearest rounding with samples, whatever the inputs that were made up.
    x, exact = tokens(8, seed=5), block()
    other = dynamic(block(), start="nearest", equalize=False)
    of = [Session(m).run(x)["y"] for m in (exact, result.model, other.model)]
    np.testing.assert_allclose(of[1], of[2], atol=1e-5)
    assert np.abs(of[1] - of[0]).mean() < 0.05 * np.abs(of[0]).mean()


def test_weights_alone_need_no_samples():
    result = quantize(block(), None, Config(bits="w4a32"), progress=silent)
    assert {x.activation_bits for x in result.report.layers} == {32}
    x = tokens(2)
    assert np.isfinite(Session(result.model).run(x)["y"]).all()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "fixed ranges of activations need samples"),
        ({"activations": "static"}, "fixed ranges of activations need samples"),
        ({"activations": "dynamic", "steps": 5}, "option steps needs samples"),
        ({"activations": "dynamic", "budget": "weights=4"}, "option budget needs samples"),
        ({"activations": "dynamic", "weight_range": "hmse"}, "option weight_range=hmse needs samples"),
        ({"bits": "w4a32", "objective": "bytes"}, "option objective=bytes needs samples"),
    ],
)
def test_what_needs_samples_says_so(options, what):
    with pytest.raises(ConfigError, match=what):
        quantize(block(), None, Config(**options), progress=silent)


def test_the_command_line_works_without_samples(tmp_path):
    onnx.save(block(), tmp_path / "model.onnx")
    made = tmp_path / "int8.onnx"
    given = ["quantize", str(tmp_path / "model.onnx"), "-o", str(made), "--no-measure-speed"]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2
    assert "need samples: give some with --data" in " ".join(refused.stderr.split())
    result = CliRunner().invoke(app, [*given, "--activations", "dynamic"])
    assert result.exit_code == 0, result.stderr
    assert operators(onnx.load(made))["MatMulInteger"] == 6


def test_auto_takes_dynamic_ranges_where_samples_differ_and_fixed_ones_where_not():
    spread = tokens(64)
    spread["x"] *= np.geomspace(0.02, 2, 64, dtype=np.float32)[:, None, None]
    wide = dynamic(block(), spread, activations="auto")
    assert [note for note in wide.report.notes if "find the ranges of their inputs in every run" in note]
    assert operators(wide.model)["MatMulInteger"] == 6
    conv = parse(
        "g (float[N,3,8,8] x) => (float[N,5] y) "
        "{ c = Conv <pads = [1, 1, 1, 1]> (x, k)  r = Relu (c)  d = Conv <pads = [1, 1, 1, 1]> (r, k2)  "
        "p = GlobalAveragePool (d)  f = Flatten (p)  y = Gemm (f, w, b) }",
        {
            "k": normal(16, 3, 3, 3),
            "k2": normal(16, 16, 3, 3, seed=4),
            "w": normal(16, 5, seed=1),
            "b": normal(5, seed=2),
        },
    )
    left = dynamic(conv, {"x": normal(64, 3, 8, 8, seed=3)}, activations="auto")
    assert operators(left.model)["MatMulInteger"] == 0


def test_the_result_of_auto_is_kept_in_a_workdir(tmp_path):
    data = tokens(64)
    data["x"] *= np.geomspace(0.02, 2, 64, dtype=np.float32)[:, None, None]
    first, again = (dynamic(block(), data, activations="auto", workdir=tmp_path) for _ in range(2))
    assert "dynamic" in next(n for n in again.report.notes if n.startswith("taken from the workdir"))
    assert first.model.SerializeToString() == again.model.SerializeToString()


def test_sums_of_integers_stay_float32_where_the_rest_is_float16():
    # A sum of 600 products of 8 bits does not fit float16, which the samples alone would not show.
    model = parse(
        "g (float[N,3,600] x) => (float[N,3,40] y) { h = MatMul (x, w1)  r = Relu (h)  y = MatMul (r, w2) }",
        {"w1": np.abs(normal(600, 64)), "w2": normal(64, 40, seed=1)},
    )
    data = {"x": normal(24, 3, 600, seed=2, scale=0.01)}
    result = dynamic(model, data, target="ort-web", rest="float16")
    view = GraphView(infer_shapes(result.model))
    casts = [n for n in view.nodes if n.op_type == "Cast" and "integers" in n.input[0]]
    assert [view.elem_type(n.output[0]) for n in casts] == [TensorProto.FLOAT] * 2
    loud = Session(result.model).run({"x": np.ones((1, 3, 600), np.float32)})["y"]
    assert np.isfinite(loud).all()


def test_inspect_counts_dynamic_layers():
    found = eptq_onnx.inspect(block(), Config(activations="dynamic"))
    assert {o.operator: o.integer for o in found.operators}["MatMul"] == 6
