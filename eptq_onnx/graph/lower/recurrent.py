"""Recurrent layers, unrolled over a static number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.activations import line
from eptq_onnx.graph.lower.base import NotLowerable, given, ints, reshape, shape_of, total, transpose
from eptq_onnx.graph.view import GraphView, attribute, int_attribute

MOST_STEPS = 128
"""Limit on unrolled steps: with its gradient, a step of a bidirectional LSTM takes 120 nodes, and the time to
load them grows quadratically."""

State = tuple[str, ...]
Function = Callable[[str], str]
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class _Cell:
    """One direction of a layer: parameters and functions of a step, gates stacked along the last axis."""

    b: Builder
    hidden: int
    recurrent: str
    recurrent_bias: str
    functions: list[Function]
    peepholes: list[str]
    linear_before_reset: bool
    input_forget: bool
    clip: float

    def gate(self, x: str, k: int, count: int = 1) -> str:
        """Slice ``count`` gates from the k-th on out of the columns of x."""
        return self.b.add(
            "Slice", [x, ints([k * self.hidden]), ints([(k + count) * self.hidden]), ints([-1])]
        )

    def apply(self, function: int, terms: list[str]) -> str:
        """Apply the activation function of a gate to the clipped sum of some terms."""
        x = total(self.b, terms) if len(terms) > 1 else terms[0]
        if self.clip:
            x = self.b.add("Clip", [x, -self.clip, self.clip])
        return self.functions[function](x)

    def rnn(self, x: str, state: State) -> State:
        """h' = f(x + h R)."""
        return (self.apply(0, [x, self.b.add("MatMul", [state[0], self.recurrent]), self.recurrent_bias]),)

    def gru(self, x: str, state: State) -> State:
        """z, r = f(...); n = g(x + (r h) R) or g(x + r (h R)); h' = n + z (h - n).

        The order of gates is z, r, h.
        """
        b, h = self.b, state[0]
        bias = self.recurrent_bias
        zr = b.add("Add", [b.add("MatMul", [h, self.gate(self.recurrent, 0, 2)]), self.gate(bias, 0, 2)])
        gates = self.apply(0, [self.gate(x, 0, 2), zr])
        z, r = self.gate(gates, 0), self.gate(gates, 1)
        own, offset = self.gate(self.recurrent, 2), self.gate(bias, 2)
        if self.linear_before_reset:
            hidden = b.add("Mul", [r, b.add("Add", [b.add("MatMul", [h, own]), offset])])
        else:
            hidden = b.add("Add", [b.add("MatMul", [b.add("Mul", [r, h]), own]), offset])
        n = self.apply(1, [self.gate(x, 2), hidden])
        return (b.add("Add", [n, b.add("Mul", [z, b.add("Sub", [h, n])])]),)

    def lstm(self, x: str, state: State) -> State:
        """c' = f c + i g, h' = o tanh(c').

        The order of gates is i, o, f, c. Peepholes read c (gates i, f) and c' (gate o).
        """
        b, (h, c) = self.b, state
        everything = b.add(
            "Add", [b.add("Add", [x, b.add("MatMul", [h, self.recurrent])]), self.recurrent_bias]
        )

        def gate(k: int, seen: str) -> str:
            peephole = [b.add("Mul", [seen, self.peepholes[k]])] if self.peepholes else []
            return self.apply(0, [self.gate(everything, k), *peephole])

        if self.peepholes:
            i, f = gate(0, c), gate(2, c)
        else:
            io, f = self.apply(0, [self.gate(everything, 0, 2)]), gate(2, c)
            i = self.gate(io, 0)
        if self.input_forget:
            f = b.add("Sub", [1.0, i])
        new = b.add(
            "Add", [b.add("Mul", [f, c]), b.add("Mul", [i, self.apply(1, [self.gate(everything, 3)])])]
        )
        o = gate(1, new) if self.peepholes else self.gate(io, 1)
        return b.add("Mul", [o, self.functions[2](new)]), new


