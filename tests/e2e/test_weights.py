"""Every way to hold a weight: each ends in integers, and the outputs stay close."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from graphs import normal, parse
from onnx import ModelProto, helper, numpy_helper

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.runtime import Session

IMAGE = "g (float[N,3,8,8] x) => (float[N,4,6,6] y)"
ROWS = "g (float[N,4,6] x) => (float[N,a,b] y)"
W = normal(4, 3, 3, 3)
INTEGERS = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)


def listed_as_input() -> ModelProto:
    model = parse(f"{IMAGE} {{ y = Conv (x, w) }}", {"w": W})
    model.graph.input.append(helper.make_tensor_value_info("w", 1, W.shape))
    return model


def sparse(flat: bool) -> ModelProto:
    model = parse(f"{IMAGE} {{ y = Conv (x, w) }}")
    values = np.where(np.abs(W) > 0.3, W, 0)
    places = np.flatnonzero(values) if flat else np.argwhere(values)
    held = numpy_helper.from_array(values[values != 0], "w")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(held, numpy_helper.from_array(places.astype(np.int64)), W.shape)
    )
    return model


def function() -> ModelProto:
    return onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N,3,8,8] x) => (float[N,2,8,8] y) { y = local.outer <scale = 2.0> (x) }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    outer <scale> (x) => (y) {
        v = Constant <value_floats = [1.0, 0.5, 0.2, -1.0, 0.3, 0.1]> ()
        s = Constant <value_ints = [2, 3, 1, 1]> ()
        w = Reshape (v, s)
        c = Conv (x, w)
        k = Constant <value_float : float = @scale> ()
        y = local.inner (c, k)
    }
    <domain: "local", opset_import: ["" : 17]>
    inner (x, z) => (y) { m = Mul (x, z)  y = Relu (m) }
    """)


