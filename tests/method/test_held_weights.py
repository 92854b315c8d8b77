"""Weights of recurrent layers, which compute in float, stored as integers."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse, silent
from hypothesis import given, settings
from hypothesis import strategies as st

import eptq_onnx
from eptq_onnx import Config, runtimes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.runtime import Session

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def network(op_type="LSTM", hidden=48, directions=1, size=24):
    """Five steps of a recurrent layer between two products, the second with a bias."""
    rows, final = GATES[op_type] * hidden, directions * hidden
    outputs = "h, last, cell" if op_type == "LSTM" else "h, last"
    direction = "bidirectional" if directions == 2 else "forward"
    return parse(
        f"""
        g (float[N,5,{size}] x) => (float[N,5,16] y) {{
            a = MatMul (x, w0)
            t = Transpose <perm = [1,0,2]> (a)
            {outputs} = {op_type} <hidden_size = {hidden}, direction = "{direction}"> (t, w, r, b)
            p = Transpose <perm = [2,0,1,3]> (h)
            s = Constant <value_ints = [0,0,{final}]> ()
            q = Reshape (p, s)
            z = MatMul (q, w1)
            y = Add (z, b1)
        }}
        """,
        {
            "w0": normal(size, size),
            "w": normal(directions, rows, size, seed=1) / np.float32(size**0.5),
            "r": normal(directions, rows, hidden, seed=2) / np.float32(hidden**0.5),
            "b": normal(directions, 2 * rows, seed=3),
            "w1": normal(final, 16, seed=4),
            "b1": normal(16, seed=5),
        },
    )


def samples(count=24, size=24, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 5, size)).astype(np.float32)


def quantized(model, data=None, **options):
    chosen = {
        "preset": "fast",
        "measure_speed": False,
        "objective": "integers",
        "target": "ort-x64",
        **options,
    }
    return eptq_onnx.quantize(model, samples() if data is None else data, Config(**chosen), progress=silent)


def reason(result, op_type):
    return {k.reason for k in result.report.kept_float if k.op_type == op_type}


def noise(exact, result, tensor="y"):
    feeds = {"x": samples(16, seed=7)}
    wanted, found = (Session(m).run(feeds)[tensor] for m in (exact, result.model))
    return float(((found - wanted) ** 2).mean() / wanted.var())


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("op_type", list(GATES))
def test_weights_take_a_byte_each_and_the_layer_computes_in_float(op_type, directions):
    model = network(op_type, directions=directions)
    result = quantized(model)
    assert reason(result, op_type) == {
        "its weights are stored in 8 bits with one scale per channel; it computes in float"
    }
    view = GraphView(result.model)
    [node] = [n for n in view.nodes if n.op_type == op_type]
    assert [view.producer[i].op_type for i in node.input[1:3]] == ["Mul", "Mul"]
    count = directions * GATES[op_type] * 48 * (24 + 48)
    assert count <= result.report.sizes["weights"] < count + 24 * 24 + 48 * directions * 16 + 600
    assert op_type in {k.kernel for k in runtimes.make().kernels(result.model)}
    assert noise(model, result) < 10**-3


def test_a_rule_of_the_user_chooses_the_bits():
    model = network()
    results = {bits: quantized(model, bits=f"LSTM_2=w{bits}a32") for bits in (8, 4)}
    assert "in 4 bits" in next(iter(reason(results[4], "LSTM")))
    count = 4 * 48 * (24 + 48)
    saved = results[8].report.sizes["weights"] - results[4].report.sizes["weights"]
    assert abs(saved - count / 2) < 600
    assert noise(model, results[8]) < noise(model, results[4]) < 0.1


def test_an_excluded_layer_keeps_its_weights():
    model = network()
    result = quantized(model, exclude="LSTM_2")
    view = GraphView(result.model)
    assert {"w", "r"} <= set(view.initializers)
    assert reason(result, "LSTM") == {"excluded by the pattern LSTM_2"}


def test_small_weights_stay_as_they_are():
    result = quantized(network(hidden=2, size=4), samples(size=4))
    view = GraphView(result.model)
    assert {"w", "r"} <= set(view.initializers)
    assert reason(result, "LSTM") == {"ort-x64 has no integer kernel for LSTM"}


def test_a_target_that_does_not_unpack_keeps_them_float():
    result = quantized(network(), target="portable")
    assert {"w", "r"} <= set(GraphView(result.model).initializers)


def test_a_network_of_recurrent_layers_alone_is_quantized():
    model = parse(
        """
        g (float[5,N,24] x) => (float[5,1,N,48] y, float[1,N,48] last) {
            y, last = GRU <hidden_size = 48> (x, w, r)
        }
        """,
        {"w": normal(1, 144, 24) / np.float32(5), "r": normal(1, 144, 48, seed=1) / np.float32(7)},
    )
    result = quantized(model, samples())
    assert result.report.samples == 24
    assert result.model.ByteSize() < 0.4 * model.ByteSize()
    assert result.report.verification.planned == {}
    assert min(result.report.verification.outputs.values()) > 30


def test_a_weight_that_other_nodes_read_is_there_for_them_too():
    model = network()
    node = parse("g (float[N] x) => (float[1,192,24] u) { u = Neg (w) }", {"w": np.zeros(1, np.float32)})
    model.graph.node.extend(node.graph.node)
    model.graph.output.extend(node.graph.output)
    result = quantized(model)
    feeds = {"x": samples(2)}
    exact, found = Session(model).run(feeds), Session(result.model).run(feeds)
    np.testing.assert_array_equal(found["u"], exact["u"])


def test_the_network_wise_optimization_reads_the_stored_values():
    model = network()
    result = quantized(model, preset="balanced", steps=20, weight_bits=4)
    assert noise(model, result) < 0.1


@given(st.sampled_from(list(GATES)), st.sampled_from([16, 33]), st.sampled_from([1, 2]), st.integers(2, 8))
@settings(max_examples=8)
def test_drawn_layers_stay_close_to_the_float_model(op_type, hidden, directions, bits):
    model = network(op_type, hidden, directions)
    result = quantized(model, bits=f"{op_type}_2=w{bits}a32", equalize=False, rotate=False)
    assert f"stored in {bits} bits" in next(iter(reason(result, op_type)))
    assert noise(model, result) < 2.0 ** (4 - 2 * bits) + 4e-3


def test_the_sum_behind_a_product_does_not_hide_its_kernel():
    """onnxruntime 1.32 joins both into a Gemm if the bias is a vector."""
    result = quantized(network())
    verification = result.report.verification
    assert verification.planned["MatMul"] == verification.kernels["MatMul"]
    view = GraphView(result.model)
    [last] = [n for n in view.nodes if n.op_type == "Add"]
    assert [view.constant_shape(i) for i in last.input if view.is_constant(i)] == [(1, 16)]
