"""The rule on widths, on files of onnxruntime's own quantizer for QNN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet

from eptq_onnx import lint

quantization: Any = pytest.importorskip("onnxruntime.quantization")
qnn: Any = pytest.importorskip("onnxruntime.quantization.execution_providers.qnn")


class Reader:
    def __init__(self) -> None:
        self._batches = iter(images(4))

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch[None]}


@pytest.mark.parametrize(("converts", "wrong"), [(True, []), (False, ["c3", "s"])])
def test_operators_that_it_converts_for_have_one_width(tmp_path: Path, converts, wrong):
    """The result of c3 is to have 16 bits; s reads it."""
    model = small_convnet(batch=1)
    for node in model.graph.node:
        node.name = node.output[0]
    paths = tmp_path / "float.onnx", tmp_path / "qnn.onnx"
    onnx.save(model, paths[0])
    config = qnn.get_qnn_qdq_config(
        paths[0],
        Reader(),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        init_overrides={"c3": [{"quant_type": quantization.QuantType.QUInt16}]},
        add_qtype_converts=converts,
    )
    quantization.quantize(paths[0], paths[1], config)
    findings = lint(paths[1], "qnn").findings
    assert [f.node for f in findings if f.rule == "one-width"] == wrong
