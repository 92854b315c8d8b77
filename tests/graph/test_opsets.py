"""Tests that conversions between opsets do not change what a model computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import normal, parse
from onnx import ModelProto, TensorProto, helper, numpy_helper

import eptq_onnx
from eptq_onnx import Config, ModelError
from eptq_onnx.graph import opsets
from eptq_onnx.graph.view import opset_of
from eptq_onnx.method.normalize import normalize
from eptq_onnx.probes import newest_readable
from eptq_onnx.runtime import Session

IR_VERSIONS = {
    7: 3,
    8: 3,
    9: 4,
    10: 5,
    11: 6,
    12: 7,
    13: 7,
    14: 7,
    15: 8,
    16: 8,
    17: 8,
    18: 8,
    19: 9,
    20: 9,
    21: 10,
    22: 10,
    23: 11,
    24: 12,
}


class Net:
    """Builds a network with the operators of one opset."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, op_type: str, *inputs: str, out: int = 1, **attributes: Any) -> str:
        names = [f"{op_type}_{len(self.nodes)}_{k}" for k in range(out)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names[0]

    def constant(self, value: object) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def either(self, since: int, op_type: str, x: str, **arguments: Any) -> str:
        """Arguments as attributes before ``since``, as inputs from then on, in this order."""
        if self.opset < since:
            return self.add(op_type, x, **{k: v.tolist() for k, v in arguments.items()})
        return self.add(op_type, x, *(self.constant(v) for v in arguments.values()))

    def model(self, shape: list[Any], output: str, rank: int | None = None) -> ModelProto:
        initializers = [numpy_helper.from_array(v, k) for k, v in self.constants.items()]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        if IR_VERSIONS[self.opset] < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
        self.nodes[-1].output[0] = output
        graph = helper.make_graph(
            self.nodes,
            "g",
            inputs,
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * (rank or len(shape)))],
            initializers,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSIONS[self.opset]
        )


