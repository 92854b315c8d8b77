"""Operators that no gradient passes do not stop the job: the report says what goes without."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse, silent

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.runtime import Session

WEIGHTS = {
    "w0": normal(4, 4, seed=1),
    "w1": normal(4, 4, seed=2),
    "w2": normal(4, 3, seed=3),
    "one": np.array([1]),
}


@pytest.mark.parametrize(
    ("body", "constants", "passed"),
    [
        (
            "d = Det (a)  u = Unsqueeze (d, last)  h = Expand (u, shape)",
            {"last": np.array([1, 2]), "shape": np.array([1, 4, 4])},
            None,
        ),
        ("h = Round (a)", {}, None),
        (
            'h = ScatterElements <axis = 1, reduction = "mul"> (a, places, factors)',
            {"places": np.zeros((1, 1, 4), np.int64), "factors": np.full((1, 1, 4), 1.5, np.float32)},
            "its reduction is mul",
        ),
    ],
)
def test_what_lies_before_has_no_score_and_the_rest_is_optimized(body, constants, passed):
    model = parse(
        f"g (float[1,4,4] x) => (float[1,4,4] y, float[1,4,3] z) {{ a = MatMul (x, w0)  {body}  y = MatMul (h, w1)  z = MatMul (x, w2) }}",
        {**WEIGHTS, **constants},
        opset=18,
    )
    x = normal(16, 4, 4, seed=5, scale=2.0)
    result = eptq_onnx.quantize(model, x, Config(steps=2, batch_size=4, probes=1), progress=silent)
    notes = result.report.notes
    assert [n for n in notes if "no Hessian score" in n] == [
        "MatMul_0 has no Hessian score: no output depends on it through operators that have a gradient"
    ]
    assert passed is None or any(n.startswith("no gradient passes") and n.endswith(passed) for n in notes)
    assert result.report.optimization is not None
    assert result.report.optimization.steps == 2
    assert len(result.report.layers) == 3
    assert set(Session(result.model).run({"x": x[:1]})) == {"y", "z"}