CASES: dict[str, tuple[Callable[[], ModelProto] | ModelProto, int]] = {
    "constant": (parse(f"{IMAGE} {{ v = Constant <value = float[1,3,1,1] {{1.0, 2.0, -0.5}}> ()  a = Conv (x, v)  y = Conv (a, w) }}",
                       {"w": normal(4, 1, 3, 3)}), 2),
    "listed as input": (listed_as_input, 1),
    "identity": (parse(f"{IMAGE} {{ v = Identity (w)  y = Conv (x, v) }}", {"w": W}), 1),
    "transpose": (parse(f"{IMAGE} {{ v = Transpose <perm = [1,0,2,3]> (w)  y = Conv (x, v) }}", {"w": W.swapaxes(0, 1).copy()}), 1),
    "reshape": (parse(f"{IMAGE} {{ v = Reshape (w, s)  y = Conv (x, v) }}", {"w": W.reshape(-1), "s": np.array(W.shape)}), 1),
    "cast": (parse(f"{IMAGE} {{ v = Cast <to = 1> (w)  y = Conv (x, v) }}", {"w": W.astype(np.float16)}), 1),
    "unsqueeze": (parse("g (float[N,3,8,8] x) => (float[N,4,8,8] y) { v = Unsqueeze (w, a)  y = Conv (x, v) }",
                        {"w": normal(4, 3, 1), "a": np.array([3])}), 1),
    "dequantized": (parse(f"{IMAGE} {{ v = DequantizeLinear <axis = 0> (w, s, z)  y = Conv (x, v) }}",
                          {"w": INTEGERS, "s": np.linspace(0.01, 0.02, 4, dtype=np.float32), "z": np.zeros(4, np.int8)}), 1),
    "sparse, flat places": (lambda: sparse(True), 1),
    "sparse, places by axis": (lambda: sparse(False), 1),
    "shared": (parse("g (float[N,3,8,8] x) => (float[N,3,4,4] y) { a = Conv (x, w, b)  y = Conv (a, w, b) }",
                     {"w": normal(3, 3, 3, 3), "b": normal(3, seed=1)}), 2),
    "shared bias": (parse("g (float[N,3,8,8] x) => (float[N,3,4,4] y) { a = Conv (x, w, b)  y = Conv (a, v, b) }",
                          {"w": normal(3, 3, 3, 3), "v": normal(3, 3, 3, 3, seed=2), "b": normal(3, seed=1)}), 2),
    "also an output": (parse("g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[4,3,3,3] z) { y = Conv (x, w)  z = Identity (w) }",
                             {"w": W}), 1),
    "left operand": (parse(f"{ROWS} {{ y = MatMul (w, x) }}", {"w": normal(5, 4)}), 1),
    "stacked matrices": (parse("g (float[N,2,4,6] x) => (float[N,2,4,5] y) { y = MatMul (x, w) }", {"w": normal(2, 6, 5)}), 1),
    "bias behind a matrix product": (parse("g (float[N,6] x) => (float[N,5] y) { m = MatMul (x, w)  y = Add (b, m) }",
                                           {"w": normal(6, 5), "b": normal(1, 5)}), 1),
    "einsum, heads": (parse("g (float[N,4,6] x) => (float[N,4,2,5] y) { y = Einsum <equation = \"bsd, dhk -> bshk\"> (x, w) }",
                            {"w": normal(6, 2, 5)}), 1),
    "einsum, heads joined": (parse("g (float[N,4,2,6] x) => (float[N,4,5] y) { y = Einsum <equation = \"bshk,dhk->bsd\"> (x, w) }",
                                   {"w": normal(5, 2, 6)}), 1),
    "local functions": (function, 1),
    "sequence": (parse("g (float[N,4,8,8] x) => (float[N,4,6,6] y) { c = Conv (x, w)  s = SplitToSequence <axis = 1> (c, n)"
                       " i = Constant <value = int64 {0}> ()  a = SequenceAt (s, i)  y = Conv (a, v) }",
                       {"w": normal(4, 4, 1, 1), "n": np.array(2), "v": normal(4, 2, 3, 3)}), 2),
    "one dimension": (parse("g (float[N,3,8] x) => (float[N,4,6] y) { y = Conv (x, w) }", {"w": normal(4, 3, 3)}), 1),
    "three dimensions": (parse("g (float[N,3,5,5,5] x) => (float[N,4,3,3,3] y) { y = Conv (x, w) }", {"w": normal(4, 3, 3, 3, 3)}), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_weight_ends_in_integers(case):
    made, layers = CASES[case]
    model = made if isinstance(made, ModelProto) else made()
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    result = eptq_onnx.quantize(model, {"x": normal(12, *shape, seed=3, scale=1)}, Config(preset="fast"))
    assert len(result.report.layers) == layers
    weights = {t.name: t.data_type for t in result.model.graph.initializer}
    floats = [t for t in result.model.graph.initializer if t.data_type == 1 and len(t.dims) > 1]
    assert not floats or case == "also an output", weights
    x = normal(4, *shape, seed=4, scale=1)
    expected, got = Session(model).run({"x": x})["y"], Session(result.model).run({"x": x})["y"]
    assert np.square(got - expected).mean() < 0.01 * np.square(expected).mean()


def test_an_einsum_that_is_no_matrix_product_is_told():
    model = parse(
        'g (float[N,4,6] x) => (float[N,5,6] y) { h = MatMul (x, v)  y = Einsum <equation = "bsd,sk->bkd"> (h, w) }',
        {"v": normal(6, 6), "w": normal(4, 5)},
    )
    result = eptq_onnx.quantize(model, {"x": normal(12, 4, 6)}, Config(preset="fast"))
    assert [k.op_type for k in result.report.kept_float] == ["Einsum"]


def test_a_model_whose_activations_are_quantized_is_taken():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  y = Conv (d, w) }",
        {"w": W, "s": np.float32(0.1), "z": np.int8(0)},
    )
    result = eptq_onnx.quantize(model, {"x": normal(12, 3, 8, 8)}, Config(preset="fast"))
    assert any("activations that keep their ranges: 1" in n for n in result.report.notes)
    assert [layer.weight_bits for layer in result.report.layers] == [8]


EXTREME = np.where(normal(8, 8, 3, 3) > -0.2, 1, -1).astype(np.float32)


