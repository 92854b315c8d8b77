"""Tests of the standard engine alone: rules for every row, standard nodes, refusals that name the node."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from gradcheck import check_gradients
from graphs import parse, scalar
from op_sample import Sample
from op_samples import SAMPLES

from eptq_onnx import ops
from eptq_onnx.engines import rules
from eptq_onnx.engines.standard import StandardEngine
from eptq_onnx.errors import GradientError
from eptq_onnx.graph import edit
from eptq_onnx.graph.lower import lower
from eptq_onnx.ops import Gradient
from eptq_onnx.runtime import Session

ENGINE = StandardEngine()


def test_every_row_that_the_engine_must_differentiate_has_rules():
    wanted = {key for key, row in ops.TABLE.items() if row.gradient is Gradient.ENGINE}
    assert wanted <= set(rules.RULES) | set(rules.VARIADIC)


@pytest.mark.parametrize("sample", [p[0] for p in SAMPLES.values()], ids=str)
def test_every_node_of_a_backward_pass_is_standard(sample: Sample):
    model = edit.specialize(sample.model(), {n: v.shape for n, v in sample.feeds.items()})
    model, _ = lower(model, ops.LOWERINGS)
    builder = edit.Builder(model)
    builder.reduce("ReduceSum", builder.add("Cast", ["y0"], to=onnx.TensorProto.FLOAT), None, "loss")
    model.graph.node.extend(builder.nodes)
    edit.set_outputs(model, ["loss"])
    built = ENGINE.differentiate(model, "loss", list(sample.feeds)).model
    assert {n.domain for n in built.graph.node} <= {"", "ai.onnx"}
    onnx.checker.check_model(built, full_check=True)


def _x(*shape: int) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .permutation(np.linspace(-2, 2, int(np.prod(shape))))
        .reshape(shape)
        .astype(np.float32)
    )


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(
            "Conv",
            (_x(2, 4, 9, 8), _x(8, 1, 3, 2)),
            {"group": 4, "strides": [2, 3], "dilations": [1, 2]},
            varying=(0, 1),
        ),
        Sample(
            "Conv",
            (_x(2, 6, 9, 8), _x(9, 2, 3, 3)),
            {"group": 3, "strides": [3, 2], "pads": [1, 0, 2, 1]},
            varying=(0, 1),
        ),
        Sample("Conv", (_x(2, 3, 5, 5), _x(4, 3, 1, 1)), {"strides": [2, 2]}, varying=(0, 1)),
        Sample("Conv", (_x(2, 3, 5, 5), _x(4, 3, 1, 1)), {"pads": [1, 1, 1, 1]}, varying=(0, 1)),
        Sample(
            "ConvTranspose",
            (_x(2, 4, 5), _x(4, 1, 3)),
            {"group": 4, "strides": [3], "output_padding": [2]},
            varying=(0, 1),
        ),
        Sample("MaxPool", (_x(2, 3, 7, 8),), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        Sample(
            "MaxPool",
            (_x(2, 3, 7, 8),),
            {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
            opset=13,
        ),
        Sample(
            "MaxPool",
            (_x(2, 3, 9, 8),),
            {"kernel_shape": [2, 3], "dilations": [3, 2], "strides": [1, 2]},
            opset=13,
        ),
        Sample("MaxPool", (_x(2, 3, 9),), {"kernel_shape": [5], "pads": [2, 2]}, opset=13),
        Sample("AveragePool", (_x(2, 3, 9, 8),), {"kernel_shape": [3, 2], "strides": [4, 3]}),
        Sample("AveragePool", (_x(2, 3, 8),), {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}),
        Sample("Slice", (_x(4, 6), _ints(-1), _ints(-(2**63)), _ints(1), _ints(-2))),
        Sample("Slice", (_x(4, 6), _ints(1, 0), _ints(3, 5), _ints(-1, 0), _ints(1, 3))),
        Sample("Gather", (_x(4, 6), np.array(2)), {"axis": 1}),
        Sample("Gather", (_x(4, 6), _ints(0, -1, 0, 0).reshape(2, 2))),
        Sample("Gather", (_x(4, 6), _ints(0, 3, 0)), {"axis": 1}, varying=(0, 1)),
        Sample("Gather", (_x(4, 6), _ints(0, 3, 0)), {"axis": 1}, varying=(0, 1), opset=13),
        Sample("MatMul", (_x(3), _x(3)), varying=(0, 1)),
        Sample("MatMul", (_x(3), _x(3, 2)), varying=(0, 1)),
        Sample("MatMul", (_x(4, 2, 3), _x(3)), varying=(0, 1)),
        Sample("MatMul", (_x(1, 5, 2, 3), _x(4, 1, 3, 2)), varying=(0, 1)),
        Sample(
            "Gemm",
            (_x(3, 4), _x(5, 3), _x(4, 1)),
            {"transA": 1, "transB": 1, "alpha": 2.0, "beta": 3.0},
            varying=(0, 1, 2),
        ),
        Sample("Pow", (np.abs(_x(2, 3)) + 1, _x(3)), varying=(0, 1)),
        Sample("Softmax", (_x(2, 3, 4),), {"axis": 1}, opset=12),
        Sample("ReduceSum", (_x(2, 3, 4),), {"axes": [-1], "keepdims": 0}, opset=12),
    ],
    ids=str,
)
def test_attributes_and_shapes_beyond_the_samples_of_the_table(sample: Sample):
    check_gradients(ENGINE, sample.model(), sample.feeds, sample.checked)


PLACES = np.array([[0, 2, 1], [3, 0, 1]])
ROWS = np.array([[2], [0]])


@pytest.mark.parametrize(
    "sample",
    [
        Sample("GatherElements", (_x(4, 3), PLACES % 3), {"axis": 1}),
        Sample("GatherElements", (_x(4, 3), PLACES)),
        Sample("GatherElements", (_x(4, 3), PLACES), opset=13),
        Sample("GatherND", (_x(4, 3), PLACES[:, :2] % 3)),
        Sample("GatherND", (_x(4, 3), np.array([[1], [-1], [1]])), opset=13),
        Sample("GatherND", (_x(2, 4, 3), np.array([[2, 0], [1, 1]])[..., None]), {"batch_dims": 1}),
        Sample("ScatterElements", (_x(4, 3), np.array([[0, 2, 1], [3, 0, 2]]), _x(2, 3)), varying=(0, 2)),
        Sample("ScatterND", (_x(4, 3), ROWS, _x(2, 3)), varying=(0, 2)),
    ],
    ids=str,
)
def test_gathered_and_scattered(sample: Sample, monkeypatch):
    monkeypatch.setitem(ops.TABLE, ("", sample.op_type), ops.OpSpec())
    check_gradients(ENGINE, sample.model(), sample.feeds, sample.checked)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('p = Pad <mode = "reflect"> (x, pads)  y = Neg (p)', "Pad n0: its mode is reflect"),
        (
            "l = ReduceMean <keepdims = 0> (x)  y = Clip (x, l)",
            "Clip n1: there is no rule for its input 1, l",
        ),
        ("a, y = Split <axis = 1> (x, sizes)", "Split n0: an output other than the first is used"),
    ],
)
def test_a_missing_rule_is_reported_with_node_and_input(body, reason):
    model = scalar(body, pads=np.array([0, 1, 0, 1]), sizes=np.array([1, 2]))
    with pytest.raises(GradientError, match=f"cannot differentiate the {reason}") as e:
        ENGINE.differentiate(model, "loss", ["x"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "body",
    [
        "y = Mul (d, d)",
        "y = Mul (d, row)",
        "h = ReduceSum <keepdims = 1> (d, first)  y = Div (d, h)",
        "h = ReduceMean <axes = [0], keepdims = 0> (d)  y = Mul (h, h)",
        "h = MatMul (d, w)  y = Sigmoid (h)",
        "t = Transpose (d)  h = MatMul (t, d)  y = Mul (h, h)",
        "f = Flatten (d)  y = Softmax <axis = 0> (f)",
        "r = Gather (d, twice)  y = Mul (r, r)",
    ],
)
def test_sizes_that_are_only_known_at_run_time(body):
    """The number of rows of d depends on the data: one for each positive number in the first column of x."""
    model = parse(
        "g (float[6,3] x) => (float loss) "
        "{ c = Slice (x, zero, one, one)  s = Greater (c, threshold)  p = NonZero (s)"
        "  i = Slice (p, zero, one, zero)  j = Squeeze (i, zero)  e = Gather (x, j)  d = Exp (e)"
        f"  {body}  q = Mul (y, y)  loss = ReduceSum <keepdims = 0> (q) }}",
        {
            **{name: _ints(k) for k, name in enumerate(["zero", "one"])},
            **{"threshold": np.float32(0), "twice": _ints(1, 0, 1), "first": _ints(0)},
            **{"w": _x(3, 2), "row": _x(1, 3)},
        },
    )
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    check_gradients(ENGINE, model, {"x": _x(6, 3)}, ("x",))


def test_integers_block_the_gradient_and_the_reason_is_given():
    gradient = ENGINE.differentiate(
        scalar("i = Cast <to = 7> (x)  f = Cast <to = 1> (i)  y = Mul (f, f)"), "loss", ["x"]
    )
    assert gradient.gradients == {}
    assert "operators that have a gradient" in gradient.unreached["x"]


def test_identical_nodes_are_added_once():
    built = ENGINE.differentiate(scalar("h = MatMul (x, w)  y = Add (h, h)"), "loss", ["x", "w"]).model
    keys = [
        (n.op_type, *n.input, *(a.SerializeToString() for a in n.attribute))
        for n in built.graph.node
        if n.op_type != "Identity"
    ]
    assert len(keys) == len(set(keys))
    assert set(Session(built).outputs) == {"loss", "x_grad", "w_grad"}
