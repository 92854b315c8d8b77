"""When matrix products do enough of the work for ranges of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eptq_onnx.passes.dynamic import _share


@pytest.mark.parametrize(
    ("operators", "multiplications", "share"),
    [
        (("Conv", "MatMul", "MatMul"), (6.0, 1.0, 3.0), 0.4),
        (("MatMul",), (5.0,), 1.0),
        (("Conv",), (5.0,), 0.0),
        # Sizes that depend on values are unknown: then products are asked wherever there are any.
        (("Conv", "MatMul"), (), 1.0),
        (("Conv",), (), 0.0),
    ],
)
def test_the_share_of_products_in_the_work(operators, multiplications, share):
    layers = [SimpleNamespace(node=f"n{k}", op_type=op) for k, op in enumerate(operators)]
    state: Any = SimpleNamespace(plan=SimpleNamespace(static_layers=layers))
    known = {f"n{k}": work for k, work in enumerate(multiplications)}
    ctx: Any = SimpleNamespace(multiplications=known, target=SimpleNamespace(dynamic={"MatMul"}))
    assert _share(state, ctx) == pytest.approx(share)
