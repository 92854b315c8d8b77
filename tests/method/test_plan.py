from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse, small_convnet

import eptq_onnx
from eptq_onnx import targets
from eptq_onnx.config import Config
from eptq_onnx.errors import ModelError
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.records import ActivationQuantizer, ConstantOperand, Plan

TARGET = targets.load("ort-x64")


def make(model, **options) -> Plan:
    return plan(normalize(model, 13), TARGET, Config(**options))


def reasons(p: Plan) -> dict[str, str]:
    return {k.op_type: k.reason for k in p.kept_float}


def test_convnet():
    p = make(small_convnet(), weight_bits=4, activation_bits=4)
    assert [x.op_type for x in p.layers] == ["Conv", "Conv", "Conv", "Gemm"]
    assert sorted(p.integer_nodes.values()) == [
        "Add",
        "Conv",
        "Conv",
        "Conv",
        "Flatten",
        "Gemm",
        "GlobalAveragePool",
    ]
    assert sorted(p.absorbed.values()) == ["Clip", "Relu"]
    assert not p.kept_float
    by_name = p.quantizer_of
    bounds = {t: q.bounds for q in p.activations for t in q.tensors}
    assert bounds["a1"] == (0.0, 6.0)
    assert bounds["a2"] == (0.0, np.inf)
    assert "n1" not in by_name, "what an absorbed function cuts off is not quantized in front of it"
    assert "logits" not in by_name, "Gemm needs no quantized output"
    assert by_name["p"] is by_name["f"], "Flatten keeps the scale"
    assert [x.weight_spec.bits for x in p.layers] == [8, 4, 4, 8]
    assert [x.edge for x in p.layers] == [True, False, False, True]
    assert by_name["image"].spec.bits == 8
    assert by_name["f"].spec.bits == 8
    assert by_name["a1"].spec.bits == 4
    assert [(x.result, x.output) for x in p.layers][:2] == [("a1", "n1"), ("a2", "c2")]


def test_activations_at_the_edges_are_no_narrower_than_the_others():
    p = make(small_convnet(), weight_bits=4, edge_bits=4)
    assert {x.weight_spec.bits for x in p.layers} == {4}
    assert {q.spec.bits for q in p.activations} == {8}


def test_eight_bit_weights_leave_room_for_machines_without_vnni():
    dense, depthwise, *_ = (x.weight_spec for x in make(small_convnet()).layers)
    assert (dense.qmin, dense.qmax) == (-64, 63)
    # Its kernel always accumulates in 32 bits.
    assert (depthwise.qmin, depthwise.qmax) == (-127, 127)
    assert (TARGET.weight_spec(4, 0).qmin, TARGET.weight_spec(4, 0).qmax) == (-8, 7)


def test_a_weight_that_a_dense_layer_reads_too_is_no_depthwise_one():
    text = """
        g (float[N,3,8,8] x) => (float[N,3,6,6] y, float[N,3,6,6] z)
        {{ y = Conv <group = 3> (x, w)  c = Conv (x, v)  z = Conv <group = {}> (c, w) }}
    """
    for group, most in ((3, 127), (1, 63)):
        p = make(parse(text.format(group), {"w": normal(3, 1, 3, 3), "v": normal(group, 3, 1, 1)}))
        assert {x.weight_spec.qmax for x in p.layers if x.weight == "w"} == {most}


def test_the_head_behind_the_last_layer_stays_float():
    p = make(
        parse(
            "g (float[N,3,8,8] x) => (float[N,8,36] y) {"
            " a = Conv (x, w)  b = Conv (x, v)  s = Sigmoid (b)  c = Concat <axis = 1> (a, s)"
            " y = Reshape (c, shape) }",
            {"w": normal(4, 3, 3, 3), "v": normal(4, 3, 3, 3), "shape": np.array([0, 8, 36])},
        )
    )
    assert set(p.integer_nodes.values()) == {"Conv"}
    assert set(reasons(p)) == {"Sigmoid", "Concat", "Reshape"}
    assert {"a", "b", "x"} == set(p.quantizer_of)


