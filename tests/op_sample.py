"""One node with its inputs, and the ways to make them.

Values keep away from the kinks of piecewise functions, so that finite differences exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

OPSET = 17
MS = "com.microsoft"


@dataclass(frozen=True)
class Sample:
    """One node and its inputs; None is an absent optional input.

    ``varying`` are the positions of float inputs that are graph inputs and differentiated; the others are
    initializers.
    """

    op_type: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    varying: tuple[int, ...] = (0,)
    outputs: int = 1
    domain: str = ""
    opset: int = OPSET
    differentiable: tuple[int, ...] | None = None
    """Positions whose gradient is checked (default: all that vary)."""

    def _given(self, position: int) -> np.ndarray:
        value = self.inputs[position]
        assert value is not None
        return value

    def model(self) -> ModelProto:
        names = [f"x{k}" if v is not None else "" for k, v in enumerate(self.inputs)]
        outputs = [f"y{k}" for k in range(self.outputs)]
        node = helper.make_node(
            self.op_type, names, outputs, name="node", domain=self.domain, **self.attributes
        )
        graph_inputs = [
            helper.make_tensor_value_info(
                names[k], helper.np_dtype_to_tensor_dtype(self._given(k).dtype), self._given(k).shape
            )
            for k in self.varying
        ]
        constants = [
            numpy_helper.from_array(v, names[k])
            for k, v in enumerate(self.inputs)
            if v is not None and k not in self.varying
        ]
        graph = helper.make_graph(
            [node], "sample", graph_inputs, [onnx.ValueInfoProto(name=o) for o in outputs], constants
        )
        opsets = [helper.make_opsetid("", self.opset)] + (
            [helper.make_opsetid(self.domain, 1)] if self.domain else []
        )
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return model if self.domain else onnx.shape_inference.infer_shapes(model, data_prop=True)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{k}": self._given(k) for k in self.varying}

    @property
    def checked(self) -> tuple[str, ...]:
        positions = self.varying if self.differentiable is None else self.differentiable
        return tuple(f"x{k}" for k in positions if self._given(k).dtype == np.float32)

    def __str__(self) -> str:
        shape = "x".join(map(str, self._given(0).shape)) if self.inputs else ""
        return f"{self.op_type}{''.join(f'-{k}={v}' for k, v in self.attributes.items())}-{shape}"


def grid(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> np.ndarray:
    """Values on a shuffled even grid, never near 0: no ties, no kinks."""
    count = int(np.prod(shape))
    values = np.linspace(low, high, 2 * count + 1)[1::2]
    values = np.where(np.abs(values) < 0.02, 0.05, values)
    return np.random.default_rng(seed).permutation(values).reshape(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def unary(op_type: str, low: float = -2.0, high: float = 2.0, **attributes: Any) -> list[Sample]:
    return [Sample(op_type, (grid(2, 3, 4, low=low, high=high),), attributes)]


def binary(op_type: str, low: float = -2.0) -> list[Sample]:
    a, b = grid(2, 3, 4, low=low), grid(2, 3, 4, low=low, seed=1)
    return [
        Sample(op_type, (a, b), varying=(0, 1)),
        Sample(op_type, (a, grid(3, 1, low=low, seed=2)), varying=(0, 1)),
        Sample(op_type, (a, scalar(1.7))),
    ]


def conv(
    k: int = 3, group: int = 1, rank: int = 2, c_in: int = 4, c_out: int = 6, **attributes: Any
) -> Sample:
    size = (7, 6, 5)[:rank]
    weight = grid(c_out, c_in // group, *([k] * rank), seed=1)
    return Sample(
        "Conv",
        (grid(2, c_in, *size), weight, grid(c_out, seed=2)),
        {"group": group, **attributes},
        varying=(0, 1, 2),
    )


def conv_transpose(group: int = 1, bias: bool = True, **attributes: Any) -> Sample:
    inputs: tuple[np.ndarray | None, ...] = (grid(2, 4, 5, 4), grid(4, 6 // group, 3, 3, seed=1))
    varying: tuple[int, ...] = (0, 1)
    if bias:
        inputs, varying = (*inputs, grid(6, seed=2)), (0, 1, 2)
    return Sample("ConvTranspose", inputs, {"group": group, **attributes}, varying=varying)


def resize(
    scales: tuple[float, ...] | None,
    sizes: tuple[int, ...] | None,
    roi: tuple[float, ...] = (),
    *,
    opset: int = OPSET,
    **attributes: Any,
) -> Sample:
    told = f(*scales) if scales else None
    inputs = (grid(2, 3, 4, 5), f(*roi) if roi else None, told, ints(*sizes) if sizes else None)
    return Sample("Resize", inputs[: 4 if sizes else 3], attributes, opset=opset)


def reduction(op_type: str, low: float = -2.0) -> list[Sample]:
    """Axes as an attribute (before opset 18) and as an input."""
    x = grid(2, 3, 4, low=low)
    return [
        Sample(op_type, (x,), {"axes": [1], "keepdims": 1}),
        Sample(op_type, (x,), {"axes": [0, -1], "keepdims": 0}),
        Sample(op_type, (x,)),
        Sample(op_type, (x, ints(2)), {"keepdims": 0}, opset=18),
    ]


def einsum(equation: str, *shapes: tuple[int, ...]) -> Sample:
    inputs = tuple(grid(*s, seed=k) for k, s in enumerate(shapes))
    return Sample("Einsum", inputs, {"equation": equation}, varying=tuple(range(len(inputs))))


def recurrent(
    op_type: str,
    gates: int,
    directions: int = 1,
    *,
    bias: bool = True,
    lengths: tuple[int, ...] = (),
    states: bool = False,
    peepholes: bool = False,
    **attributes: Any,
) -> Sample:
    """Four steps of three sequences of two features, three hidden units."""
    inputs: list[np.ndarray | None] = [
        grid(4, 3, 2),
        grid(directions, gates * 3, 2, seed=1),
        grid(directions, gates * 3, 3, seed=2),
    ]
    inputs.append(grid(directions, 2 * gates * 3, seed=3) if bias else None)
    inputs.append(np.array(lengths, np.int32) if lengths else None)
    if states:
        inputs += [grid(directions, 3, 3, seed=4), grid(directions, 3, 3, seed=5)]
    if peepholes:
        inputs.append(grid(directions, 9, seed=6))
    if directions == 2:
        attributes["direction"] = "bidirectional"
    varying = tuple(k for k, v in enumerate(inputs) if v is not None and v.dtype == np.float32)
    return Sample(
        op_type,
        tuple(inputs),
        {"hidden_size": 3, **attributes},
        varying=varying,
        outputs=3 if op_type == "LSTM" else 2,
    )


def ms(
    op_type: str, *inputs: np.ndarray | None, varying: tuple[int, ...] = (0,), **attributes: Any
) -> Sample:
    return Sample(op_type, inputs, attributes, varying=varying, domain=MS)
