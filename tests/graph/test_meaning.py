"""What an output is, for heads as exporters write them, drawn with sizes and names of any kind."""

from __future__ import annotations

import onnx
import pytest
from graphs import normal, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.meaning import meanings
from eptq_onnx.numerics.statistics import Meaning


def of(text: str, weights: dict | None = None) -> Meaning:
    model = infer_shapes(parse(text, weights or {}))
    onnx.checker.check_model(model)
    [found] = set(meanings(model).values())
    return found


def convolutions(*channels: int) -> dict:
    return {f"w{k}": normal(c, 3, 1, 1, seed=k) for k, c in enumerate(channels)}


SIZES = st.integers(2, 9)


@settings(max_examples=15, deadline=None)
@given(SIZES, SIZES, st.booleans())
def test_boxes_and_scores_that_one_tensor_joins_are_parts(classes, side, sigmoid):
    """As YOLOX exports them, and as Ultralytics does."""
    last = "p = Sigmoid (c)" if sigmoid else "p = Identity (c)"
    weights = convolutions(4, classes)
    text = f"b = Conv (x, w0)  c = Conv (x, w1)  {last}"
    size = f"float[1,3,{side},{side}] x"
    joined = 4 + classes
    assert of(f"g ({size}) => (float[1,{joined},{side},{side}] y) {{ {text} y = Concat <axis = 1> (b, p) }}", weights) \
        is Meaning.PARTS  # fmt: skip
    weights["flat"] = [1, joined, -1]
    turned = "j = Concat <axis = 1> (b, p)  r = Reshape (j, flat)  y = Transpose <perm = [0, 2, 1]> (r)"
    out = f"float[1,{side * side},{joined}] y"
    assert of(f"g ({size}) => ({out}) {{ {text} {turned} }}", weights) is Meaning.PARTS


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 9), SIZES, SIZES)
def test_the_scores_of_several_scales_are_scores(classes, first, second):
    weights = {**convolutions(classes, classes), "flat": [1, classes, -1]}
    ways = "".join(
        f"c{k} = Conv (x{k}, w{k})  r{k} = Reshape (c{k}, flat)  t{k} = Transpose <perm = [0, 2, 1]> (r{k}) "
        for k in (0, 1)
    )
    out = f"float[1,{first**2 + second**2},{classes}] y"
    sizes = f"float[1,3,{first},{first}] x0, float[1,3,{second},{second}] x1"
    assert (
        of(f"g ({sizes}) => ({out}) {{ {ways} y = Concat <axis = 1> (t0, t1) }}", weights) is Meaning.SCORES
    )


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("g (float[N,8] x) => (float[N,5] y) { y = MatMul (x, w) }", {"w": normal(8, 5)}),
        ("g (float[N,8] x) => (float[N,4] y) { h = MatMul (x, w)  y = Softmax (h) }", {"w": normal(8, 4)}),
        # A normalization in front of the classifier says nothing about its output.
        (
            "g (float[N,8] x) => (float[N,5] y) { n = LayerNormalization (x, s)  y = MatMul (n, w) }",
            {"w": normal(8, 5), "s": normal(8)},
        ),
        ("g (float[N,3,8,8] x) => (float[N,4,8,8] y) { y = Conv (x, w0) }", convolutions(4)),
        # A class of each word, of four classes.
        ("g (int64[N,6] x) => (float[N,6,4] y) { y = Gather (w, x) }", {"w": normal(9, 4)}),
        # A network that joins features before its last layer.
        (
            "g (float[N,3,8,8] x) => (float[N,5,8,8] y) { a = Conv (x, w0)  b = Conv (x, w1)  "
            "j = Concat <axis = 1> (a, b)  y = Conv (j, w) }",
            {**convolutions(2, 3), "w": normal(5, 5, 1, 1)},
        ),
    ],
)  # fmt: skip
def test_classifiers_segmenters_and_taggers_have_scores(text, weights):
    assert of(text, weights) is Meaning.SCORES


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,6,8] x) => (float[N,6,8] y) { m = MatMul (x, w)  y = LayerNormalization (m, s) }",
        "g (float[N,8] x) => (float[N,8] y) { m = MatMul (x, w)  y = LpNormalization (m) }",
        "g (float[N,8] x) => (float[N,8] y) { m = MatMul (x, w)  l = ReduceL2 <axes = [1]> (m)  y = Div (m, l) }",
        "g (float[N,6,8] x) => (float[N,8] y) { m = MatMul (x, w)  n = LayerNormalization (m, s)  "
        "y = ReduceMean <axes = [1], keepdims = 0> (n) }",
        "g (float[N,8] x) => (float[N,8] y) { m = MatMul (x, w)  q = Mul (m, m)  "
        "t = ReduceSum (q, one)  l = Sqrt (t)  c = Clip (l, least)  y = Div (m, c) }",
        "g (float[N,8] x) => (float[N,8] sentence_embedding) { sentence_embedding = MatMul (x, w) }",
        "g (float[N,8] x) => (float[N,8] last_hidden_state) { last_hidden_state = MatMul (x, w) }",
    ],
)
def test_what_is_normalized_last_or_named_so_is_an_embedding(text):
    weights = {"w": normal(8, 8), "s": normal(8), "one": [1], "least": normal()}
    assert of(text, weights) is Meaning.EMBEDDING


def test_boxes_are_known_by_their_shape_or_name():
    assert of("g (float[N,3,8,8] x) => (float[N,16,4] y) { r = Reshape (x, s)  y = Relu (r) }", {"s": [-1, 16, 4]}) \
        is Meaning.BOXES  # fmt: skip
    for name in ("boxes", "pred_boxes", "bbox", "detection_boxes", "loc", "box_reg"):
        assert of(f"g (float[N,8] x) => (float[N,8] {name}) {{ {name} = Relu (x) }}") is Meaning.BOXES
    for name in ("box_scores", "class_logits", "y", "blocks", "boxing"):
        assert of(f"g (float[N,8] x) => (float[N,8] {name}) {{ {name} = Relu (x) }}") is Meaning.SCORES


def test_a_larger_picture_is_no_set_of_scores():
    text = "g (float[N,3,8,8] x) => (float[N,3,16,16] y) { y = ConvTranspose <strides = [2, 2]> (x, w) }"
    assert of(text, {"w": normal(3, 3, 2, 2)}) is Meaning.VALUES


def test_shipped_models_are_known():
    from conftest import MODELS

    want = {
        "digits_mobile": Meaning.SCORES,
        "digits_resnet": Meaning.SCORES,
        "shapes_segmenter": Meaning.SCORES,
        "shapes_detector": Meaning.PARTS,
    }
    for name, meaning in want.items():
        found = meanings(infer_shapes(onnx.load(MODELS / f"{name}.onnx")))
        assert set(found.values()) == {meaning}, name