def test_reasons():
    p = make(
        parse(
            "g (float[N,3,8,8] x, float[4,3,3,3] k) => (float[N,h] y) {"
            " a = Conv (x, w)  e = Elu (a)  d = Conv (x, k)  u = Add (d, e)  z = Conv (u, v)"
            "  t = com.microsoft.Gelu (z)"
            " r = Relu (t)  y = Flatten (z) }",
            {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3)},
        )
    )
    why = reasons(p)
    assert why["Elu"] == "ort-x64 has no integer kernel for Elu"
    assert why["Conv"] == "its weight is computed at run time"
    assert why["Flatten"] == "no integer operator reads its result"
    assert sorted(p.integer_nodes.values()) == ["Add", "Conv", "Conv"]


def test_an_operator_without_a_row_stays_float():
    p = make(
        parse(
            "g (float[N,3,8,8] x) => (float[N,4] y) { a = Conv (x, w)  y = Det (a) }",
            {"w": normal(4, 3, 3, 3)},
        )
    )
    assert reasons(p) == {"Det": "Det is not in the operator table"}


def test_pooling_shares_the_scale_of_its_input_and_resize_only_without_interpolation():
    text = (
        "g (float[N,3,8,8] x) => (float[N,4,h,w] y) {{"
        " a = Conv (x, w)  m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)"
        ' r = Resize <mode = "{mode}"> (m, , s)  y = Conv (r, v) }}'
    )
    constants = {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3), "s": np.array([1, 1, 2, 2], np.float32)}
    nearest = make(parse(text.format(mode="nearest"), constants))
    assert nearest.quantizer_of["a"].tensors == ("a", "m", "r")
    linear = make(parse(text.format(mode="linear"), constants))
    assert linear.quantizer_of["a"].tensors == ("a", "m") or linear.quantizer_of["a"].tensors == ("a",)
    assert "interpolation" in reasons(linear)["Resize"]


def test_a_relu_with_another_reader_is_not_absorbed():
    p = make(
        parse(
            "g (float[N,3,8,8] x) => (float[N,4,4,4] y, float[N,4,6,6] z) {"
            " a = Conv (x, w)  r = Relu (a)  y = Conv (r, v)  z = Tanh (a) }",
            {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3)},
        )
    )
    assert not p.absorbed
    assert {"a", "r"} <= set(p.quantizer_of)


def test_a_shared_weight_has_one_spec_and_is_wide_if_any_of_its_layers_is_an_edge():
    p = make(
        parse(
            "g (float[N,3,8,8] x) => (float[N,3,h,w] y) {"
            " a = Conv (x, w)  b = Conv (a, v)  y = Conv (b, w) }",
            {"w": normal(3, 3, 3, 3), "v": normal(3, 3, 3, 3)},
        ),
        weight_bits=4,
    )
    assert {x.weight: x.weight_spec.bits for x in p.layers} == {"w": 8, "v": 4}


def test_layers_of_a_residual_stream_are_not_all_first_and_last():
    p = make(
        parse(
            "g (float[N,4] x) => (float[N,4] y) {"
            " a = MatMul (x, u)  r = Add (x, a)  b = MatMul (r, v)  s = Add (r, b)"
            " c = MatMul (s, w)  y = Add (s, c) }",
            {n: normal(4, 4) for n in "uvw"},
        ),
        weight_bits=4,
        activation_bits=4,
    )
    assert {x.weight: (x.edge, x.weight_spec.bits) for x in p.layers} == {
        "u": (True, 8),
        "v": (False, 4),
        "w": (True, 8),
    }
    assert {n: p.quantizer_of[n].spec.bits for n in "xrs"} == {"x": 8, "r": 4, "s": 8}


def test_constant_operands_are_quantized_with_the_node():
    p = make(
        parse(
            "g (float[N,3,8,8] x) => (float[N,3,h,w] y) { m = Mul (x, c)  y = Conv (m, w) }",
            {"w": normal(3, 3, 3, 3), "c": np.float32(0.5)},
        )
    )
    assert isinstance(p.quantizer_of["c"], ConstantOperand)
    assert isinstance(p.quantizer_of["m"], ActivationQuantizer)


