from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, small_convnet

from eptq_onnx.crashes import survives
from eptq_onnx.errors import EptqError
from eptq_onnx.graph import io
from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.method.normalize import normalize
from eptq_onnx.runtime import Session


def _ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def _same(model: onnx.ModelProto, normalized: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    onnx.checker.check_model(normalized, full_check=True)
    expected, got = Session(model).run(feeds), Session(normalized).run(feeds)
    assert list(expected) == list(got)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_batch_normalization_and_constants_are_folded():
    model = small_convnet()
    before = model.SerializeToString()
    normalized = normalize(model, 13)
    assert model.SerializeToString() == before
    assert "BatchNormalization" not in _ops(normalized)
    assert "Constant" not in _ops(normalized)
    view = GraphView(normalized)
    assert {"n1", "a1", "s", "p", "f", "logits"} <= set(view.producer)
    _same(model, normalized, {"image": images(2)})


@pytest.mark.parametrize("group", [1, 2])
def test_batch_normalization_behind_conv_transpose(group):
    model = parse(
        f"g (float[N,4,5,5] x) => (float[N,6,h,w] y) {{"
        f" c = ConvTranspose <strides = [2,2], group = {group}> (x, w, b) "
        "y = BatchNormalization (c, s, o, m, v) }",
        {
            "w": normal(4, 6 // group, 3, 3), "b": normal(6, seed=1), "s": normal(6, seed=2),
            "o": normal(6, seed=3), "m": normal(6, seed=4), "v": np.abs(normal(6, seed=5)) + 0.1,
        },
    )  # fmt: skip
    normalized = normalize(model, 13)
    assert _ops(normalized) == {"ConvTranspose": 1}
    _same(model, normalized, {"x": images(2, 4, 5)})


@pytest.mark.parametrize("trans", [0, 1])
def test_batch_normalization_behind_gemm(trans):
    model = parse(
        f"g (float[N,4] x) => (float[N,6] y) {{"
        f" c = Gemm <transB = {trans}> (x, w)  y = BatchNormalization (c, s, o, m, v) }}",
        {
            "w": normal(6, 4) if trans else normal(4, 6), "s": normal(6, seed=2), "o": normal(6, seed=3),
            "m": normal(6, seed=4), "v": np.abs(normal(6, seed=5)) + 0.1,
        },
    )  # fmt: skip
    normalized = normalize(model, 13)
    assert _ops(normalized) == {"Gemm": 1}
    _same(model, normalized, {"x": normal(3, 4)})


def test_batch_normalization_stays_where_the_layer_has_another_reader():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z)"
        " { c = Conv (x, w)  y = BatchNormalization (c, s, s, s, v)  z = Relu (c) }",
        {"w": normal(4, 3, 3, 3), "s": normal(4, seed=1), "v": np.ones(4, np.float32)},
    )
    normalized = normalize(model, 13)
    assert _ops(normalized)["BatchNormalization"] == 1
    _same(model, normalized, {"x": images(2)})


def test_weights_shared_by_two_layers_are_not_changed_for_one_of_them():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,3,8,8] y, float[N,3,8,8] z) { c = Conv <pads = [1,1,1,1]> (x, w, b)"
        " y = BatchNormalization (c, s, s, s, v)  z = Conv <pads = [1,1,1,1]> (x, w, b) }",
        {"w": normal(3, 3, 3, 3), "b": normal(3), "s": normal(3, seed=1), "v": np.ones(3, np.float32)},
    )
    normalized = normalize(model, 13)
    assert _ops(normalized) == {"Conv": 2}
    _same(model, normalized, {"x": images(2)})


def test_padding_in_front_of_a_convolution_is_folded():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,h,w] y) {"
        " p = Pad (x, pads)  y = Conv <strides = [2,2], pads = [1,0,0,1]> (p, w) }",
        {"pads": np.array([0, 0, 0, 1, 0, 0, 2, 1]), "w": normal(4, 3, 3, 3)},
    )
    normalized = normalize(model, 13)
    assert _ops(normalized) == {"Conv": 1}
    _same(model, normalized, {"x": images(2)})


@pytest.mark.parametrize(
    ("pads", "value"), [([0, 1, 0, 0, 0, 0, 0, 0], 0.0), ([0, 0, 1, 1, 0, 0, 1, 1], 0.5)]
)
def test_padding_that_a_convolution_cannot_do_stays(pads, value):
    channels = 3 + pads[1]
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,h,w] y) { p = Pad (x, pads, v)  y = Conv (p, w) }",
        {"pads": np.array(pads), "v": np.float32(value), "w": normal(4, channels, 3, 3)},
    )
    normalized = normalize(model, 13)
    assert _ops(normalized) == {"Conv": 1, "Pad": 1}
    _same(model, normalized, {"x": images(2)})


def test_shared_and_scalar_biases_become_one_per_layer():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,3,6,6] y, float[N,3,6,6] z) {"
        " y = Conv (x, w, b)  z = Conv (x, v, b) }",
        {"w": normal(3, 3, 3, 3), "v": normal(3, 3, 3, 3, seed=1), "b": normal(3, seed=2)},
    )
    normalized = normalize(model, 13)
    biases = [n.input[2] for n in normalized.graph.node]
    assert len(set(biases)) == 2
    _same(model, normalized, {"x": images(2)})
    gemm = parse(
        "g (float[N,4] x) => (float[N,3] y) { y = Gemm (x, w, b) }", {"w": normal(4, 3), "b": normal(1, 3)}
    )
    flat = normalize(gemm, 13)
    assert GraphView(flat).constant(flat.graph.node[0].input[2]).shape == (3,)
    _same(gemm, flat, {"x": normal(2, 4)})


