"""Plan the lookup tables of float nodes that are stored as integers."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from eptq_onnx.config import Config
from eptq_onnx.method.plan.draft import Draft
from eptq_onnx.numerics.formats import PerBlock
from eptq_onnx.ops import spec_of
from eptq_onnx.records import Layer, LookupTable

_LEAST_TABLE = 16_384
"""Values of a table below which storing it as integers does not pay."""


def lookup_tables(
    draft: Draft, layers: tuple[Layer, ...], config: Config, excluded: Collection[str] = ()
) -> tuple[LookupTable, ...]:
    """Return the lookup tables of float nodes: 8-bit integers with one scale per row, or blocks.

    In blocks they have the bits of first and last layers. A table whose transpose is the weight of a layer is
    stored once.

    Parameters
    ----------
    draft : Draft
        With what runs on integers.
    layers : tuple of Layer
        Their weights are planned already.
    config : Config
    excluded : collection of str
        Nodes whose tables stay float.
    """
    view, weights = draft.view, {layer.weight for layer in layers}
    found: dict[str, int] = {}
    for node in view.nodes:
        row = spec_of(node)
        place = row.table(node) if row.table is not None and draft.row(node).stored else None
        if node.name in draft.quantized or node.name in excluded:
            continue
        if place is None or not view.is_constant(node.input[place]):
            continue
        table = node.input[place]
        shape = view.constant_shape(table)
        if not view.is_float(table) or len(shape) < 2 or not view.is_finite(table):
            continue
        if math.prod(shape) < _LEAST_TABLE:
            draft.reasons[node.name] = (
                f"its table has fewer than {_LEAST_TABLE} values: storing it as integers would not pay"
            )
            continue
        if table in weights and _tied(draft, table, layers) is None:
            draft.reasons[node.name] = "its table is the weight of a layer too"
            continue
        asked = draft.bits[node.name][0] if node.name in draft.bits else config.edge_bits
        bits = 8 if config.block is None else max(found.get(table, 0), asked)
        what = "one scale per row" if config.block is None else f"blocks of {config.block}"
        draft.reasons[node.name] = f"its table is stored in {bits} bits with {what}; looked-up rows are float"
        found[table] = bits
    return tuple(_table(draft, name, bits, layers, config) for name, bits in found.items())


def _table(draft: Draft, name: str, bits: int, layers: tuple[Layer, ...], config: Config) -> LookupTable:
    """Return a table with its numbers."""
    if config.block is None:
        return LookupTable(name, (name,), draft.target.table_spec())
    tied = _tied(draft, name, layers)
    if tied is not None:
        return LookupTable(name, (name,), tied.weight_spec, tied.weight)
    rank = len(draft.view.constant_shape(name))
    return LookupTable(name, (name,), draft.target.block_spec(bits, rank - 1, config.block))


def _tied(draft: Draft, table: str, layers: tuple[Layer, ...]) -> Layer | None:
    """Return a layer whose weight holds the rows of a table, in blocks along them; None if there is none."""
    view, shape = draft.view, draft.view.constant_shape(table)
    for layer in layers:
        own, granularity = view.constant_shape(layer.weight), layer.weight_spec.granularity
        if len(own) != 2 or not isinstance(granularity, PerBlock):
            continue
        turned = granularity.axis % 2 == 0
        if shape != (own[::-1] if turned else own):
            continue
        weight = view.constant(layer.weight)
        if (layer.weight == table and not turned) or np.array_equal(
            view.constant(table), weight.T if turned else weight
        ):
            return layer
    return None
