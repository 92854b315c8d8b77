"""Grids of constants, which need no samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.blocks import block_grid
from eptq_onnx.numerics.formats import PerBlock
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.records import ConstantOperand, HeldWeight, LookupTable, Plan


def constant_grids(plan: Plan, view: GraphView, known: Mapping[str, Grid] | None = None) -> dict[str, Grid]:
    """Return the grids of all constants that are no weights of layers, those ``known`` as they are."""
    before = known or {}
    grids = {q.name: before.get(q.name) or _operand_grid(q, view) for q in plan.operands}
    grids |= {q.name: before.get(q.name) or _table_grid(q, view) for q in plan.tables if not q.weight}
    return grids | {q.name: before.get(q.name) or _weight_grid(q, view) for q in plan.held}


def _operand_grid(operand: ConstantOperand, view: GraphView) -> Grid:
    value = view.constant(operand.name)
    return quant_math.activation_grid(float(value.min()), float(value.max()), operand.spec)


def _table_grid(table: LookupTable, view: GraphView) -> Grid:
    if isinstance(table.spec.granularity, PerBlock):
        return block_grid(np.asarray(view.constant(table.name), np.float32), table.spec)
    scales = [quant_math.weight_scales(rows, table.spec) for _, rows in view.constant_parts(table.name)]
    return table.spec.grid(np.concatenate(scales))


def _weight_grid(weight: HeldWeight, view: GraphView) -> Grid:
    return weight.spec.grid(quant_math.weight_scales(view.constant(weight.name), weight.spec))
