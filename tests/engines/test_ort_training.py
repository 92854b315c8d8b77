from __future__ import annotations

import pytest
from graphs import scalar

from eptq_onnx import runtime
from eptq_onnx.engines.ort_training import OrtTrainingEngine
from eptq_onnx.errors import GradientError

pytestmark = pytest.mark.skipif(not runtime.is_training_build(), reason="needs the extra 'training'")


def test_a_graph_that_cannot_be_differentiated_is_reported_in_one_line():
    model = scalar("h = MatMul (x, w)  y = Relu (h)")
    model.graph.node[0].op_type = "Nonsense"
    model.graph.node[0].name = ""
    with pytest.raises(GradientError, match="cannot differentiate") as e:
        OrtTrainingEngine().differentiate(model, "loss", ["h"])
    assert "\n" not in str(e.value)
