"""Tests that random matrices on all channels that may be mixed do not change the outputs of a model."""

from __future__ import annotations

import numpy as np
import pytest
from channel_cases import BLOCKING, PASSING, case, drawn_case, outputs_agree
from graphs import normal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from eptq_onnx import ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.channels import Channels
from eptq_onnx.graph.spaces import Spaces
from eptq_onnx.graph.view import GraphView

MIXING = {
    "AveragePool": "z = AveragePool <kernel_shape = [2,2], pads = [1,1,1,1]> (a)",
    "GlobalAveragePool": "z = GlobalAveragePool (a)",
    "Add": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Add (a, c)",
    "Add, constant": "z = Add (a, each)",
    "Add, of parts": "s, t = Split <axis = 1> (a, halves)  p = Add (s, t)  z = Conv (p, half_wide)",
    "Sub": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Sub (a, c)",
    "Sum": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Sum (a, c, a)",
    "Concat": "c = Conv <pads = [1,1,1,1]> (x, u)  j = Concat <axis = 1> (a, c)  z = Conv (j, j8)",
    "Concat, twice the same": "j = Concat <axis = 1> (a, a)  z = Conv (j, j8)",
    "Concat, other axis": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Concat <axis = 2> (a, c)",
    "Split": "s, t = Split <axis = 1> (a, halves)  z = Concat <axis = 1> (t, s)",
    "Transpose": "t = Transpose <perm = [0,2,3,1]> (a)  r = MatMul (t, m)"
    "  z = Transpose <perm = [0,3,1,2]> (r)",
    "Reshape": "r = Reshape (a, flat)  z = Reshape (r, back)",
    "Flatten": "g = AveragePool <kernel_shape = [2,2], strides = [2,2]> (a)  f = Flatten (g)"
    "  q = Gemm (f, gw, gb)  z = Reshape (q, one)",
    "Squeeze": "g = GlobalAveragePool (a)  s = Squeeze (g, two)  z = Unsqueeze (s, two)",
    "Identity": "z = Identity (a)",
    "Dropout": "z = Dropout (a)",
    "Pad": "z = Pad (a, pads)",
    "Pad, reflect": 'z = Pad <mode = "reflect"> (a, pads)',
    "Resize": 'z = Resize <mode = "linear"> (a, , scales)',
    "ConvTranspose": "z = ConvTranspose <strides = [2,2]> (a, dense, tb)",
    "Conv": "z = Conv <pads = [1,1,1,1]> (a, full, tb)",
}  # fmt: skip
NONLINEAR = [n for n in PASSING if n != "Transpose" and ("Relu" in PASSING[n] or "Max" in n or "Clip" in n)]


def mixed_at_random(model: ModelProto, seed: int = 0) -> tuple[ModelProto, Channels, Spaces]:
    """Return the model with a random matrix on every space, and its channels and spaces."""
    view, rng = GraphView(model), np.random.default_rng(seed)
    channels = ops.channels_of(view, linear=True)
    spaces = Spaces(channels)
    values = {a.constant: view.constant(a.constant) for a in spaces.absorbers}
    for k, members in enumerate(spaces.members):
        matrix: np.ndarray = np.linalg.qr(rng.normal(size=(len(members),) * 2))[0] * rng.uniform(
            0.5, 2, len(members)
        )
        inverse = np.linalg.inv(matrix)
        values |= {
            a.constant: spaces.mixed(a, values[a.constant], k, matrix, inverse) for a in spaces.absorbers
        }
    return edit.with_constants(model, values), channels, spaces


def members(channels: Channels, spaces: Spaces, tensor: str) -> int:
    """Return how many channels of a tensor are in a space."""
    known = channels.of(tensor)
    return (
        sum(spaces.places(known[0], k).size for k in range(len(spaces.members))) if known is not None else 0
    )


def test_every_linear_operator_has_a_case():
    ruled = {op for (_, op), row in ops.TABLE.items() if row.mixes}
    shown = {name.split(",")[0] for name in MIXING} | {"Gemm", "MatMul", "Unsqueeze"}
    assert ruled - shown == {"Upsample"}, "it has the rule of Resize"


@pytest.mark.parametrize("name", MIXING)
def test_matrices_on_channels_change_nothing(name):
    model = case(MIXING[name])
    mixed, channels, spaces = mixed_at_random(model)
    read = next(n for n in model.graph.node if n.output[0] == "y").input[0]
    for tensor in (read, "a"):
        known = channels.of(tensor)
        assert known is not None
        assert members(channels, spaces, tensor) == len(known[0])
    outputs_agree(model, mixed, {"x": normal(2, 3, 6, 6, seed=20, scale=2)})


@pytest.mark.parametrize("body", [*BLOCKING.values(), *(PASSING[n] for n in NONLINEAR)])
def test_nodes_that_treat_channels_differently_prevent_mixing(body):
    model = case(body)
    mixed, channels, spaces = mixed_at_random(model)
    assert members(channels, spaces, "a") == 0
    outputs_agree(model, mixed, {"x": normal(2, 3, 6, 6, seed=20, scale=2)})


def test_parts_with_different_consumers_are_separate_spaces():
    model = case("s, t = Split <axis = 1> (a, halves)  r = Relu (t)  z = Concat <axis = 1> (s, r)")
    mixed, channels, spaces = mixed_at_random(model)
    assert members(channels, spaces, "s") == 2
    assert members(channels, spaces, "t") == 0
    outputs_agree(model, mixed, {"x": normal(2, 3, 6, 6, seed=20, scale=2)})


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**16))
def test_random_models_compute_the_same(seed):
    model, feeds = drawn_case(seed)
    outputs_agree(model, mixed_at_random(model, seed)[0], feeds)
