"""Tests that values that depend on the channel alone vary along the channel axis only, after random nodes."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joins import JOINS, WIDTHS, Net, joined
from onnx import TensorProto, helper, shape_inference

from eptq_onnx import ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.runtime import Session

CHANNELS = 8


class Chain(Net):
    """Random nodes that move values, and keep the values of a channel equal."""

    def __init__(self, seed: int, rank: int) -> None:
        super().__init__(seed, rank)
        self.shape = [2, CHANNELS, *WIDTHS[rank]]

    def others(self, channel: int) -> list[int]:
        return [k for k in range(len(self.shape)) if k != channel]

    def grow(self, x: str, channel: int) -> tuple[str, int]:
        """One more node; its output and where its channels are."""
        rng, shape = self.rng, self.shape
        rank = len(shape)
        kind = rng.choice(
            [
                "Transpose",
                "Unsqueeze",
                "Squeeze",
                "join",
                "Reduce",
                "Gather",
                "Concat",
                "Pad",
                "Slice",
                "Add",
                "Softmax",
                "Tile",
            ]
        )
        other = int(rng.choice(self.others(channel)))
        if kind == "Transpose":
            order = rng.permutation(rank).tolist()
            self.shape = [shape[k] for k in order]
            return self.node("Transpose", x, perm=order), order.index(channel)
        if kind == "Unsqueeze" and rank < 6:
            place = int(rng.integers(rank + 1))
            self.shape = [*shape[:place], 1, *shape[place:]]
            return self.node("Unsqueeze", x, self.ints(place)), channel + (place <= channel)
        if kind == "Squeeze" and shape[other] == 1 and rank > 2:
            self.shape = [d for k, d in enumerate(shape) if k != other]
            return self.node("Squeeze", x, self.ints(other)), channel - (other < channel)
        if kind == "join" and rank > 2:
            first = next((k for k in range(rank - 1) if channel not in (k, k + 1)), None)
            if first is not None:
                self.shape = [*shape[:first], shape[first] * shape[first + 1], *shape[first + 2 :]]
                return self.node("Reshape", x, self.ints(*self.shape)), channel - (first < channel)
        if kind in ("Reduce", "Gather") and rank > 2:
            self.shape = [d for k, d in enumerate(shape) if k != other]
            made = (
                self.node("ReduceMax", x, axes=[other], keepdims=0)
                if kind == "Reduce"
                else self.node("Gather", x, self.constant(np.array(0)), axis=other)
            )
            return made, channel - (other < channel)
        if kind == "Concat":
            self.shape = [2 * d if k == other else d for k, d in enumerate(shape)]
            return self.node("Concat", x, x, axis=other), channel
        if kind == "Pad":
            self.shape = [d + 1 if k == other else d for k, d in enumerate(shape)]
            pads = np.zeros(2 * rank, np.int64)
            pads[other] = 1
            return self.node("Pad", x, self.constant(pads), mode="edge"), channel
        if kind == "Slice" and shape[other] > 1:
            self.shape = [1 if k == other else d for k, d in enumerate(shape)]
            return self.node("Slice", x, self.ints(0), self.ints(1), self.ints(other)), channel
        if kind == "Softmax":
            return self.node("Add", self.node("Softmax", x, axis=other), x), channel
        if kind == "Tile" and np.prod(shape) < 20_000:
            self.shape = [3 * d if k == other else d for k, d in enumerate(shape)]
            return self.node("Tile", x, self.ints(*[3 if k == other else 1 for k in range(rank)])), channel
        wide = self.node("Add", self.constant(np.ones((1,) * int(rng.integers(1, rank + 1)), np.float32)), x)
        return self.node("Mul", wide, self.node("Sigmoid", wide)), channel


def varying(value: np.ndarray) -> list[int]:
    return [k for k in range(value.ndim) if float(np.ptp(value, axis=k).max()) > 1e-6]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), rank=st.sampled_from([3, 4, 5]), length=st.integers(1, 8))
def test_the_axis_follows_the_output_of_a_layer(seed, rank, length):
    chain = Chain(seed, rank)
    zero = chain.constant(np.zeros((CHANNELS, 2, *[1] * (rank - 2)), np.float32))
    tensors = [
        (chain.node("Conv", "x", zero, chain.constant(np.linspace(0.3, 1.7, CHANNELS, dtype=np.float32))), 1)
    ]
    for _ in range(length):
        tensors.append(chain.grow(*tensors[-1]))
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2, *WIDTHS[rank]])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name, _ in tensors]
    graph = helper.make_graph(chain.nodes, "chain", [info], ends[-1:], chain.constants)
    model = shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    axes = ops.channel_axes_of(GraphView(model))
    values = Session(edit.exposing(model, [name for name, _ in tensors])).run(
        {"x": np.ones((2, 2, *WIDTHS[rank]), np.float32)}
    )
    for name, channel in tensors:
        assert varying(values[name]) == [channel], name
        assert axes[name] == channel, name


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    rank=st.sampled_from([3, 4, 5]),
    reader=st.sampled_from(["Conv", "MatMul", "LayerNormalization"]),
)
def test_the_axis_of_an_input_is_that_of_its_reader(seed, rank, reader):
    net = Net(seed, rank)
    order = [0, *(1 + net.rng.permutation(rank - 1)).tolist()]
    moved = net.node("Relu", net.node("Transpose", "x", perm=order))
    place = 1 if reader == "Conv" else rank - 1
    sizes = [5] * rank
    if reader == "Conv":
        net.conv(moved, 5)
    else:
        net.node(reader, moved, net.normal(*[5] * (2 if reader == "MatMul" else 1)))
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)
    end = helper.make_tensor_value_info(net.nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(net.nodes, "reader", [info], [end], net.constants)
    axes = ops.channel_axes_of(
        GraphView(infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))
    )
    assert axes["x"] == order[place]
    assert axes[moved] == place


@pytest.mark.parametrize("rank", WIDTHS)
@pytest.mark.parametrize("join", JOINS)
def test_every_join_keeps_the_channel_axis_of_images(join, rank):
    """The size of the channel axis is `CHANNELS`, a multiple or a fraction of it, unlike all other sizes.

    Only the features of a Gemm have such a size, too.
    """
    view = GraphView(infer_shapes(joined(3, rank, [join, join])))
    axes = ops.channel_axes_of(view)
    for name in view.producer:
        shape = view.shape(name) or ()
        if CHANNELS in shape and view.is_float(name):
            assert shape[axes[name]] == CHANNELS, (name, shape, axes[name])


def test_attention_keeps_the_axis_of_its_heads():
    model = parse(
        """
        heads (float[n,6,16] x) => (float[n,6,16] y)
        {
            q = MatMul (x, w)  r = Reshape (q, four)  t = Transpose <perm = [0,2,1,3]> (r)
            k = Transpose <perm = [0,1,3,2]> (t)  s = MatMul (t, k)  p = Softmax (s)
            c = MatMul (p, t)  b = Transpose <perm = [0,2,1,3]> (c)  j = Reshape (b, three)  y = MatMul (j, w)
        }
        """,
        {"w": normal(16, 16), "four": np.array([0, 6, 2, 8]), "three": np.array([0, 6, 16])},
    )
    axes = ops.channel_axes_of(GraphView(infer_shapes(model)))
    assert {n: axes[n] for n in "xqrtkspcbjy"} == dict(x=2, q=2, r=2, t=1, k=1, s=1, p=1, c=1, b=2, j=2, y=2)


def test_images_and_tokens_are_assumed_by_default():
    model = parse(
        "plain (float[n,4,9] a, float[n,3,8,8] b, float[n,7] c, float s)"
        " => (float[n,4,9] d, float[n,3,8,8] e, float[n,7] f, float g)"
        "{ d = Relu (a)  e = Relu (b)  f = Relu (c)  g = Relu (s) }",
        {},
    )
    assert ops.channel_axes_of(GraphView(model)) == {"a": 2, "d": 2, "b": 1, "e": 1, "c": 1, "f": 1}
