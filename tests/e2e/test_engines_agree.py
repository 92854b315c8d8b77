"""Both engines, and both installations, give the same scores, losses and gradients on every shipped model.

The installation that has the training build leaves what it found in ``build/``; others compare with it. `make
test` runs them in this order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import INSTALLED, MODELS
from graphs import silent

from eptq_onnx import Config, data, engines, targets
from eptq_onnx.data.samples import Selection
from eptq_onnx.engines.base import ACTIVATION_SCALES, ATTENTION, FLOAT_SHARE, LOSS
from eptq_onnx.graph import io
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.score import score
from eptq_onnx.records import Network
from eptq_onnx.runtime import Session
from eptq_onnx.training.graph import training_graph

sys.path.insert(0, str(MODELS))
from score import MODELS as SHIPPED

REFERENCE = MODELS.parent / "build" / "gradients"
PROJECTIONS = 4
COUNT = 8

Found = dict[str, np.ndarray]


def gradients(name: str, choice: str) -> Found:
    """Hessian scores of the float model, and loss and gradients of one training step at 8-bit and 4-bit
    activations."""
    original = io.load(MODELS / f"{name}.onnx")
    samples = data.read(MODELS / f"{SHIPPED[name].data}_calib.npz", original)
    engine, indices, found = engines.make(choice), np.arange(COUNT), Found()
    for bits in (8, 4):
        config = Config(weight_bits=4, activation_bits=bits, batch_size=COUNT, probes=1)
        target = targets.load(config.target)
        model = normalize(original, target.min_opset)
        the_plan = plan(model, target, config)
        calibration = calibrate(model, the_plan, samples, config, silent)
        if bits == 8:
            scores = score(
                Network(model, the_plan, calibration),
                Selection(samples, indices),
                list(the_plan.weight_specs),
                engine,
                config,
                silent,
            )
            assert not scores.unreached
            for kind in ("channels", "weights", "outputs"):
                found |= {f"{kind}/{k}": v for k, v in getattr(scores, kind).items()}
        start = weight_ranges(model, the_plan, calibration, None, config)
        network, selection = Network(model, the_plan, calibration), Selection(samples, indices)
        graph = training_graph(network, start, selection, config, engine)
        assert not graph.unreached
        session = Session(graph.train, integers=False)
        feeds = {
            **samples.take(indices[: graph.micro_batch]),
            **{n: start.weights[n].dequantize(start.integers[n]) for n in the_plan.weight_specs},
            **start.biases,
            ATTENTION: np.ones((graph.micro_batch, graph.columns), np.float32),
            ACTIVATION_SCALES: np.array([start.grids[q].scale for q in graph.quantizers], np.float32),
            FLOAT_SHARE: np.zeros(1, np.float32),
        }
        values = session.run({k: v for k, v in feeds.items() if k in session.inputs})
        found[f"{bits} bits/loss"] = values[LOSS]
        found |= {f"{bits} bits/{k}": values[g] for k, g in graph.gradients.items()}
    return found


def summary(found: Found) -> Found:
    """The norm of every array, and its products with a few random ones: small enough to keep, and no error
    hides in it."""
    rng = np.random.default_rng(0)

    def rows() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in sorted(found.items()):
            flat = value.reshape(-1).astype(np.float64)
            yield (
                name,
                np.array([np.linalg.norm(flat), *(rng.choice([-1.0, 1.0], (PROJECTIONS, flat.size)) @ flat)]),
            )

    return dict(rows())


def assert_close(found: Found, expected: Found) -> None:
    """Relative to the norms: where the graph rounds, an activation may fall on the other side of a
    boundary."""
    assert set(found) == set(expected)
    for name, value in found.items():
        tolerance = 1e-3 if "bits" in name else 1e-4
        assert np.linalg.norm(value - expected[name]) <= tolerance * (
            np.linalg.norm(expected[name]) + 1e-6
        ), name


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_engines_agree(name):
    standard = gradients(name, "standard")
    path = REFERENCE / f"{name}.npz"
    if "training" in INSTALLED:
        expected = gradients(name, "training")
        assert_close(standard, expected)
        REFERENCE.mkdir(parents=True, exist_ok=True)
        np.savez(path, **dict[str, Any](summary(expected)))
    elif path.exists():
        assert_close(summary(standard), dict(np.load(path)))
    else:
        pytest.skip("the tests have not run with the extra 'training' here")