def network(opset: int) -> ModelProto:
    """Return a network of operators that changed over time, in the form that they have in an opset.

    These are Conv, BatchNormalization, Clip, Pad, Upsample, Slice, pools, Dropout, reductions, Split and
    Softmax.
    """
    net = Net(opset)
    c = net.add("Conv", "x", net.constant(normal(8, 3, 3, 3)), pads=[1] * 4)
    statistics = [
        net.constant(v)
        for v in (normal(8, seed=1), normal(8, seed=2), normal(8, seed=3), np.abs(normal(8, seed=4)) + 0.5)
    ]
    c = net.add("BatchNormalization", c, *statistics, **({"spatial": 1} if opset < 9 else {}))
    c = net.either(11, "Clip", c, min=np.float32(0), max=np.float32(6))
    c = net.either(11, "Pad", c, pads=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    c = net.add("Conv", c, net.constant(normal(8, 8, 3, 3, seed=5)))
    scales = np.array([1, 1, 2, 2], np.float32)
    if opset < 10:
        c = net.either(9, "Upsample", c, scales=scales)
    elif opset == 10:
        c = net.add("Resize", c, net.constant(scales))
    else:
        modes: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        c = net.add("Resize", c, net.constant(np.zeros(0, np.float32)), net.constant(scales), **modes)
    c = net.either(10, "Slice", c, starts=np.array([0, 0]), ends=np.array([8, 8]), axes=np.array([2, 3]))
    c = net.add(
        "AveragePool",
        net.add("MaxPool", c, kernel_shape=[2, 2], strides=[2, 2]),
        kernel_shape=[2, 2],
        strides=[2, 2],
    )
    c = net.add("Dropout", c) if opset >= 12 else net.add("Dropout", c, ratio=0.5)
    axes = np.array([1])
    mean = net.either(18, "ReduceMean", c, axes=axes)
    mean = net.either(
        13, "Squeeze", net.either(13, "Unsqueeze", mean, axes=np.array([0])), axes=np.array([0])
    )
    c = net.add("Add", c, net.either(13, "ReduceSum", mean, axes=axes))
    if opset < 13:
        net.add("Split", c, out=2, axis=1, split=[4, 4])
    else:
        net.add("Split", c, net.constant(np.array([4, 4])), out=2, axis=1)
    first, second = net.nodes[-1].output
    c = net.add("Flatten", net.add("Concat", second, first, axis=1))
    c = net.add("Gemm", c, net.constant(normal(32, 5, seed=6)), net.constant(normal(5, seed=7)))
    net.add("Softmax", c, axis=1)
    return net.model(["N", 3, 8, 8], "y", rank=2)


def runnable(model: ModelProto) -> ModelProto:
    """Return the model in an opset that the installed onnxruntime reads."""
    return opsets.within(model, 1, *newest_readable())


X = normal(40, 3, 8, 8, scale=1)


@pytest.mark.parametrize("opset", range(7, 25))
def test_every_opset_is_quantized_and_kept(opset):
    model = network(opset)
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString()
    result = eptq_onnx.quantize(model, {"x": X}, Config(preset="fast", score_samples=16))
    assert model.SerializeToString() == before
    onnx.checker.check_model(result.model, full_check=True)
    assert opset_of(result.model) == max(opset, 13)
    assert result.model.ir_version >= model.ir_version
    assert len(result.report.layers) == 3
    assert any("opset" in note for note in result.report.notes) == (opset > newest_readable()[0])
    expected = Session(network(17)).run({"x": X})["y"]
    np.testing.assert_allclose(Session(runnable(result.model)).run({"x": X})["y"], expected, atol=0.1)


def old(
    opset: int,
    op_type: str,
    *inputs: object,
    shape: tuple[int, ...] = (2, 3, 6, 6),
    out: int = 1,
    **attributes: Any,
) -> ModelProto:
    net = Net(opset)
    net.add(op_type, "x", *(net.constant(v) for v in inputs), out=out, **attributes)
    return net.model(list(shape), "y")


GROW, SHRINK, PLACES = (
    np.array([1, 1, 2.5, 1.5], np.float32),
    np.array([1, 1, 0.5, 0.7], np.float32),
    np.abs(normal(3, 6, 6)) + 0.5,
)


@pytest.mark.parametrize(
    "model",
    [
        old(7, "Upsample", mode="linear", scales=[1.0, 1.0, 2.0, 2.0]),
        old(9, "Upsample", GROW, mode="linear"),
        old(9, "Upsample", GROW, mode="nearest"),
        old(10, "Resize", GROW, mode="nearest"),
        old(10, "Resize", SHRINK, mode="nearest"),
        old(10, "Resize", np.array([1, 1, 0.5, 1.7], np.float32), mode="linear"),
        old(11, "Hardmax", axis=1),
        old(11, "Softmax", axis=1),
        old(9, "Softmax"),
        old(11, "LogSoftmax", axis=2),
        old(9, "Pad", mode="reflect", pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        old(7, "BatchNormalization", PLACES, PLACES, PLACES, PLACES, spatial=0),
        old(9, "BatchNormalization", *[PLACES[:, 0, 0]] * 4, out=5),
        old(9, "TopK", axis=1, k=2, out=2),
        old(9, "Dropout", out=2),
        old(9, "Scatter", np.zeros((2, 1, 6, 6), np.int64), np.ones((2, 1, 6, 6), np.float32), axis=1),
    ],
    ids=lambda m: f"{m.graph.node[0].op_type}-{opset_of(m)}",
)
def test_old_operators_keep_their_meaning(model):
    x = normal(2, 3, 6, 6, scale=1)
    converted = normalize(model, 13)
    assert opset_of(converted) == 13
    np.testing.assert_allclose(
        Session(converted).run({"x": x})["y"], Session(model).run({"x": x})["y"], rtol=1e-5, atol=1e-6
    )


def test_operators_without_a_later_equivalent_are_reported():
    with pytest.raises(
        ModelError, match=r"a Resize of opset 10, may grow and shrink.*export the model with opset 11"
    ):
        normalize(old(10, "Resize", np.array([1, 1, 0.5, 2], np.float32), mode="nearest"), 13)
    with pytest.raises(ModelError, match="opset 7 cannot be converted to 13"):
        opsets.converted(old(7, "BatchNormalization", *[PLACES] * 4, spatial=0), 13)


def test_a_fitting_opset_is_left_alone():
    model = network(17)
    assert opsets.within(model, 13, 21, 10) is model
    assert opsets.restored(model, 17, 8, *newest_readable()) is model


def test_operators_that_are_too_new_are_expanded():
    net = Net(23)
    h = net.add("MatMul", "x", net.constant(normal(6, 6)))
    h = net.add("RMSNormalization", h, net.constant(np.linspace(0.5, 2, 6, dtype=np.float32)), axis=-1)
    net.add("MatMul", h, net.constant(normal(6, 5, seed=1)))
    model = net.model(["N", 4, 6], "y")
    older = opsets.within(model, 13, 21, 10)
    assert opset_of(older) == 21
    assert "RMSNormalization" not in {n.op_type for n in older.graph.node}
    x = normal(16, 4, 6, scale=1)
    hidden = x @ normal(6, 6)
    hidden = hidden / np.sqrt(np.square(hidden).mean(axis=-1, keepdims=True) + 1e-5) * np.linspace(0.5, 2, 6)
    np.testing.assert_allclose(
        Session(older).run({"x": x})["y"], hidden @ normal(6, 5, seed=1), rtol=1e-4, atol=1e-5
    )
    result = eptq_onnx.quantize(model, {"x": x}, Config(preset="fast"))
    assert opset_of(result.model) == 23
    assert len(result.report.layers) == 2


def test_new_operators_without_a_definition_are_reported():
    net = Net(24)
    net.add("TensorScatter", "x", net.constant(normal(2, 3, 1, 6)))
    with pytest.raises(
        ModelError, match="TensorScatter of opset 24, which the installed onnxruntime does not read"
    ):
        opsets.within(net.model([2, 3, 6, 6], "y"), 13, 21, 10)


@pytest.mark.parametrize(
    ("opset", "inner"),
    [(10, 'Resize <mode = "nearest"> (h, s)'), (9, "Upsample (h, s)"), (11, "Hardmax (h)")],
)
def test_operators_in_subgraphs_that_would_change_their_meaning_are_reported(opset, inner):
    graph = f"""g (float[1,1,2,2] x, bool c) => (float[N,M,H,W] y) {{
        h = Relu (x)
        y = If (c) <
            then_branch = t () => (float[N,M,H,W] a) {{ a = {inner} }},
            else_branch = e () => (float[N,M,H,W] b) {{ b = Neg (h) }}
        >
    }}"""
    model = parse(graph, {"s": np.array([1, 1, 2, 2], np.float32)}, opset=opset)
    with pytest.raises(ModelError, match=rf"of opset {opset} inside y, has no equal in later opsets there"):
        opsets.within(model, 13, 21, 10)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_matrix_products_of_opset_21_are_quantized(activation_bits):
    """onnxruntime 1.19 reads this opset, but cannot run integer matrix products in it."""
    model = parse(
        "mlp (float[N,4,8] x) => (float[N,4,8] y) { a = MatMul (x, w1)  b = Relu (a)  y = MatMul (b, w2) }",
        {"w1": normal(8, 16), "w2": normal(16, 8, seed=1)},
        opset=21,
    )
    model.ir_version = 10
    result = eptq_onnx.quantize(
        model, {"x": normal(32, 4, 8, seed=2)}, Config(preset="fast", activation_bits=activation_bits)
    )
    assert opset_of(result.model) == 21
    assert result.report.verification.outputs["y"] > 25
    assert len(result.report.layers) == 2


def test_group_normalization_of_opset_21_is_expanded():
    model = parse(
        "g (float[N,4,3] x) => (float[N,4,3] y) "
        "{ a = MatMul (x, w)  y = GroupNormalization <num_groups = 2> (a, scale, shift) }",
        {"w": normal(3, 3), "scale": normal(4, seed=1), "shift": normal(4, seed=2)},
        opset=21,
    )
    x = normal(8, 4, 3, seed=3)
    older = opsets.within(model, 13, 20, 9)
    assert opset_of(older) == 20
    np.testing.assert_allclose(
        Session(older).run({"x": x})["y"], Session(model).run({"x": x})["y"], rtol=1e-4, atol=1e-5
    )