def test_nothing_to_quantize():
    with pytest.raises(ModelError, match="nothing to quantize"):
        make(parse("g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }"))
    with pytest.raises(ModelError, match="its weight is computed at run time"):
        make(parse("g (float[N,3,8,8] x, float[3,3,1,1] w) => (float[N,3,8,8] y) { y = Conv (x, w) }"))


def test_channel_axes_are_those_of_the_layers():
    p = make(
        parse(
            "g (float[N,3,8,8] x) => (float[N,4,8,5] y)"
            " { a = Conv <pads = [1,1,1,1]> (x, w)  m = MatMul (a, v)  r = Sigmoid (m)  y = MatMul (r, u) }",
            {"w": normal(4, 3, 3, 3), "v": normal(8, 6), "u": normal(6, 5)},
        )
    )
    axes = {q.name: q.channel_axis for q in p.activations}
    assert (axes["x"], axes["a"], axes["m"]) == (1, 1, 3)


def test_a_relu_behind_a_float_layer_is_float_unless_a_quantizer_cuts_off_the_same():
    constants = {"w": normal(3, 4, 3, 3), "v": normal(4, 4, 1, 1), "u": normal(4, 3, 1, 1)}
    text = (
        "g (float[N,3,8,8] x) => (float[N,4,h,w] y, float[N,4,8,8] z) {{"
        " a = ConvTranspose (x, w)  r = Relu (a)  {} z = Conv (x, u) }}"
    )
    read = make(parse(text.format("y = Conv (r, v)"), constants))
    assert set(reasons(read)) == {"ConvTranspose"}
    assert list(read.absorbed.values()) == ["Relu"]
    unread = make(parse(text.format("y = Tanh (r)"), constants))
    assert set(reasons(unread)) == {"ConvTranspose", "Relu", "Tanh"}
    assert not unread.absorbed


def test_an_infinite_operand_keeps_its_operator_float():
    """Attention masks contain minus infinity, which is no reason to refuse the model."""
    mask = np.array([0, 0, -np.inf, 0], np.float32)
    body = "a = MatMul (x, w1)  b = Add (a, mask)  y = MatMul (b, w2)"
    model = normalize(
        parse(
            f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}",
            {"w1": normal(4, 4), "w2": normal(4, 4), "mask": mask},
        ),
        13,
    )
    p = plan(model, targets.load("ort-x64"), Config())
    assert any(k.op_type == "Add" and "mask has infinite values" in k.reason for k in p.kept_float)
    assert len(p.layers) == 2


CONDITION = (
    "m = ReduceMean <axes = [1, 2, 3], keepdims = 0> (b)"
    "  t = ReduceMax <keepdims = 0> (m)  p = Greater (t, limit)"
)


@pytest.mark.parametrize("data", ["other", "same"])
def test_what_an_if_computes_with_does_more_than_choose(data):
    body = """z = If (p) <then_branch = t () => (float[N,4,8,8] u) { u = Tanh (IN) },
        else_branch = e () => (float[N,4,8,8] v) { v = Neg (IN) }>"""
    text = f"""g (float[N,3,8,8] x) => (float[N,4,8,8] y) {{
        a = Conv (x, w)  b = Sigmoid (a)  s = Softplus (a)  {CONDITION}  {body}  y = Conv (z, k) }}"""
    model = parse(
        text.replace("IN", "s" if data == "other" else "b"),
        {"w": normal(4, 3, 1, 1), "k": normal(4, 4, 1, 1), "limit": np.float32(0.5)},
    )
    model = normalize(model, 13)
    kinds = {n.name: n.op_type for n in model.graph.node}
    exact = [kinds[name] for name in plan(model, TARGET, Config()).exact]
    assert ("Sigmoid" in exact) == (data == "other"), "one that only the condition is made of chooses"
    assert "Softplus" not in exact
    assert exact.count("ReduceMean") == exact.count("ReduceMax") == 1


def test_a_convolution_without_spatial_axes_stays_float():
    text = "g (float[N,4] x) => (float[N,5] y) <float[N,4] h> { h = Conv (x, w)  y = MatMul (h, v) }"
    model = parse(text, {"w": normal(4, 4), "v": normal(4, 5)})
    p = make(model)
    assert [x.op_type for x in p.layers] == ["MatMul"]
    assert reasons(p)["Conv"] == "it has no spatial axes"


