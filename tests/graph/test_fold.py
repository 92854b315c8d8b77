from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import parse

from eptq_onnx.graph.fold import fold_constants
from eptq_onnx.runtime import Session


@pytest.mark.parametrize("limits", ["start = 1", "end = 2", "start = -3, end = -1", "start = 3, end = 1", "start = 0"])
@pytest.mark.parametrize("batch", ["2", "N"])
def test_the_shape_of_some_axes(limits, batch):
    model = parse(f"g (float[{batch},3,4] x) => (int64[K] y) {{ y = Shape <{limits}> (x) }}")
    folded = fold_constants(model)
    x = np.zeros((2, 3, 4), np.float32)
    np.testing.assert_array_equal(Session(folded).run({"x": x})["y"], Session(model).run({"x": x})["y"])
    onnx.checker.check_model(folded)