def recurrent(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Unroll RNN, GRU and LSTM; a sequence that has ended keeps its state and outputs zeros.

    One MatMul multiplies the inputs of all steps by the weights, so that each step needs only the product
    with its state.
    Source: ONNX operators RNN, GRU, LSTM.
    """
    layout = int_attribute(node, "layout", 0)
    x = transpose(b, node.input[0], [1, 0, 2]) if layout else node.input[0]
    shape = shape_of(view, node.input[0])
    steps, batch = (shape[1], shape[0]) if layout else (shape[0], shape[1])
    if steps > MOST_STEPS:
        raise NotLowerable(f"it has {steps} steps; at most {MOST_STEPS} are unrolled")
    directions, hidden = shape_of(view, node.input[2])[0], shape_of(view, node.input[2])[2]
    running = _running(node, b, steps, batch)
    sequences, finals = [], []
    for d in range(directions):
        cell = _cell(node, view, b, d, hidden)
        reverse = d == 1 or attribute(node, "direction", "forward") == "reverse"
        state = _initial(node, b, d, (batch, hidden), layout)
        times = reversed(range(steps)) if reverse else range(steps)
        outputs = _unrolled(node, cell, _projected(node, b, x, d, hidden), state, running, times)
        sequences.append(outputs[0])
        finals.append(outputs[1])
    _write(node, b, sequences, finals, (steps, batch, hidden), layout)


def _pick(b: Builder, name: str, direction: int, low: int | None = None, high: int | None = None) -> str:
    """Select one direction of a parameter, and optionally the entries from ``low`` to ``high``."""
    one = b.add("Gather", [name, np.array(direction)], axis=0)
    return one if low is None else b.add("Slice", [one, ints([low]), ints([high or 0]), ints([0])])


def _projected(node: NodeProto, b: Builder, x: str, d: int, hidden: int) -> str:
    """Add x W^T + b of all steps."""
    y = b.add("MatMul", [x, transpose(b, _pick(b, node.input[1], d), [1, 0])])
    gates = _GATES[node.op_type]
    return b.add("Add", [y, _pick(b, node.input[3], d, 0, gates * hidden)]) if given(node, 3) else y


def _cell(node: NodeProto, view: GraphView, b: Builder, d: int, hidden: int) -> _Cell:
    gates = _GATES[node.op_type]
    bias = _pick(b, node.input[3], d, gates * hidden, 2 * gates * hidden) if given(node, 3) else ""
    peepholes = (
        [_pick(b, node.input[7], d, k * hidden, (k + 1) * hidden) for k in range(3)] if given(node, 7) else []
    )
    return _Cell(
        b=b,
        hidden=hidden,
        recurrent=transpose(b, _pick(b, node.input[2], d), [1, 0]),
        recurrent_bias=bias or b.constant(np.zeros(gates * hidden, np.float32), "bias"),
        functions=_functions(node, b, d),
        peepholes=peepholes,
        linear_before_reset=bool(int_attribute(node, "linear_before_reset", 0)),
        input_forget=bool(int_attribute(node, "input_forget", 0)),
        clip=float(attribute(node, "clip", 0.0)),  # type: ignore[arg-type]
    )


def _functions(node: NodeProto, b: Builder, d: int) -> list[Function]:
    """Return the activation functions of one direction.

    The alphas and betas of both directions are in one list, for those functions that take them.
    """
    count = len(_DEFAULTS[node.op_type])
    told = [n.decode() if isinstance(n, bytes) else n for n in attribute(node, "activations", ())]  # type: ignore[attr-defined]
    alphas = [float(v) for v in attribute(node, "activation_alpha", ())]  # type: ignore[attr-defined]
    betas = [float(v) for v in attribute(node, "activation_beta", ())]  # type: ignore[attr-defined]
    functions = [
        _function(b, name.capitalize(), alphas, betas) for name in told or 2 * _DEFAULTS[node.op_type]
    ]
    return functions[d * count : (d + 1) * count]


def _function(b: Builder, name: str, alphas: list[float], betas: list[float]) -> Function:
    def alpha(default: float) -> float:
        return alphas.pop(0) if alphas else default

    def beta(default: float) -> float:
        return betas.pop(0) if betas else default

    if name in ("Tanh", "Sigmoid", "Relu", "Softsign", "Softplus"):
        operator = name
        return lambda x: b.add(operator, [x])
    if name == "Affine":
        slope, offset = alpha(1.0), beta(0.0)
        return lambda x: b.add("Add", [b.add("Mul", [x, slope]), offset])
    if name == "Leakyrelu":
        slope = alpha(0.01)
        return lambda x: b.add("LeakyRelu", [x], alpha=slope)
    if name == "Thresholdedrelu":
        limit = alpha(1.0)
        return lambda x: b.add("ThresholdedRelu", [x], alpha=limit)
    if name == "Scaledtanh":
        size, rate = alpha(1.0), beta(1.0)
        return lambda x: b.add("Mul", [b.add("Tanh", [b.add("Mul", [x, rate])]), size])
    if name == "Hardsigmoid":
        slope, offset = alpha(0.2), beta(0.5)
        return lambda x: line(b, x, slope, offset)
    if name == "Elu":
        size = alpha(1.0)
        return lambda x: b.add("Elu", [x], alpha=size)
    raise NotLowerable(f"its activation function {name} is unknown")


def _initial(node: NodeProto, b: Builder, d: int, shape: tuple[int, int], layout: int) -> State:
    """Return the initial state: h, and c of an LSTM."""
    result = []
    for position in (5, 6) if node.op_type == "LSTM" else (5,):
        name = given(node, position)
        result.append(
            b.add("Gather", [name, np.array(d)], axis=layout)
            if name
            else b.constant(np.zeros(shape, np.float32), "zeros")
        )
    return tuple(result)


def _running(node: NodeProto, b: Builder, steps: int, batch: int) -> str:
    """Add a mask of shape (steps, batch, 1), 1 until a sequence ends; none if all have full length."""
    if not given(node, 4):
        return ""
    lengths = reshape(b, b.add("Cast", [node.input[4]], to=TensorProto.INT64), [1, batch, 1])
    return b.add("Cast", [b.add("Less", [np.arange(steps).reshape(-1, 1, 1), lengths])], to=TensorProto.FLOAT)


def _unrolled(
    node: NodeProto, cell: _Cell, projected: str, state: State, running: str, times: Iterable[int]
) -> tuple[list[str], State]:
    """Unroll the given steps and return the output of each, in order of time, and the last state."""
    b = cell.b
    step = {"RNN": cell.rnn, "GRU": cell.gru, "LSTM": cell.lstm}[node.op_type]
    outputs: dict[int, str] = {}
    for t in times:
        place = np.array(t)
        new = step(b.add("Gather", [projected, place], axis=0), state)
        outputs[t] = new[0]
        if running:
            on = b.add("Gather", [running, place], axis=0)
            outputs[t] = b.add("Mul", [new[0], on])
            new = tuple(
                b.add("Add", [old, b.add("Mul", [on, b.add("Sub", [n, old])])])
                for n, old in zip(new, state, strict=True)
            )
        state = new
    return [outputs[t] for t in sorted(outputs)], state


def _write(
    node: NodeProto,
    b: Builder,
    sequences: list[list[str]],
    finals: list[State],
    shape: tuple[int, int, int],
    layout: int,
) -> None:
    """Write the outputs of the node; the batch is the first axis if ``layout`` is set.

    Y has shape (steps, directions, batch, hidden), Y_h and Y_c have (directions, batch, hidden).
    """
    steps, batch, hidden = shape
    if node.output[0]:
        rows = [b.add("Unsqueeze", [y, ints([0])]) for pair in zip(*sequences, strict=True) for y in pair]
        joined = reshape(b, b.add("Concat", rows, axis=0), [steps, len(sequences), batch, hidden])
        transpose(b, joined, [2, 0, 1, 3] if layout else [0, 1, 2, 3], node.output[0])
    for k, name in enumerate(node.output[1:]):
        if name:
            last = b.add("Concat", [b.add("Unsqueeze", [state[k], ints([0])]) for state in finals], axis=0)
            transpose(b, last, [1, 0, 2] if layout else [0, 1, 2], name)