@pytest.mark.parametrize("group", [1, 2, 8])
def test_products_of_the_largest_integers_do_not_saturate(group):
    # On processors without VNNI, kernels that add products in 16 bits would lose them.
    model = parse(
        f"g (float[N,8,8,8] x) => (float[N,8,5,5] y) {{ a = Conv <group = {group}> (x, w)  y = Conv <group = {group}> (a, v) }}",
        {"w": EXTREME[:, : 8 // group] / 8, "v": EXTREME[::-1, : 8 // group, 1:, 1:] / 8},
    )
    x = np.abs(np.random.default_rng(0).normal(0.9, 0.2, (12, 8, 8, 8))).astype(np.float32)
    written = eptq_onnx.quantize(model, {"x": x}, Config(preset="fast")).model
    exact, got = (Session(written, integers=integers).run({"x": x})["y"] for integers in (False, True))
    assert np.square(got - exact).mean() < 1e-4 * np.square(exact).mean()


TABLE = normal(400, 48, seed=5) * np.geomspace(0.1, 10, 400, dtype=np.float32)[:, None]
EMBEDDING = parse(
    "g (int64[N,7] x) => (float[N,7,4] y, float[N,7,48] e) { e = Gather (t, x)  n = LayerNormalization (e, g, h)  y = MatMul (n, w) }",
    {"t": TABLE, "g": np.ones(48, np.float32), "h": np.zeros(48, np.float32), "w": normal(48, 4)},
)


@pytest.mark.parametrize("options", [{"preset": "fast"}, {"steps": 2}])
def test_an_embedding_is_stored_in_8_bits_with_a_scale_for_each_row(options):
    ids = np.random.default_rng(0).integers(0, 400, (12, 7))
    result = eptq_onnx.quantize(EMBEDDING, {"x": ids}, Config(**options))
    onnx.checker.check_model(result.model, full_check=True)
    assert [k.reason for k in result.report.kept_float if k.op_type == "Gather"] == [
        "its table is stored in 8 bits with one scale per row; looked-up rows are float"
    ]
    assert result.report.verification.quantized_bytes < 0.4 * result.report.verification.float_bytes
    got = Session(result.model).run({"x": ids - 400})  # counted from the end, as Gather allows
    rows = TABLE[ids]
    step = np.abs(rows).max(axis=-1, keepdims=True) / 127
    assert (np.abs(got["e"] - rows) <= step).all()
    assert np.square(got["e"] - rows).mean(axis=-1).max() > 0
    expected = Session(EMBEDDING).run({"x": ids})["y"]
    assert np.square(got["y"] - expected).mean() < 0.01 * np.square(expected).mean()


def test_small_tables_and_other_axes_stay_as_they_are():
    model = parse(
        "g (int64[N,7] x) => (float[N,7,4] y) { e = Gather (t, x)  f = Gather <axis = 1> (u, k)  m = MatMul (e, f)"
        " r = Tanh (m)  y = MatMul (r, w) }",
        {"t": normal(20, 6), "u": normal(6, 4000), "k": np.array([0, 5, 7]), "w": normal(3, 4)},
    )
    ids = np.random.default_rng(0).integers(0, 20, (12, 7))
    result = eptq_onnx.quantize(model, {"x": ids}, Config(preset="fast"))
    assert [k.reason for k in result.report.kept_float if k.op_type == "Gather"] == [
        "its table has fewer than 16384 values: storing it as integers would not pay"
    ]


def test_a_table_that_is_a_layers_weight_too_stays_float():
    model = parse(
        "g (int64[N] x) => (float[N,400] y) { e = Gather (t, x)  n = LayerNormalization (e, g, h)  y = Gemm <transB = 1> (n, t) }",
        {"t": TABLE, "g": np.ones(48, np.float32), "h": np.zeros(48, np.float32)},
    )
    ids = np.random.default_rng(0).integers(0, 400, 40)
    result = eptq_onnx.quantize(model, {"x": ids}, Config(steps=2))
    assert [k.reason for k in result.report.kept_float if k.op_type == "Gather"] == [
        "its table is the weight of a layer too"
    ]
    expected, got = Session(model).run({"x": ids})["y"], Session(result.model).run({"x": ids})["y"]
    assert np.square(got - expected).mean() < 0.01 * np.square(expected).mean()
