"""The onnx package's own node cases: each float operator has a gradient, or a reason why not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from gradcheck import check_gradients
from onnx import ModelProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as Case

from eptq_onnx import ops
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import EptqError, ModelError
from eptq_onnx.graph.lower import NotLowerable
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.ops import Gradient
from eptq_onnx.runtime import Session

AGREES = "the gradient agrees with finite differences"
NEWEST_OPSET = 21
PARAMETERS = {"Resize": (1, 2), "Upsample": (1,)}
"""Float inputs that are no data: they decide on shapes."""
KNOWN = {
    "fullymasked": "softmax of a row of -inf: its gradient is not a number, as the function itself",
    "boolmask_nan_robustness": "softmax of a row of -inf: its gradient is not a number, as the function itself",
    "structural_empty": "softmax of a row of -inf: its gradient is not a number, as the function itself",
    "test_attention_local_window_gqa_rank4_mask_expanded": "softmax of a row of -inf: its gradient is not a number, as the function itself",
    "mask_causal_expanded": "scores of -inf are an output: their finite difference is not a number",
    "test_unique_sorted_with_axis_3d": "repeated rows: the size of the output jumps",
    "test_unique_sorted_with_negative_axis": "repeated rows: the size of the output jumps",
    "test_dequantizelinear": "the gradient of a quantizer's own scale is known for FakeQuant alone",
}
"""Part of a case's name to why it need not agree."""


def float_cases() -> list[Case]:
    """Cases with a float32 input of rank 1 or more, and a float32 output that is not empty."""

    def wanted(case: Case) -> bool:
        inputs, outputs = _first(case)
        assert case.model is not None
        arrays = all(isinstance(v, np.ndarray) for v in (*inputs, *outputs))
        arrays &= all(i.type.HasField("tensor_type") for i in case.model.graph.input)
        return (
            arrays
            and any(_varies(v) for v in inputs)
            and any(v.dtype == np.float32 and v.size for v in outputs)
        )

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # The cases' own arithmetic overflows here and there.
        return [case for case in collect_testcases(None) if case.data_sets and wanted(case)]


def _first(case: Case) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """Inputs and outputs."""
    assert case.data_sets is not None
    return case.data_sets[0]


def _varies(value: np.ndarray) -> bool:
    return value.dtype == np.float32 and value.ndim > 0 and value.size > 0


def _prepared(case: Case) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """The model with its float inputs, all others constant; in an opset that the runtime reads."""
    model, feeds = ModelProto(), {}
    model.CopyFrom(case.model)
    model.ir_version = min(model.ir_version, 10)
    for item in model.opset_import:
        if item.domain in ("", "ai.onnx"):
            item.version = min(item.version, NEWEST_OPSET)
    parameters = PARAMETERS.get(model.graph.node[0].op_type, ())
    inputs = list(model.graph.input)
    del model.graph.input[:]
    for position, (info, value) in enumerate(zip(inputs, _first(case)[0], strict=False)):
        if _varies(value) and position not in parameters:
            feeds[info.name] = value
            model.graph.input.append(info)
        else:
            model.graph.initializer.append(numpy_helper.from_array(value, info.name))
    return model, feeds


def outcome(case: Case, engine: Engine) -> str:
    """`AGREES`, or why it does not."""
    model, feeds = _prepared(case)
    if not feeds or any(part in case.name for part in KNOWN):
        return next((why for part, why in KNOWN.items() if part in case.name), "no input is data")
    try:
        outputs = list(Session(model).run(feeds).values())
    except ModelError:
        return "onnxruntime cannot run it"
    expected = _first(case)[1]
    if not all(
        np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(outputs, expected, strict=False)
    ):
        return "onnxruntime itself gives another result"
    if any(o.domain not in ("", "ai.onnx") for o in model.opset_import):
        return "it is of another domain"
    model = normalize(model, 13)
    view = GraphView(model)
    missing = [
        n.op_type
        for n in view.nodes
        if ops.spec_of(n).gradient is Gradient.NONE and any(map(view.is_float, n.output))
    ]
    if missing:
        return f"{missing[0]} has no gradient"
    try:
        check_gradients(engine, model, feeds, tuple(feeds))
    except NotLowerable as e:
        return f"{model.graph.node[0].op_type}: {e}"
    except (AssertionError, EptqError) as e:
        return f"FAILED {case.name}: {e}"
    return AGREES


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(12, id="one in twelve")]
)
def test_float_cases_have_a_gradient_or_a_reason(engine, every, capsys):
    cases = float_cases()[::every]
    found = Counter(outcome(case, engine) for case in cases)
    with capsys.disabled():
        print(
            f"\n{engine.name}: of {len(cases)} float cases of the onnx package, {found[AGREES]} have the gradient of finite differences"
        )
        if every == 1:
            print("\n".join(f"  {count:4} {why}" for why, count in found.most_common() if why != AGREES))
    assert not [why for why in found if why.startswith("FAILED")]
    unreadable = sum(count for why, count in found.items() if why.startswith("onnxruntime"))
    assert found[AGREES] >= 0.9 * (len(cases) - unreadable)
    assert every > 1 or found[AGREES] >= 790
