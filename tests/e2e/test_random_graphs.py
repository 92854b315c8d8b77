"""Graphs drawn from the operator table: none may crash the pipeline, and 8 bits must stay within what
rounding does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from drawing import INPUTS, NOT_DRAWN, NOT_FLOAT, deck, drawable, drawn
from graphs import silent
from hypothesis import HealthCheck, given, settings
from images import CHANNELS, SIZE, drawn_images
from onnx import ModelProto, helper, numpy_helper

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.method.normalize import normalize
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.ops import TABLE, Gradient
from eptq_onnx.runtime import Session

SAMPLES = 24
PRESETS = {
    "fast": Config(preset="fast", activations="static", rotate=False, equalize=False),
    "two steps": Config(steps=2, batch_size=4, probes=1, activations="static", rotate=False, equalize=False),
}
"""Neither rotated nor equalized, so the weights that are rounded at random are those of the given model. With fixed
ranges, whose bound is known."""


def randomly_rounded(quantized: ModelProto, original: ModelProto, seed: int) -> ModelProto:
    """The quantized model with every rounding at random: up or down by chance, at the written scales and
    limits.

    What rounding at these steps may do, propagated through the network as it is. Weights are rounded from
    those of the float model, activations get uniform noise of one step in front of their quantizer.
    """
    rng = np.random.default_rng(seed)
    source = {t.name: numpy_helper.to_array(t) for t in normalize(original, 13).graph.initializer}
    model = ModelProto()
    model.CopyFrom(quantized)
    constants = {t.name: t for t in model.graph.initializer}
    values = {name: numpy_helper.to_array(t) for name, t in constants.items()}
    nodes: list[onnx.NodeProto] = []
    for k, node in enumerate(model.graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            stored, scale, zero = (values[i] for i in node.input)
            shape = [-1 if a == _axis(node) else 1 for a in range(stored.ndim)] if scale.ndim else []
            exact = source.get(
                node.input[0].removesuffix("_quantized"), np.zeros_like(stored, np.float32)
            ).reshape(stored.shape)
            steps = exact / scale.reshape(shape) + zero.reshape(shape)
            noise = rng.uniform(0, 1, stored.shape) if stored.dtype != np.int32 else 0.5
            low, high = (
                (-64, 63)
                if stored.dtype == np.int8
                else (np.iinfo(stored.dtype).min, np.iinfo(stored.dtype).max)
            )
            rounded = np.clip(np.floor(steps + noise), low, high).astype(stored.dtype)
            constants[node.input[0]].CopyFrom(numpy_helper.from_array(rounded, node.input[0]))
        elif node.op_type == "QuantizeLinear":
            reach = float(values[node.input[1]]) / 2
            noise_name, noisy = f"noise_{k}", f"noisy_{k}"
            nodes.append(
                helper.make_node(
                    "RandomUniformLike",
                    [node.input[0]],
                    [noise_name],
                    low=-reach,
                    high=reach,
                    seed=float(seed + k),
                )
            )
            nodes.append(helper.make_node("Add", [node.input[0], noise_name], [noisy]))
            node.input[0] = noisy
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _axis(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def check_within_rounding(model: ModelProto, quantized: ModelProto, batches: list[Feeds]) -> None:
    """The error of each output, in root mean square, is at most 1.5 times the largest of three randomly
    rounded networks."""

    def outputs(network: ModelProto) -> dict[str, np.ndarray]:
        session = Session(network)
        runs = [session.run(feeds) for feeds in batches]
        return {name: np.concatenate([run[name].reshape(-1) for run in runs]) for name in session.outputs}

    exact, got = outputs(model), outputs(quantized)
    noisy = [outputs(randomly_rounded(quantized, model, seed)) for seed in (1, 2, 3)]
    for name, value in exact.items():
        allowed = 1.5 * max(_rms(other[name] - value) for other in noisy) + 1e-5 * _rms(value)
        assert _rms(got[name] - value) <= allowed, (
            f"{name}: {_rms(got[name] - value)} of {_rms(value)}, allowed {allowed}"
        )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def test_every_row_is_drawn():
    """Each deck has every row that a float model may have, once."""
    for seed in (0, 1):
        rows = sorted(f"{s.domain}::{s.op_type}" for _, samples in deck(seed, 8) for s in samples)
        assert rows == sorted(drawable())
    assert len(drawable()) == len(TABLE) - len(NOT_DRAWN | NOT_FLOAT)
    assert {row.gradient for row in TABLE.values()} == set(Gradient)


def check_deck(seed: int, every: int, config: Config) -> None:
    data, batches = _data(seed)
    for opset, samples in deck(seed, 8)[::every]:
        model = drawn(seed, opset, samples)
        try:
            check_within_rounding(
                model, eptq_onnx.quantize(model, data, config, progress=silent).model, batches
            )
        except Exception as e:
            raise AssertionError(f"opset {opset}, {[str(s) for s in samples]}: {e}") from e


def _data(seed: int) -> tuple[Feeds, list[Feeds]]:
    """Samples, and the same one by one."""
    rng = np.random.default_rng(seed)
    data = {name: rng.normal(size=(SAMPLES, width)).astype(np.float32) for name, width in INPUTS.items()}
    return data, [{name: values[k : k + 1] for name, values in data.items()} for k in range(SAMPLES)]


@pytest.mark.parametrize("preset", PRESETS)
def test_some_rows_of_the_table(preset):
    check_deck(0, 8, PRESETS[preset])


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "seed"), [("fast", 0), ("fast", 1), ("two steps", 0)])
def test_all_rows_of_the_table(preset, seed):
    check_deck(seed, 1, PRESETS[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_drawn_convolutional_networks(preset):
    images = np.random.default_rng(0).normal(size=(SAMPLES, CHANNELS, SIZE, SIZE)).astype(np.float32)

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn_images())
    def check(model: ModelProto) -> None:
        quantized = eptq_onnx.quantize(model, images, PRESETS[preset], progress=silent).model
        check_within_rounding(model, quantized, [{"image": images}])

    check()


def test_the_bound_finds_a_weight_that_is_not_the_models():
    data, batches = _data(0)
    model = drawn(0, *deck(0, 8)[0])
    quantized = eptq_onnx.quantize(model, data, PRESETS["fast"], progress=silent).model
    weight = next(t for t in quantized.graph.initializer if t.data_type == onnx.TensorProto.INT8)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    with pytest.raises(AssertionError, match="allowed"):
        check_within_rounding(model, quantized, batches)
