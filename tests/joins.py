"""Convolutional networks of rank 3, 4 and 5 drawn with joins of every kind between their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

WIDTHS = {3: (13,), 4: (6, 5), 5: (4, 3, 5)}
"""Extents of what is convolved, by rank: no two axes of a tensor are as long as its channels."""
CHANNELS = 8


class Net:
    """A growing graph of tensors of shape (batch, CHANNELS, \\*extents).

    Parameters
    ----------
    seed : int
    rank : int
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.rank = rank
        self.nodes: list = []
        self.constants: list[TensorProto] = []

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def normal(self, *shape: int, gain: float = 1.0) -> str:
        return self.constant((gain * self.rng.standard_normal(shape)).astype(np.float32))

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"t{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names[0]

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def conv(self, x: str, read: int = CHANNELS, made: int = CHANNELS, kernel: int = 3) -> str:
        spatial = self.rank - 2
        weight = self.normal(
            made, read, *[kernel] * spatial, gain=float(np.sqrt(2 / (read * kernel**spatial)))
        )
        return self.node("Conv", x, weight, self.normal(made, gain=0.1), pads=[kernel // 2] * 2 * spatial)

    def last(self, x: str) -> str:
        """Channels moved to the last axis."""
        return self.node("Transpose", x, perm=[0, *range(2, self.rank), 1])

    def back(self, x: str) -> str:
        return self.node("Transpose", x, perm=[0, self.rank - 1, *range(1, self.rank - 1)])

    def dense(self, x: str) -> str:
        return self.node("MatMul", x, self.normal(CHANNELS, CHANNELS, gain=float(1 / np.sqrt(CHANNELS))))

    def recurrent(self, op_type: str, x: str) -> str:
        """Over the first spatial axis of the mean over the others, added to all."""
        mean = self.node("ReduceMean", x, axes=list(range(3, self.rank)), keepdims=0) if self.rank > 3 else x
        rows = self.node("Transpose", mean, perm=[2, 0, 1])
        gates = {"GRU": 3, "LSTM": 4}[op_type]
        weights = [self.normal(1, gates * CHANNELS, CHANNELS, gain=0.3) for _ in range(2)]
        y = self.node("Squeeze", self.node(op_type, rows, *weights, hidden_size=CHANNELS), self.ints(1))
        y = self.node("Transpose", y, perm=[1, 2, 0])
        return self.node(
            "Add", x, self.node("Unsqueeze", y, self.ints(*range(3, self.rank))) if self.rank > 3 else y
        )

    def model(self, y: str) -> ModelProto:
        gap = self.node("Flatten", self.node("GlobalAveragePool", y))
        self.nodes.append(
            helper.make_node(
                "Gemm", [gap, self.normal(5, CHANNELS, gain=0.4), self.normal(5)], ["y"], transB=1
            )
        )
        info = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, *WIDTHS[self.rank]]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5]),
        ]
        graph = helper.make_graph(self.nodes, "joins", info[:1], info[1:], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _split(n: Net, a: str, b: str) -> str:
    first = n.node("Split", a, n.ints(3, CHANNELS - 3), outputs=2, axis=1)
    return n.node("Concat", n.node("Relu", first.replace("_0", "_1")), first, axis=1)


def _time(n: Net, a: str, b: str) -> str:
    joined = n.node("Concat", a, b, axis=2)
    return n.node("Slice", n.conv(joined), n.ints(1), n.ints(1 + WIDTHS[n.rank][0]), n.ints(2))


def _squeeze_excite(n: Net, a: str, b: str) -> str:
    gate = n.conv(n.node("Relu", n.conv(n.node("GlobalAveragePool", a), kernel=1)), kernel=1)
    return n.node("Mul", a, n.node("Sigmoid", gate))


def _reduced_gate(n: Net, a: str, b: str) -> str:
    """A gate of one row a sample, made by a Gemm."""
    mean = n.node("ReduceMean", a, axes=list(range(2, n.rank)), keepdims=0)
    gate = n.node("Sigmoid", n.node("Gemm", mean, n.normal(CHANNELS, CHANNELS, gain=0.3), n.normal(CHANNELS)))
    return n.node("Mul", n.node("Unsqueeze", gate, n.ints(*range(2, n.rank))), a)


def _merged(n: Net, a: str, b: str) -> str:
    """All places of the image in a row, and back."""
    row = n.node("Reshape", a, n.ints(0, CHANNELS, -1))
    rows = n.node("Transpose", row, perm=[0, 2, 1])
    mixed = n.node("Transpose", n.node("Add", rows, n.dense(rows)), perm=[0, 2, 1])
    return n.node("Reshape", mixed, n.ints(0, CHANNELS, *WIDTHS[n.rank]))


def _shuffled(n: Net, a: str, b: str) -> str:
    """Channels in groups, groups exchanged."""
    extents = WIDTHS[n.rank]
    parts = n.node("Reshape", a, n.ints(0, 2, CHANNELS // 2, *extents))
    turned = n.node("Transpose", parts, perm=[0, 2, 1, *range(3, n.rank + 1)])
    return n.node("Add", n.node("Reshape", turned, n.ints(0, CHANNELS, *extents)), b)


def _normalized(n: Net, a: str, b: str) -> str:
    rows = n.node("LayerNormalization", n.last(a), n.normal(CHANNELS), n.normal(CHANNELS, gain=0.1), axis=-1)
    return n.node("Add", n.back(n.dense(rows)), b)


JOINS: dict[str, Callable[[Net, str, str], str]] = {
    "Add": lambda n, a, b: n.node("Add", a, b),
    "Sub": lambda n, a, b: n.node("Sub", a, b),
    "Sum": lambda n, a, b: n.node("Sum", a, b, a),
    "Max": lambda n, a, b: n.node("Max", a, b),
    "Where": lambda n, a, b: n.node("Where", n.node("Greater", a, n.constant(np.float32(0.1))), a, b),
    "Mul": lambda n, a, b: n.node("Mul", a, n.node("Sigmoid", b)),
    "Mul by constants": lambda n, a, b: n.node(
        "Mul", n.normal(CHANNELS, *[1] * (n.rank - 2)), n.node("Add", a, b)
    ),
    "Mul of the input": lambda n, a, b: n.node(
        "Add", a, n.conv(n.node("Mul", "x", n.normal(2, *[1] * (n.rank - 2))), 2)
    ),
    "Concat": lambda n, a, b: n.conv(n.node("Concat", a, b, axis=1), 2 * CHANNELS),
    "Concat on time": _time,
    "Split": _split,
    "squeeze and excite": _squeeze_excite,
    "gate of a Gemm": _reduced_gate,
    "channels last": lambda n, a, b: n.back(n.node("Add", n.dense(n.last(a)), n.last(b))),
    "LayerNormalization": _normalized,
    "one row": _merged,
    "shuffled": _shuffled,
    "GRU": lambda n, a, b: n.recurrent("GRU", a),
    "LSTM": lambda n, a, b: n.recurrent("LSTM", b),
}
"""Of two tensors, what joins them."""


def joined(seed: int, rank: int, joins: Sequence[str]) -> ModelProto:
    """A network with these joins, one behind the other, with convolutions between them."""
    net = Net(seed, rank)
    before, x = net.conv("x", 2), net.node("Relu", net.conv("x", 2))
    for name in joins:
        before, x = x, JOINS[name](net, net.conv(x), before)
        if net.rng.random() < 0.5:
            x = net.node("Relu", x)
    return net.model(x)


def inputs(rank: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 2, *WIDTHS[rank])).astype(np.float32)
