"""Gradients against finite differences, by random projection."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from eptq_onnx import ops
from eptq_onnx.engines.base import Engine
from eptq_onnx.graph import edit
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.view import GraphView
from eptq_onnx.runtime import Session


def check_gradients(engine: Engine, model: ModelProto, feeds: dict[str, np.ndarray], wrt: tuple[str, ...], tolerance: float = 2e-3) -> None:
    """Assert that d<v, f(x)> in a random direction agrees with a central difference of the *original* model."""
    shapes = {n: v.shape for n, v in feeds.items()}
    lowered, refused = lower(edit.specialize(model, shapes), ops.LOWERINGS)
    assert not refused, refused
    output = lowered.graph.output[0].name
    original = Session(model)
    y = original.run(feeds)[output]
    rng = np.random.default_rng(0)
    v = rng.normal(size=y.shape).astype(np.float32)
    _append_projection(lowered, output, v.shape)
    gradient = engine.differentiate(lowered, "projection", wrt)
    assert set(gradient.gradients) == set(wrt), gradient.unreached
    edit.set_outputs(gradient.model, list(gradient.gradients.values()))
    session = Session(gradient.model)
    values = session.run({k: x for k, x in {**feeds, "v": v}.items() if k in session.inputs})
    for name in wrt:
        direction = rng.choice([-1.0, 1.0], size=feeds[name].shape).astype(np.float32)
        step = 5e-3
        ends = [original.run({**feeds, name: (feeds[name] + sign * step * direction).astype(np.float32)})[output] for sign in (1, -1)]
        numeric = float((v * (ends[0].astype(np.float64) - ends[1])).sum()) / (2 * step)
        analytic = float((values[gradient.gradients[name]] * direction).sum(dtype=np.float64))
        scale = float(np.abs(values[gradient.gradients[name]]).sum()) / np.sqrt(direction.size) + 1e-3
        assert abs(numeric - analytic) <= tolerance * scale * 3, f"{name}: finite difference {numeric}, gradient {analytic}"


def _append_projection(model: ModelProto, output: str, shape: tuple[int, ...]) -> None:
    builder = edit.Builder(model)
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, shape))
    builder.reduce("ReduceSum", builder.add("Mul", [output, "v"]), None, "projection")
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)
    edit.set_outputs(model, ["projection"])
    assert GraphView(model).outputs == ("projection",)
