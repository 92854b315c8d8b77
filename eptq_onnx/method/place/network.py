"""A planned network cut into pieces that can be timed, and the choice that follows from their times."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, helper

from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.method.place.costs import program_of
from eptq_onnx.method.place.pieces import Piece, conversions_piece, float_piece, integer_piece
from eptq_onnx.method.place.program import Choice, solve
from eptq_onnx.method.place.regions import Region, Regions, regions_of
from eptq_onnx.placement import TimedRegion, Way
from eptq_onnx.records import Plan

Ways = Mapping[str, tuple[Way, ...]]


@dataclass(frozen=True)
class Chosen:
    """A choice between integers and float for every region.

    Parameters
    ----------
    on_integers : tuple of bool
        True for each region on integers.
    predicted : float
        Predicted time of one run, in seconds.
    """

    on_integers: tuple[bool, ...]
    predicted: float


class Cut:
    """A planned network, cut into regions.

    Parameters
    ----------
    exact : ModelProto
        The float network with the shapes of one run.
    written : ModelProto
        The same network, quantized by the plan.
    plan : Plan
    """

    def __init__(self, exact: ModelProto, written: ModelProto, plan: Plan) -> None:
        self._exact, self._written, self._plan = GraphView(exact), GraphView(written), plan
        self.regions: Regions = regions_of(self._exact, plan)
        self.pieces: list[tuple[Piece | None, Piece | None]] = [
            (
                float_piece(self._exact, region.nodes),
                integer_piece(self._written, region.nodes) if region.movable else None,
            )
            for region in self.regions.regions
        ]
        container = helper.np_dtype_to_tensor_dtype(np.dtype(plan.activations[0].spec.format.container))
        shapes = {x.tensor: self._exact.static_shape(x.tensor) for x in self.regions.links}
        self.conversions: dict[str, Piece] = {
            tensor: conversions_piece(shape, container, opset_of(exact))
            for tensor, shape in shapes.items()
            if shape is not None and 0 not in shape
        }
        """Tensor between regions to the piece that holds its conversions."""

    @property
    def by_work(self) -> list[Piece]:
        """Return the distinct pieces, those with the most work first."""
        work: dict[str, float] = defaultdict(float)
        found: dict[str, Piece] = {}
        for region, pair in zip(self.regions.regions, self.pieces, strict=True):
            for piece in pair:
                if piece is not None:
                    found[piece.key] = piece
                    # The other regions are timed only for their layouts.
                    work[piece.key] += _work(piece.model) if region.movable else 0.0
        return sorted(found.values(), key=lambda p: -work[p.key])

    @property
    def digest(self) -> str:
        """Return a digest of everything except times that the choice depends on."""
        tree = [
            [(p.key if p else "", q.key if q else "") for p, q in self.pieces],
            [(r.nodes, r.movable) for r in self.regions.regions],
            [(x.tensor, x.maker, x.readers, x.is_output) for x in self.regions.links],
            [(name, p.key) for name, p in self.conversions.items()],
            [self.regions.needs, self.regions.bound, sorted(self.regions.layers)],
        ]
        return hashlib.sha256(json.dumps(tree).encode()).hexdigest()

    @property
    def given(self) -> list[str]:
        """Return the inputs of pieces that need real values: shapes, indices and conditions."""
        names = {
            v.name: None
            for pair in self.pieces
            for p in pair
            if p is not None
            for v in p.model.graph.input
            if not self._exact.is_float(v.name) and self._exact.elem_type(v.name)
        }
        return [name for name in names if name in self._exact.producer]

    @property
    def as_planned(self) -> tuple[bool, ...]:
        """Return the choice that the plan makes."""
        return tuple(r.movable for r in self.regions.regions)

    def choose(
        self,
        ways: Ways,
        conversions: Mapping[str, Mapping[str, float]],
        *,
        layouts: bool = True,
        fixed: Sequence[bool] | None = None,
    ) -> Chosen | None:
        """Return the fastest choice by measured times, or a fixed one with its predicted time.

        Parameters
        ----------
        ways : dict of str to tuple of Way
            Key of a piece to the ways to compute it.
        conversions : dict of str to dict of str to float
            Key of a conversion piece to the seconds of each conversion.
        layouts : bool
            False ignores the time of layout changes.
        fixed : sequence of bool, optional
            Whether each region is on integers.

        Returns
        -------
        Chosen or None
            None if the solver finds no solution.
        """
        own = self._ways(ways)
        times = {name: conversions.get(p.key, {}) for name, p in self.conversions.items()}
        program = program_of(self.regions, own, times, layouts=layouts, fixed=fixed)
        found: Choice | None = solve(program)
        if found is None:
            return None
        chosen = tuple(program.options[k][o].on_integers for k, o in enumerate(found.options))
        return Chosen(chosen, found.amount)

    def _ways(self, ways: Ways) -> list[tuple[tuple[Way, ...], tuple[Way, ...]]]:
        pairs = []
        for exact, integers in self.pieces:
            own = [ways.get(p.key, ()) if p is not None else () for p in (exact, integers)]
            pairs.append((own[0], own[1]))
        return pairs

    def times(self, ways: Ways, chosen: Sequence[bool]) -> tuple[TimedRegion, ...]:
        """Return the times of all regions that can run on integers and were timed in both forms."""
        found = []
        for region, (exact, integers), on_integers in zip(
            self.regions.regions, self._ways(ways), chosen, strict=True
        ):
            if region.movable and exact and integers:
                first, second = (min(w.seconds for w in own) for own in (exact, integers))
                found.append(TimedRegion(region.nodes, region.operators, first, second, on_integers))
        return tuple(found)

    def nodes(self, chosen: Sequence[bool]) -> list[Region]:
        """Return the regions that were planned on integers and that a choice keeps float."""
        return [r for r, on in zip(self.regions.regions, chosen, strict=True) if r.movable and not on]


def _work(model: ModelProto) -> float:
    """Return the approximate number of multiplications, or of values moved, in a piece."""
    outputs = sum(math.prod(d.dim_value for d in v.type.tensor_type.shape.dim) for v in model.graph.output)
    terms = [math.prod(t.dims[1:]) for t in model.graph.initializer if len(t.dims) > 1]
    return float(outputs * max([*terms, 1]))


def reasons(times: Iterable[TimedRegion], kept: Iterable[Region]) -> dict[str, str]:
    """Return for each node kept float the reason, with the total times of regions of the same operators."""
    wanted = {r.nodes for r in kept}
    totals: dict[str, list[float]] = {}
    for time in times:
        if time.nodes in wanted:
            total = totals.setdefault(time.operators, [0.0, 0.0])
            total[0] += time.float_seconds
            total[1] += time.integer_seconds
    found = {}
    for region in kept:
        exact, integers = totals.get(region.operators, (0.0, 0.0))
        if integers > exact:
            why = f"integers would be slower here: {in_ms(integers)} instead of {in_ms(exact)}"
        else:
            why = (
                "integers would not pay off here: the conversions around it would cost more than the "
                f"{in_ms(exact - integers)} that the kernels save"
            )
        found.update(dict.fromkeys(region.nodes, why))
    return found


def in_ms(seconds: float) -> str:
    """Return a time in milliseconds."""
    return f"{seconds * 1e3:.3g} ms"
