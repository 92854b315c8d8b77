"""Networks whose float and quantized versions do not match row by row, or whose batch is not what it says:
drawn.

A trunk of convolutions (of 1 to 3 spatial axes, with a skip or a join) or dense layers, one or two operators
that draw or choose, and a head. Inputs have an open batch, none at all, or one that only looks open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

WIDTH, PLACES = 12, 12


@dataclass(frozen=True)
class Wild:
    """A drawn network with its samples.

    Parameters
    ----------
    model : ModelProto
    samples : list of dict
        Feeds: what the model takes in one run.
    label : str
        What is in it.
    """

    model: ModelProto
    samples: list[dict[str, np.ndarray]]
    label: str


class _Net:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def const(self, value: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"{kind.lower()}{len(self.nodes)}{'abc'[k]}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names[1]

    def normal(self, *shape: int, fan: int) -> str:
        return self.const(self.rng.normal(0, np.sqrt(1.8 / fan), shape))

    def conv(self, x: str, ins: int, outs: int, rank: int, size: int = 3, **attributes: Any) -> str:
        weight = self.normal(outs, ins, *[size] * rank, fan=ins * size**rank)
        pads = [size // 2] * (2 * rank)
        return self.op("Conv", x, weight, self.const(self.rng.normal(0, 0.1, outs)), pads=pads, **attributes)

    def dense(self, x: str, ins: int, outs: int) -> str:
        return self.op(
            "Add",
            self.op("MatMul", x, self.normal(ins, outs, fan=ins)),
            self.const(self.rng.normal(0, 0.1, outs)),
        )


# What draws or chooses, on tokens of shape (batch, PLACES, WIDTH); each returns such tokens, maybe of other
# places.
def _noise(net: _Net, x: str) -> str:
    return net.op("Add", x, net.op("Mul", net.op("RandomNormalLike", x), net.const(0.4)))


def _scaled_noise(net: _Net, x: str) -> str:
    return net.op("Mul", x, net.op("RandomUniformLike", x, low=0.2, high=1.8))


def _fixed_noise(net: _Net, x: str) -> str:
    return net.op("Add", x, net.op("RandomNormal", shape=[1, PLACES, WIDTH], scale=0.5))


def _dropped(net: _Net, x: str) -> str:
    return net.op("Dropout", x, net.const(0.4), net.const(True, np.bool_))


def _coins(net: _Net, x: str) -> str:
    return net.op("Mul", x, net.op("Bernoulli", net.op("Sigmoid", x)))


def _top(net: _Net, x: str, k: int = PLACES // 2) -> str:
    best = net.op("ReduceMax", net.op("MatMul", x, net.normal(WIDTH, 3, fan=WIDTH)), axes=[2], keepdims=0)
    places = net.op("TopK", best, net.ints(k), outputs=2, axis=1)
    index = net.op("Tile", net.op("Unsqueeze", places, net.ints(2)), net.ints(1, 1, WIDTH))
    return net.op("GatherElements", x, index, axis=1)


def _sorted(net: _Net, x: str) -> str:
    return _top(net, x, PLACES)


def _table(net: _Net, x: str) -> str:
    best = net.op("ArgMax", net.dense(x, WIDTH, 8), axis=2, keepdims=0)
    return net.op("Add", x, net.op("Gather", net.normal(8, WIDTH, fan=2), best))


def _experts(net: _Net, x: str) -> str:
    route = net.op("Hardmax", net.dense(x, WIDTH, 2), axis=2)
    first, second = (net.op("Relu", net.dense(x, WIDTH, WIDTH)) for _ in range(2))
    gates = [net.op("Slice", route, net.ints(k), net.ints(k + 1), net.ints(2)) for k in range(2)]
    return net.op("Add", net.op("Mul", first, gates[0]), net.op("Mul", second, gates[1]))


def _branch(net: _Net, x: str) -> str:
    loud = net.op("Greater", net.op("ReduceMean", x, axes=[0, 1, 2], keepdims=0), net.const(0.25))
    bodies = {}
    for name, kind in (("then_branch", "Relu"), ("else_branch", "Tanh")):
        out = f"{name}{len(net.nodes)}"
        bodies[name] = helper.make_graph(
            [helper.make_node(kind, [x], [out])],
            name,
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        )
    return net.op("If", loud, **bodies)


def _length(net: _Net, x: str) -> str:
    """As many places as a layer says, at least two."""
    amount = net.op("Sigmoid", net.op("ReduceMean", net.dense(x, WIDTH, 4), axes=[0, 1, 2], keepdims=0))
    count = net.op(
        "Cast", net.op("Ceil", net.op("Mul", amount, net.const(float(PLACES)))), to=TensorProto.INT64
    )
    end = net.op("Max", net.op("Reshape", count, net.ints(1)), net.ints(2))
    return net.op("Slice", x, net.ints(0), end, net.ints(1))


DRAWS = (_noise, _scaled_noise, _fixed_noise, _dropped, _coins)
CHOICES = (_top, _sorted, _table, _experts, _branch, _length)
BATCHES = ("open", "none", "written", "fixed", "mixed")


def wild(seed: int, operators: Sequence[object] = DRAWS + CHOICES, count: int = 128) -> Wild:
    """A drawn network with ``count`` samples."""
    rng = np.random.default_rng(seed)
    net = _Net(rng)
    rank, batch = int(rng.integers(1, 4)), BATCHES[rng.integers(len(BATCHES))]
    size = {1: 24, 2: 8, 3: 4}[rank]
    x = "x"
    if batch == "none":
        x = net.op("Unsqueeze", x, net.ints(0))
    a = net.op("Relu", net.conv(x, 2, 8, rank, strides=[2] * rank if rank < 3 else [1] * rank))
    b = net.conv(a, 8, 8, rank)
    join = rng.integers(4)
    if join == 0:
        y = net.op("Add", b, a)
    elif join == 1:
        y = net.conv(net.op("Concat", b, a, axis=1), 16, 8, rank, 1)
    elif join == 2:
        gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", a), 8, 8, rank, 1))
        y = net.op("Mul", b, gate)
    else:
        y = net.op("Max", b, a)
    places = {1: 12, 2: 16, 3: 64}[rank]
    y = net.conv(y, 8, WIDTH, rank)
    lead = 1 if batch == "written" else 0
    flat = net.op("Reshape", y, net.ints(lead, WIDTH, places))
    if places > PLACES:
        flat = net.op("Slice", flat, net.ints(0), net.ints(PLACES), net.ints(2))
    t = net.op("Transpose", flat, perm=[0, 2, 1])
    if batch == "mixed":
        # Every sample hears what the others say.
        t = net.op("Sub", t, net.op("ReduceMean", t, axes=[0], keepdims=1))
        t = net.op("Add", t, net.const(rng.normal(0, 0.3, (1, PLACES, WIDTH))))
        t = net.op("Add", t, net.op("Transpose", flat, perm=[0, 2, 1]))
    chosen = [operators[k] for k in rng.integers(len(operators), size=int(rng.integers(1, 3)))]
    fixed = {_fixed_noise}
    order = sorted(chosen, key=lambda f: (f not in fixed, f in (_top, _length)))
    for k, operator in enumerate(dict.fromkeys(order)):
        t = operator(net, t)
        if k == 0 or rng.random() < 0.5:
            t = net.op("Add", t, net.dense(net.op("Relu", net.dense(t, WIDTH, 16)), 16, WIDTH))
    logits = net.dense(net.op("Relu", t), WIDTH, 5)
    outputs = {logits: None, net.op("ReduceMean", logits, axes=[1], keepdims=0): None}
    sign: list[Any] = {"none": [], "fixed": [1]}.get(batch, ["batch"])
    graph = helper.make_graph(
        net.nodes,
        "wild",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*sign, 2, *[size] * rank])],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        net.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    coarse = rng.normal(size=(count, 2, *[size // 2] * rank))
    for axis in range(rank):
        coarse = coarse.repeat(2, axis + 2)
    values = (coarse + 0.3 * rng.normal(size=coarse.shape)).astype(np.float32)
    lone = batch == "none"
    label = f"{batch}, {rank}-d, {', '.join(f.__name__.strip('_') for f in dict.fromkeys(order))}"
    return Wild(model, [{"x": v if lone else v[None]} for v in values], label)
