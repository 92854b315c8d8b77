"""Gradients against finite differences, by random projection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, TensorProto, helper

from eptq_onnx import ops
from eptq_onnx.engines.base import Engine
from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import fold_sizes
from eptq_onnx.graph.lower import NotLowerable, lower
from eptq_onnx.runtime import Session

Feeds = dict[str, np.ndarray]
STEP = 5e-3
ATTEMPTS = 12


def check_gradients(
    engine: Engine, model: ModelProto, feeds: Feeds, wrt: tuple[str, ...], tolerance: float = 5e-3
) -> None:
    """Assert that d<v, f(x)> in a random direction agrees with a central difference of the *original* model.

    All float outputs are projected. What no gradient reaches has the gradient 0, which must agree, too.
    """
    lowered, refused = lower(
        fold_sizes(edit.specialize(model, {n: v.shape for n, v in feeds.items()})), ops.LOWERINGS
    )
    if refused:
        raise NotLowerable(next(iter(refused.values())))
    original = Session(model)
    names = [n for n, y in original.run(feeds).items() if y.dtype == np.float32 and y.size]
    rng = np.random.default_rng(0)
    v = {n: rng.normal(size=original.run(feeds)[n].shape).astype(np.float32) for n in names}
    _append_projection(lowered, v)
    gradient = engine.differentiate(lowered, "projection", wrt)
    session = None
    if gradient.gradients:
        edit.set_outputs(gradient.model, list(gradient.gradients.values()))
        session = Session(gradient.model)

    def project(x: Feeds) -> tuple[float, float]:
        """<v, f(x)> and the rounding error of its difference quotients."""
        terms = [v[n].astype(np.float64) * y for n, y in original.run(x, names).items()]
        return sum(float(t.sum()) for t in terms), sum(float(np.linalg.norm(t)) for t in terms) * 1e-7 / STEP

    for name in wrt:
        x, direction, numeric, noise = _smooth_direction(project, feeds, name, rng, tolerance)
        exact = np.zeros_like(direction)
        if session is not None and name in gradient.gradients:
            everything = {**x, **{f"v/{n}": value for n, value in v.items()}}
            exact = session.run({k: a for k, a in everything.items() if k in session.inputs})[
                gradient.gradients[name]
            ]
        analytic = float((exact * direction).sum(dtype=np.float64))
        scale = float(np.linalg.norm(exact * direction)) + abs(numeric)
        message = f"{name}: finite difference {numeric}, gradient {analytic}"
        assert abs(numeric - analytic) <= tolerance * scale + 4 * noise + 1e-4, message


def _smooth_direction(
    project: Callable[[Feeds], tuple[float, float]],
    feeds: Feeds,
    name: str,
    rng: np.random.Generator,
    tolerance: float,
) -> tuple[Feeds, np.ndarray, float, float]:
    """A place and a direction without a kink, and the slope there.

    Behind a kink, slopes over a step and over half of it differ, or those of both sides do not come closer to
    each other. A new direction moves fewer elements, from a place nearby.
    """
    for attempt in range(ATTEMPTS):
        x, shape = dict(feeds), feeds[name].shape
        if attempt:
            x[name] = (x[name] + rng.uniform(-0.02, 0.02, shape)).astype(np.float32)
        direction = rng.choice([-1.0, 1.0], size=shape) * (rng.random(shape) < 0.5**attempt)
        if not direction.any():
            direction.reshape(-1)[rng.integers(direction.size)] = 1.0
        values = {
            k: project({**x, name: (x[name] + k * STEP / 2 * direction).astype(np.float32)})
            for k in (-2, -1, 0, 1, 2)
        }
        f, noise = {k: value for k, (value, _) in values.items()}, values[0][1]
        slopes = [(f[k] - f[-k]) / (k * STEP) for k in (1, 2)]
        bends = [(f[k] - 2 * f[0] + f[-k]) / (k * STEP / 2) for k in (1, 2)]
        allowed = tolerance * abs(slopes[0]) + 8 * noise + 1e-4
        if (
            all(np.isfinite(list(f.values())))
            and abs(slopes[1] - slopes[0]) <= allowed
            and abs(2 * bends[0] - bends[1]) <= 4 * allowed
        ):
            return x, direction.astype(np.float32), slopes[0] + (slopes[0] - slopes[1]) / 3, noise
    raise AssertionError(f"{name}: no direction without a kink found")


def _append_projection(model: ModelProto, v: Feeds) -> None:
    builder, terms = edit.Builder(model), []
    for name, value in v.items():
        model.graph.input.append(helper.make_tensor_value_info(f"v/{name}", TensorProto.FLOAT, value.shape))
        terms.append(builder.reduce("ReduceSum", builder.add("Mul", [name, f"v/{name}"]), None))
    for term in terms[1:]:
        terms[0] = builder.add("Add", [terms[0], term])
    builder.add("Identity", [terms[0]], "projection")
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.initializers)
    edit.set_outputs(model, ["projection"])
