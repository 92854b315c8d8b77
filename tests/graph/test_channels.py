"""Tests that random factors on all channels that may be scaled do not change the outputs of a model."""

from __future__ import annotations

import numpy as np
import pytest
from channel_cases import BLOCKING, HEAD, PASSING, case, drawn_case, outputs_agree
from graphs import normal, parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from eptq_onnx import ops
from eptq_onnx.graph import edit
from eptq_onnx.graph.channels import Channels
from eptq_onnx.graph.view import GraphView


def scaled_at_random(model: ModelProto, seed: int = 0) -> tuple[ModelProto, Channels, np.ndarray]:
    """Return the model with random factors on all channels that may be scaled, its channels, and a mask.

    The mask is True for slots that are scaled.
    """
    view = GraphView(model)
    channels = ops.channels_of(view)
    count, sets = channels.classes()
    factors = np.exp(np.random.default_rng(seed).uniform(-1, 1, count))
    factors[sets[0]] = 1
    factors = factors[sets]
    result = edit.with_constants(
        model, {a.constant: a.scaled(view.constant(a.constant), factors) for a in channels.absorbers}
    )
    return result, channels, factors != 1


def test_every_rule_has_a_case():
    ruled = {op for (_, op), row in ops.TABLE.items() if row.channels is not None}
    shown = {name.split(",")[0] for name in PASSING} | {"Gemm", "MatMul", "Unsqueeze"}
    assert ruled - shown == {"Upsample", "RMSNormalization", "SimplifiedLayerNormalization"}, (
        "they have the rules of their twins"
    )


@pytest.mark.parametrize("name", PASSING)
def test_factors_on_channels_change_nothing(name):
    model = case(PASSING[name])
    scaled, channels, moved = scaled_at_random(model)
    slots = channels.of(next(n for n in model.graph.node if n.output[0] == "y").input[0])
    assert slots is not None
    assert moved[slots[0]].all()
    outputs_agree(model, scaled, {"x": normal(2, 3, 6, 6, seed=20, scale=2)})


@pytest.mark.parametrize("name", BLOCKING)
def test_channels_are_not_scaled_where_the_effect_is_unknown(name):
    model = case(BLOCKING[name])
    scaled, channels, moved = scaled_at_random(model)
    slots = channels.of("a")
    assert slots is not None
    assert not moved[slots[0]].any()
    outputs_agree(model, scaled, {"x": normal(2, 3, 6, 6, seed=20, scale=2)})


def test_tensors_that_a_branch_reads_are_not_scaled():
    model = parse(
        "g (float[2,3,6,6] x, bool c) => (float[2,4,6,6] y) {"
        f" {HEAD}  y = If (c) <then_branch = yes () => (float[2,4,6,6] p) {{ p = Relu (a) }},"
        " else_branch = no () => (float[2,4,6,6] q) { q = Conv (a, v) }> }",
        {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(4, 4, 1, 1)},
    )
    _, channels, moved = scaled_at_random(model)
    slots = channels.of("a")
    assert slots is not None
    assert not moved[slots[0]].any()


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**16))
def test_random_models_compute_the_same(seed):
    model, feeds = drawn_case(seed)
    outputs_agree(model, scaled_at_random(model, seed)[0], feeds)
