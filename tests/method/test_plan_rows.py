"""What the rows of a target make of a plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.records import Plan
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once

HEAD = 'name = "mine"\ntitle = "Mine"\nextends = "ort-x64"\nverifier = "none"\n'


@pytest.fixture
def made(tmp_path):
    """A function from a graph, its constants and the lines of a target file to the plan."""

    def make(text: str, constants: dict[str, np.ndarray], lines: str, **options) -> Plan:
        (tmp_path / "mine.toml").write_text(HEAD + lines)
        model = parse(text, constants)
        for node in model.graph.node:
            node.name = node.output[0]
        return plan(normalize(model, 13), targets.load(str(tmp_path / "mine.toml")), Config(**options))

    return make


def why(p: Plan) -> dict[str, str]:
    return {k.node: k.reason for k in p.kept_float}


W = {"w1": normal(8, 3, 3, 3), "w2": normal(8, 8, 3, 3, seed=1), "w3": normal(8, 8, 3, 3, seed=2)}
OPEN = "\n".join(f'operators.{op}.output = "float"' for op in ("Conv", "Gemm", "MatMul", "Add", "Concat"))
RESIDUAL = (
    "g (float[N,3,8,8] x) => (float[N,8,8,8] y) { a = Conv <pads = [1,1,1,1]> (x, w1)  r = Relu (a)"
    "  b = Conv <pads = [1,1,1,1]> (r, w2)  s = Add (OPERANDS)  y = Conv <pads = [1,1,1,1]> (s, w3) }"
)


@pytest.mark.parametrize("operands", ["b, r", "r, b"])
def test_of_a_residual_sum_only_the_shortcut_is_quantized(made, operands):
    p = made(RESIDUAL.replace("OPERANDS", operands), W, f'{OPEN}\noperators.Add.inputs = "residual"\n')
    assert set(p.quantizer_of) == {"x", "r", "s"}
    assert "s" in p.integer_nodes
    both = made(RESIDUAL.replace("OPERANDS", operands), W, OPEN)
    assert set(both.quantizer_of) == {"x", "r", "b", "s"}


def test_of_two_layers_the_one_behind_more_layers_adds_the_other(made):
    text = (
        "g (float[N,3,8,8] x) => (float[N,8,8,8] y) { d = Conv <pads = [1,1,1,1]> (x, w1)"
        "  a = Conv <pads = [1,1,1,1]> (x, w1)  b = Conv <pads = [1,1,1,1]> (a, w2)  s = Add (d, b)"
        "  y = Conv <pads = [1,1,1,1]> (s, w3) }"
    )
    p = made(text, W, f'{OPEN}\noperators.Add.inputs = "residual"\n')
    assert set(p.quantizer_of) == {"x", "a", "d", "s"}


@pytest.mark.parametrize(
    ("change", "operands"),
    [("", "r, c"), ("", "r, r"), ("q = Sigmoid (b) ", "r, q"), ("q = Neg (b) ", "r, b"), ("", "b, c")],
)
def test_a_sum_that_no_layer_can_make_stays_float(made, change, operands):
    text = RESIDUAL.replace("OPERANDS", operands).replace("s = Add", f"{change} s = Add")
    if "Neg" in change:
        text = text.replace("=> (", "=> (float[N,8,8,8] q, ")
    p = made(text, {**W, "c": normal(8, 1, 1)}, f'{OPEN}\noperators.Add.inputs = "residual"\n')
    assert why(p)["s"].startswith("neither operand comes from a layer alone")
    assert "b" not in p.quantizer_of


CONCAT = (
    "g (float[N,3,8,8] x) => (float[N,8,8,8] y) { a = Conv <pads = [1,1,1,1]> (x, w1)  b = Sigmoid (a)"
    "  m = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (a)  c = Concat <axis = 1> (m, b, x)"
    "  y = Conv <pads = [1,1,1,1]> (c, v) }"
)


def test_a_concat_has_one_scale_that_covers_all_its_inputs(made, tmp_path):
    constants = {**W, "v": normal(8, 19, 3, 3)}
    p = made(CONCAT, constants, "operators.Concat.shared_scale = true\n")
    [shared] = {p.quantizer_of[t] for t in ("a", "m", "b", "c", "x")}
    assert shared.name == "x"
    assert set(shared.others) == {"a", "b"}
    assert shared.bounds == (-np.inf, np.inf)
    apart = made(CONCAT, constants, "")
    assert len({apart.quantizer_of[t] for t in ("a", "m", "b", "c", "x")}) == 4
    assert not any(q.others for q in apart.activations)


def test_the_range_of_a_shared_scale_covers_the_widest_input(made, tmp_path):
    constants: dict[str, Any] = {**W, "v": normal(8, 19, 3, 3), "big": np.float32(3)}
    text = CONCAT.replace("b = Sigmoid (a)", "b = Mul (a, big)")
    model = parse(text, constants)
    made(text, constants, 'operators.Concat.shared_scale = true\nactivation.container = "uint8"\n')
    config = Config(preset="fast", activation_range="minmax", target=str(tmp_path / "mine.toml"))
    result = eptq_onnx.quantize(model, images(16), config, progress=silent)
    view = GraphView(result.model)
    [concat] = [n for n in view.nodes if n.op_type == "Concat"]
    pairs = [view.producer[i] for i in concat.input]
    pairs += view.consumers[concat.output[0]]
    scales = {float(view.constant(n.input[1])) for n in pairs}
    assert len(scales) == 1
    values = Session(model).run({"x": images(16)})
    got = Session(result.model).run({"x": images(16)})
    assert np.square(values["y"] - got["y"]).mean() < 1e-2 * np.square(values["y"]).mean()
    assert scales.pop() * 255 > 3 * np.ptp(values["y"]) / 100


def test_a_concat_with_a_constant_shares_no_scale(made):
    text = CONCAT.replace("(m, b, x)", "(m, b, k)")
    constants = {**W, "v": normal(8, 19, 3, 3), "k": normal(1, 3, 8, 8)}
    p = made(text, constants, "operators.Concat.shared_scale = true\n")
    assert why(p)["c"] == "one of its operands is constant and does not share the scale of the others"


GATED = (
    "g (float[N,3,8,8] x) => (float[N,8,8,8] y) { a = Conv <pads = [1,1,1,1]> (x, w1)  b = Sigmoid (a)"
    "  m = Mul (a, b)  y = Conv <pads = [1,1,1,1]> (m, w2) }"
)


def test_a_pattern_stays_whole(made):
    p = made(GATED, W, 'patterns.keep = ["silu"]\n')
    assert why(p) == dict.fromkeys("bm", "mine runs silu as a whole, in float")
    assert set(p.quantizer_of) == {"x", "a", "m", "y"}
    free = made(GATED, W, f'patterns.keep = ["silu"]\n{OPEN}\n')
    assert set(free.quantizer_of) == {"x", "m"}, "the layer in front does not ask for a quantized output"
    assert set(made(GATED, W, "").quantizer_of) == {"x", "a", "b", "m", "y"}


def test_a_clip_of_a_pattern_is_not_absorbed(made):
    text = GATED.replace("b = Sigmoid (a)", "t = Add (a, three)  c = Clip (t, zero, six)  b = Div (c, six)")
    constants = {**W, "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6)}
    p = made(text, constants, 'patterns.keep = ["hard swish"]\n')
    assert not p.absorbed
    assert set(why(p)) == set("tcbm")


@pytest.mark.parametrize(
    ("lines", "reasons"),
    [
        ("least = { input_channels = 4 }", {"a": "its number of input channels is 3, but the target takes"}),
        ("least = { input_channels = 4 }\nexcept_first = true", {}),
        (
            "most = { kernel = 2 }\nexcept_first = true",
            dict.fromkeys("by", "its kernel's shortest side is 3"),
        ),
    ],
)
def test_a_size_beyond_a_limit_is_a_reason(made, lines, reasons):
    p = made(RESIDUAL.replace("OPERANDS", "b, r"), W, f"[operators.Conv]\n{lines}\n")
    assert {n for n, r in why(p).items() if "the target takes" in r} == set(reasons)
    assert all(why(p)[n].startswith(r) for n, r in reasons.items())


@pytest.mark.parametrize("computed", [True, False])
def test_products_of_computed_matrices_stay_float_where_the_target_says_so(made, computed):
    text = (
        "g (float[N,4,8] x) => (float[N,4,6] y) { q = MatMul (x, w)  t = Transpose <perm = [0,2,1]> (q)"
        "  s = MatMul (q, t)  y = MatMul (s, v) }"
    )
    p = made(
        text,
        {"w": normal(8, 8), "v": normal(4, 6)},
        f"operators.MatMul.computed = {str(computed).lower()}\n",
    )
    assert ("s" in p.integer_nodes) == computed
    assert computed or why(p)["s"] == "its weight is computed at run time"


def test_an_output_that_is_always_quantized_needs_no_reader(made):
    text = (
        "g (float[N,3,8,8] x) => (float[N,8,1,1] y) { a = Conv <pads = [1,1,1,1]> (x, w1)"
        "  y = GlobalAveragePool (a) }"
    )
    assert why(made(text, W, "")) == {"y": "no integer operator reads its result"}
    p = made(text, W, 'operators.GlobalAveragePool.output = "quantized"\n')
    assert not why(p)
    assert "y" in p.quantizer_of


@pytest.mark.parametrize("outputs", ["shared", "float"])
def test_outputs_of_the_network_stay_float_where_the_target_says_so(tmp_path, outputs):
    (tmp_path / "mine.toml").write_text(f'{HEAD}outputs = "{outputs}"\n')
    text = (
        "g (float[N,3,8,8] x) => (float[N,8,8,8] a, float[N,8,8,8] y)"
        " { a = Conv <pads = [1,1,1,1]> (x, w1)  y = Conv <pads = [1,1,1,1]> (a, w2) }"
    )
    config = Config(preset="fast", target=str(tmp_path / "mine.toml"))
    result = eptq_onnx.quantize(parse(text, W), images(8), config, progress=silent)
    view = GraphView(result.model)
    assert view.outputs == ("a", "y")
    makers = {view.producer[o].op_type for o in view.outputs}
    assert makers == ({"Conv"} if outputs == "float" else {"DequantizeLinear"})
    [reader] = [n for n in view.nodes if n.op_type == "Conv" and n.output[0] != "a"][-1:]
    assert view.producer[reader.input[0]].op_type == "DequantizeLinear"


@pytest.mark.parametrize("has", [True, False])
def test_an_integer_bias_is_written_with_its_zero_point_or_without(tmp_path, has):
    (tmp_path / "mine.toml").write_text(f"{HEAD}bias.zero_point = {str(has).lower()}\n")
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,8,h,k] y) { y = Conv (x, w1, b) }", {**W, "b": normal(8, seed=4)}
    )
    config = Config(preset="fast", target=str(tmp_path / "mine.toml"))
    result = eptq_onnx.quantize(model, images(8), config, progress=silent)
    view = GraphView(result.model)
    [bias] = [
        n
        for n in view.nodes
        if n.op_type == "DequantizeLinear"
        and view.is_constant(n.input[0])
        and view.constant(n.input[0]).dtype == np.int32
    ]
    assert len(bias.input) == 2 + has
    Session(result.model).run({"x": images(2)})


def test_weights_shared_by_operators_of_other_rules_belong_to_one_of_them(made):
    text = "g (float[6,8] x) => (float[6,8] y) { a = MatMul (x, w)  y = Gemm (a, w) }"
    p = made(text, {"w": normal(8, 8)}, "operators.Gemm.weight.per_channel = false\n")
    assert [x.op_type for x in p.layers] == ["MatMul"]
    assert why(p)["y"] == "its weight w is shared with a layer whose weights follow other rules"


@pytest.mark.parametrize(("output", "pairs"), [("optional", 4), ("float", 3)])
def test_behind_a_move_no_pair_is_written_where_the_target_wants_none(tmp_path, output, pairs):
    (tmp_path / "mine.toml").write_text(f'{HEAD}operators.MaxPool.output = "{output}"\n')
    text = (
        "g (float[N,3,8,8] x) => (float[N,8,8,8] y) { a = Conv <pads = [1,1,1,1]> (x, w1)"
        "  m = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (a)  y = Conv <pads = [1,1,1,1]> (m, w2) }"
    )
    config = Config(preset="fast", target=str(tmp_path / "mine.toml"))
    result = eptq_onnx.quantize(parse(text, W), images(8), config, progress=silent)
    view = GraphView(result.model)
    assert sum(n.op_type == "QuantizeLinear" for n in view.nodes) == pairs
    [pool] = [n for n in view.nodes if n.op_type == "MaxPool"]
    [reader] = view.consumers[pool.output[0]]
    assert reader.op_type == ("QuantizeLinear" if output == "optional" else "Conv")
    assert view.producer[pool.input[0]].op_type == "DequantizeLinear"