def test_old_opset_is_really_converted():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,12,1,1] y) {"
        " c = Conv (x, w)  s = Softmax <axis = 1> (c)  p = GlobalAveragePool (s)"
        " u = Squeeze <axes = [2,3]> (p)  y = Unsqueeze <axes = [2,3]> (u) }",
        {"w": normal(12, 3, 3, 3)},
        opset=11,
    )
    normalized = normalize(model, 13)
    assert opset_of(normalized) == 13
    _same(model, normalized, {"x": images(2)})


def test_initializers_listed_as_inputs_are_constants():
    model = small_convnet()
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    normalized = normalize(model, 13)
    assert [i.name for i in normalized.graph.input] == ["image"]


def test_functions_are_inlined():
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N,3,8,8] x, float[3,3,1,1] w) => (float[N,3,8,8] y) { y = local.block (x, w) }
    <domain: "local", opset_import: ["" : 17]>
    block (x, w) => (y) { c = Conv (x, w)  y = Relu (c) }
    """)
    normalized = normalize(model, 13)
    assert _ops(normalized) == {"Conv": 1, "Relu": 1}


NESTED = """
g (float[N,3] x, bool flag) => (float[N,3] y, float[N,3] z) {
    yes = Constant <value = bool {1}> ()
    h = Relu (x)
    y, z = If (yes) <
        then_branch = a () => (float[N,3] t, float[N,3] u) {
            k = Constant <value = float {2.0}> ()
            t = Mul (h, k)
            u = If (flag) <
                then_branch = c () => (float[N,3] v) { v = Neg (t) },
                else_branch = d () => (float[N,3] w) { w = Add (t, k) }
            >
        },
        else_branch = b () => (float[N,3] p, float[N,3] q) { p = Identity (h)  q = Identity (h) }
    >
}
"""


@pytest.mark.parametrize("flag", [True, False])
def test_a_constant_condition_takes_its_branch_and_another_is_left_alone(flag):
    model = parse(NESTED)
    result = normalize(model, 13)
    assert [n.op_type for n in result.graph.node].count("If") == 1
    feeds = {"x": normal(4, 3), "flag": np.array(flag)}
    expected, got = Session(model).run(feeds), Session(result).run(feeds)
    for name in ("y", "z"):
        np.testing.assert_array_equal(got[name], expected[name])


FOLDED = {
    "conv and norm": (
        "g (float[N,4,6,6] x) => (float[N,6,h,w] y) {"
        " c = Conv (x, w, b)  y = BatchNormalization (c, s, o, m, v) }",
        {
            "w": normal(6, 4, 3, 3),
            "b": normal(6),
            "s": normal(6),
            "o": normal(6),
            "m": normal(6),
            "v": np.abs(normal(6)) + 0.1,
        },
    ),
    "transposed": (
        "g (float[N,4,6,6] x) => (float[N,6,h,w] y) {"
        " c = ConvTranspose (x, w)  y = BatchNormalization (c, s, o, m, v) }",
        {
            "w": normal(4, 6, 3, 3),
            "s": normal(6),
            "o": normal(6),
            "m": normal(6),
            "v": np.abs(normal(6)) + 0.1,
        },
    ),
    "gemm and norm": (
        "g (float[N,4] x) => (float[N,6] y) { c = Gemm (x, w, b)  y = BatchNormalization (c, s, o, m, v) }",
        {
            "w": normal(4, 6),
            "b": normal(6),
            "s": normal(6),
            "o": normal(6),
            "m": normal(6),
            "v": np.abs(normal(6)) + 0.1,
        },
    ),
    "bias": (
        "g (float[N,4] x) => (float[N,6] y) { p = MatMul (x, w)  y = Add (p, b) }",
        {"w": normal(4, 6), "b": normal(6)},
    ),
    "convolution's bias": (
        "g (float[N,4,6,6] x) => (float[N,6,h,w] y) { c = Conv (x, w)  y = Add (c, b) }",
        {"w": normal(6, 4, 3, 3), "b": normal(1, 6, 1, 1)},
    ),
    "padding": (
        "g (float[N,4,6,6] x) => (float[N,6,h,w] y) { p = Pad (x, n, z)  y = Conv (p, w) }",
        {
            "w": normal(6, 4, 3, 3),
            "n": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
            "z": np.zeros((), np.float32),
        },
    ),
}


@pytest.mark.parametrize(("label", "seed"), [(label, seed) for label in FOLDED for seed in range(20)])
def test_constants_that_do_not_fit_are_refused_in_a_sentence(label, seed):
    text, constants = FOLDED[label]
    rng = np.random.default_rng(seed)
    name = list(constants)[seed % len(constants)]
    like = constants[name]
    shape = [int(n) for n in rng.choice([1, 2, 3, 4, 6, *like.shape], rng.integers(0, 5))]
    model = parse(text, {**constants, name: rng.integers(0, 2, shape).astype(like.dtype)})
    feeds = {"x": normal(2, 4, 6, 6) if "6,6" in text else normal(2, 4)}
    if not survives(model):
        return
    try:
        expected = Session(model, optimize=False).run(feeds)
    except EptqError:
        expected = None
    try:
        got = Session(normalize(io.load(model), 13)).run(feeds)
    except EptqError:
        assert expected is None
    else:
        assert expected is None or np.allclose(got["y"], expected["y"], rtol=1e-4, atol=1e-4, equal_nan=True)