@pytest.mark.parametrize("bias", ["w", "m", "c"])
def test_a_gemm_whose_bias_is_a_matrix_stays_float(bias):
    """onnxruntime adds operands that broadcast: one row per sample, or one value per sample."""
    text = (
        f"g (float[6,6] x) => (float[6,8] y) {{ a = Gemm (x, w, {bias})  r = Relu (a)  y = MatMul (r, v) }}"
    )
    constants = {
        "w": normal(6, 8),
        "m": normal(6, 8, seed=1),
        "c": normal(6, 1, seed=2),
        "v": normal(8, 8, seed=3),
    }
    result = eptq_onnx.quantize(
        parse(text, constants), normal(24, 6), Config(preset="fast", measure_speed=False)
    )
    assert [x.op_type for x in result.report.layers] == ["MatMul"]
    assert "its bias does not have one value per output channel" in [
        k.reason for k in result.report.kept_float
    ]


TWO_PATHS = (
    "g (float[N,8] x) => (float[N,8] y) {"
    " a = MatMul (x, w1)  r = Relu (a)  b = MatMul (r, w2)  c = MatMul (r, w3)  s = Add (b, c)"
    "  t = Sigmoid (s)  y = MatMul (t, w4) }"
)


def two_paths():
    model = parse(TWO_PATHS, {f"w{k}": normal(8, 8, seed=k) for k in range(1, 5)})
    for node in model.graph.node:
        node.name = node.output[0]
    return normalize(model, 21)


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [("b", {"b"}), ("op:MatMul", None), ("re:[bc]", {"b", "c"}), ("from:r..to:s", {"b", "c"})],
)
def test_excluded_nodes_stay_float_and_say_so(pattern, gone):
    if gone is None:
        with pytest.raises(ModelError, match="excluded by the pattern op:MatMul"):
            plan(two_paths(), TARGET, Config(exclude=pattern))
        return
    made = plan(two_paths(), TARGET, Config(exclude=[pattern]))
    assert {x.node for x in made.layers} == {"a", "b", "c", "y"} - gone
    assert {k.node for k in made.kept_float if k.reason == f"excluded by the pattern {pattern}"} >= gone


def test_an_excluded_clipping_function_is_not_absorbed():
    assert "r" in plan(two_paths(), TARGET, Config()).absorbed
    made = plan(two_paths(), TARGET, Config(exclude="r"))
    assert "r" not in made.absorbed
    assert "r" in {k.node for k in made.kept_float}


def test_bits_of_some_nodes():
    made = plan(two_paths(), TARGET, Config(bits=["w4a8", "op:MatMul=w6a8", "re:[bc]=w3a16"], edge_bits=4))
    assert {x.node: x.weight_spec.bits for x in made.layers} == {"a": 6, "b": 3, "c": 3, "y": 6}
    widths = {t: q.spec.bits for q in made.activations for t in q.tensors}
    assert widths["r"] == 16
    assert widths["x"] == 8


def test_a_tensor_has_the_most_bits_that_its_readers_want():
    made = plan(two_paths(), TARGET, Config(activation_bits=6, edge_bits=6, bits="b=w8a4"))
    assert {t: q.spec.bits for q in made.activations for t in q.tensors}["r"] == 6
    made = plan(two_paths(), TARGET, Config(activation_bits=6, edge_bits=6, bits=["b=w8a4", "c=w8a5"]))
    assert {t: q.spec.bits for q in made.activations for t in q.tensors}["r"] == 5


def test_a_weight_that_two_layers_read_has_the_most_bits_that_one_wants():
    model = parse(TWO_PATHS.replace("w3", "w2"), {f"w{k}": normal(8, 8, seed=k) for k in (1, 2, 4)})
    for node in model.graph.node:
        node.name = node.output[0]
    made = plan(normalize(model, 13), TARGET, Config(bits=["b=w5a8", "c=w3a8"]))
    assert {x.weight_spec.bits for x in made.layers if x.weight == "w2"} == {5}
