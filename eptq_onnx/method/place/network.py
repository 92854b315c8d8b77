"""A planned network cut into pieces that can be timed, and the choice that follows from their times."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from onnx import ModelProto, helper

from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.method.place.costs import program_of
from eptq_onnx.method.place.goal import Asked, Parts
from eptq_onnx.method.place.joint import joined, without_floats
from eptq_onnx.method.place.pieces import Piece, conversions_piece, float_piece, integer_piece
from eptq_onnx.method.place.regions import Region, Regions, regions_of
from eptq_onnx.placement import Representation, TimedRegion, Way
from eptq_onnx.program import BYTES, NOISE, TIME, Choice, Program, Shared, solve
from eptq_onnx.records import Plan
from eptq_onnx.runtimes.attribute import RegionTime

Ways = Mapping[str, tuple[Way, ...]]
_FLOAT = tuple(r for r in Representation if not r.is_integer)
_INTEGERS = tuple(r for r in Representation if r.is_integer)


@dataclass(frozen=True)
class Times:
    """What was measured of a network.

    Parameters
    ----------
    pieces : dict of str to tuple of Way
        Key of a piece to the ways to compute it.
    conversions : dict of str to dict of str to float
        Key of a conversion piece to the seconds of each conversion.
    seen : sequence of (float, float) or None
        Seconds of each region in the profiles of the whole float and the whole quantized model; None where
        kernels span several regions. They stand in for regions whose pieces were not timed.
    corrected : dict of (int, bool) to float
        Region, and whether it is on integers, to the least seconds that it counts, in any layout.
    avoided : frozenset of (int, bool, tuple of int)
        A region, whether it is on integers, and its neighbours of which then one must be alike.
    """

    pieces: Ways
    conversions: Mapping[str, Mapping[str, float]]
    seen: Sequence[tuple[float, float] | None]
    corrected: Mapping[tuple[int, bool], float] = field(default_factory=dict)
    avoided: frozenset[tuple[int, bool, tuple[int, ...]]] = frozenset()


@dataclass(frozen=True)
class Variant:
    """How measured times count.

    Parameters
    ----------
    layouts : bool
        False ignores the time of layout changes.
    margin : float
        Factor on the seconds of regions on integers.
    profiled : bool
        True takes the times of regions from the profiles of whole models, not from pieces.
    """

    layouts: bool = True
    margin: float = 1.0
    profiled: bool = False


_MISJUDGED = 1.5
"""How many times longer than expected a region must take in a whole model for its time to be corrected."""
EXACT = Variant()
VARIANTS: Mapping[str, Variant] = {
    "least time": EXACT,
    "least time but for layouts": Variant(layouts=False),
    "least time with a margin": Variant(margin=1.25),
    "least time as profiled": Variant(layouts=False, profiled=True),
}
"""Name of a fastest choice to how times count in it; the first name counts for those that come out alike."""


@dataclass(frozen=True)
class Chosen:
    """A choice between integers and float for every region.

    Parameters
    ----------
    on_integers : tuple of bool
        True for each region on integers.
    predicted : float
        Predicted time of one run, in seconds.
    totals : dict of str to float
        Predicted total of every other currency that counts.
    widths : dict of str to int
        Quantized weight to its bits, if widths were chosen, too.
    exact : tuple of str
        Weights that stay float.
    """

    on_integers: tuple[bool, ...]
    predicted: float
    totals: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    exact: tuple[str, ...] = ()


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

    def in_order(self, seen: Sequence[tuple[float, float] | None]) -> list[Piece]:
        """Return the distinct pieces, most important first.

        Those come first whose regions the profiles of the whole models do not tell, then those whose regions
        lose most on integers in these.

        Parameters
        ----------
        seen : sequence
            See `Times`.
        """
        lost: dict[str, float] = defaultdict(float)
        found: dict[str, Piece] = {}
        movable, unknown = set[str](), set[str]()
        for region, pair, times in zip(self.regions.regions, self.pieces, seen, strict=True):
            for piece in pair:
                if piece is not None:
                    found[piece.key] = piece
                    lost[piece.key] += times[1] - times[0] if times is not None else 0.0
                    movable |= {piece.key} if region.movable else set()
                    unknown |= {piece.key} if times is None else set()
        # The other regions are timed only for their layouts.
        return sorted(
            found.values(), key=lambda p: (p.key not in movable, p.key not in unknown, -lost[p.key])
        )

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
    def sizes(self) -> dict[str, int]:
        """Return the number of elements of each weight that the plan quantizes."""
        return {x.weight: math.prod(self._exact.constant_shape(x.weight)) for x in self._plan.layers}

    @property
    def as_planned(self) -> tuple[bool, ...]:
        """Return the choice that the plan makes."""
        return tuple(r.movable for r in self.regions.regions)

    def seen(self, profiled: Iterable[RegionTime]) -> tuple[tuple[float, float] | None, ...]:
        """Return the seconds of each region in the profiles of whole models; see `Times`."""
        rows = tuple(profiled)
        spent = {name: k for k, own in enumerate(rows) for name in own.nodes}
        known = {name for region in self.regions.regions for name in region.nodes}
        found: list[tuple[float, float] | None] = []
        for region in self.regions.regions:
            own = {spent[name] for name in region.nodes if name in spent}
            if not own or any((set(rows[k].nodes) & known) - set(region.nodes) for k in own):
                found.append(None)
            else:
                found.append(
                    (sum(rows[k].float_seconds for k in own), sum(rows[k].quantized_seconds for k in own))
                )
        return tuple(found)

    def faster_kinds(self, seen: Sequence[tuple[float, float] | None]) -> tuple[bool, ...]:
        """Return the planned choice without the operators that take longer on integers in the whole models.

        Parameters
        ----------
        seen : sequence
            See `Times`.
        """
        gained: dict[str, float] = defaultdict(float)
        for region, times in zip(self.regions.regions, seen, strict=True):
            gained[region.operators] += times[0] - times[1] if times is not None else 0.0
        return tuple(r.movable and gained[r.operators] >= 0 for r in self.regions.regions)

    def has_layers(self, chosen: Sequence[bool]) -> bool:
        """Return True if a choice leaves one of the layers on integers of which it must leave one."""
        return not self.regions.layers or any(chosen[k] for k in self.regions.layers)

    def choose(
        self,
        times: Times,
        variant: Variant = EXACT,
        *,
        fixed: Sequence[bool] | None = None,
        asked: Asked | None = None,
    ) -> Chosen | None:
        """Return the fastest choice by measured times, a fixed one with its predicted time, or what is asked.

        Parameters
        ----------
        times : Times
        variant : Variant
        fixed : sequence of bool, optional
            Whether each region is on integers.
        asked : Asked, optional
            What to minimize within which limits; by default the time, without limits.

        Returns
        -------
        Chosen or None
            None if the solver finds no solution.
        """
        if variant.profiled:
            times = replace(times, pieces={})
        own = [
            (exact, tuple(replace(w, seconds=variant.margin * w.seconds) for w in integers))
            for exact, integers in self._ways(times)
        ]
        conversions = {name: self._conversion(p, times) for name, p in self.conversions.items()}
        program = program_of(self.regions, own, conversions, layouts=variant.layouts, fixed=fixed)
        if fixed is None:
            program = replace(program, follows=(*program.follows, *_alike(program, times)))
        count, parts = len(program.options), Parts() if asked is None else asked.parts
        if asked is not None:
            program = self._with_parts(program, parts, exact=asked.exact)
        found: Choice | None = (
            solve(program) if asked is None else solve(program, asked.minimized, asked.program_limits)
        )
        if found is None:
            return None
        taken = [own[o] for own, o in zip(program.options, found.options, strict=True)]
        totals = {**found.totals, BYTES: found.totals.get(BYTES, 0.0) + parts.rest}
        widths = {name: x.bits for name, x in zip(parts.weights, taken[count:], strict=True)}
        return Chosen(
            tuple(x.on_integers for x in taken[:count]),
            found.totals[TIME],
            totals,
            {name: bits for name, bits in widths.items() if bits},
            tuple(name for name, bits in widths.items() if not bits),
        )

    def _with_parts(self, program: Program, parts: Parts, *, exact: bool) -> Program:
        """Return a program that counts quantizers, too, and chooses the widths of weights."""
        program = replace(program, shared=self._quantizers(program, parts))
        if parts.widths is None:
            return program
        users: dict[str, dict[int, None]] = defaultdict(dict)
        place = self._place()
        for layer in self._plan.layers:
            users[layer.weight][place[layer.node]] = None
        widths = parts.widths if exact else without_floats(parts.widths)
        return joined(program, widths, [tuple(users[name]) for name in parts.weights])

    def _place(self) -> dict[str, int]:
        return {name: k for k, region in enumerate(self.regions.regions) for name in region.nodes}

    def _quantizers(self, program: Program, parts: Parts) -> tuple[Shared, ...]:
        """Return the costs of quantizers, each of which is there if a region around it is on integers."""
        links = {x.tensor: x for x in self.regions.links}
        place = self._place()
        found = []
        for quantizer in self._plan.activations:
            users: set[int] = set()
            for tensor in quantizer.tensors:
                link = links.get(tensor)
                if link is not None:
                    users |= {*link.readers, *(() if link.maker is None else (link.maker,))}
                elif tensor in self._exact.producer:
                    users.add(place[self._exact.producer[tensor].name])
            options = [
                (k, o) for k in sorted(users) for o, x in enumerate(program.options[k]) if x.on_integers
            ]
            costs = {NOISE: parts.noise.get(quantizer.name), BYTES: parts.bytes.get(quantizer.name)}
            known = {name: cost for name, cost in costs.items() if cost}
            if options and known:
                found.append(Shared(tuple(options), known))
        return tuple(found)

    def _conversion(self, piece: Piece, times: Times) -> Mapping[str, float]:
        """Return the seconds of a tensor's conversions, by those of the largest other tensor if unknown."""
        known = times.conversions.get(piece.key)
        if known is not None or not times.conversions:
            return known or {}
        timed = [p for p in self.conversions.values() if p.key in times.conversions]
        other = max(timed, key=lambda p: _elements(p.model), default=None)
        if other is None:
            return {}
        share = _elements(piece.model) / max(_elements(other.model), 1)
        return {name: share * seconds for name, seconds in times.conversions[other.key].items()}

    def _ways(self, times: Times) -> list[tuple[tuple[Way, ...], tuple[Way, ...]]]:
        pairs = []
        known = zip(self.pieces, times.seen, self.regions.regions, strict=True)
        for k, (pieces, seen, region) in enumerate(known):
            first, second = (times.pieces.get(p.key, ()) if p is not None else () for p in pieces)
            if seen is not None and not (first and (second or not region.movable)):
                # In a whole model a region runs in the layout of its neighbours.
                first, second = (
                    tuple(Way(r, r, seconds) for r in forms)
                    for forms, seconds in zip((_FLOAT, _INTEGERS), seen, strict=True)
                )
            first, second = (
                tuple(
                    replace(w, seconds=max(w.seconds, times.corrected.get((k, bool(form)), 0.0))) for w in own
                )
                for form, own in enumerate((first, second if region.movable else ()))
            )
            pairs.append((first, second))
        return pairs

    def corrected(self, times: Times, chosen: Sequence[bool], profiled: Iterable[RegionTime]) -> Times:
        """Return times that count what regions took in the profile of a choice, where that is news.

        These are regions of which nothing was known, and those that took much longer than what was known. If
        some of their neighbours were of the other kind, that is held to be the reason: next to other kernels
        a runtime may lack the layout in which a region is fast.
        """
        found, avoided, seen = dict(times.corrected), set(times.avoided), list(times.seen)
        for k, (ways, own) in enumerate(zip(self._ways(times), self.seen(profiled), strict=True)):
            on, known = chosen[k], [w.seconds for w in ways[chosen[k]]]
            if own is None:
                continue
            if not known and on:
                seen[k] = own
            elif known and own[1] > _MISJUDGED * min(known):
                others = tuple(m for m in self._neighbours[k] if chosen[m] != on)
                if others:
                    avoided.add((k, on, others))
                else:
                    found[k, on] = own[1]
        return replace(times, seen=tuple(seen), corrected=found, avoided=frozenset(avoided))

    @cached_property
    def _neighbours(self) -> list[list[int]]:
        """Return for each region those before and behind it."""
        found: list[set[int]] = [set() for _ in self.regions.regions]
        for link in self.regions.links:
            if link.maker is not None:
                found[link.maker].update(link.readers)
                for k in link.readers:
                    found[k].add(link.maker)
        return [sorted(own) for own in found]

    def untimed(self, pieces: Ways) -> int:
        """Return the number of regions that the plan puts on integers and whose pieces were not timed."""
        return sum(
            region.movable and not all(p is not None and pieces.get(p.key) for p in pair)
            for region, pair in zip(self.regions.regions, self.pieces, strict=True)
        )

    def times(self, times: Times, chosen: Sequence[bool]) -> tuple[TimedRegion, ...]:
        """Return the times of all regions that can run on integers and were timed in both forms."""
        found = []
        for region, (exact, integers), on_integers in zip(
            self.regions.regions, self._ways(times), chosen, strict=True
        ):
            if region.movable and exact and integers:
                first, second = (min(w.seconds for w in own) for own in (exact, integers))
                found.append(TimedRegion(region.nodes, region.operators, first, second, on_integers))
        return tuple(found)

    def nodes(self, chosen: Sequence[bool]) -> list[Region]:
        """Return the regions that were planned on integers and that a choice keeps float."""
        return [r for r, on in zip(self.regions.regions, chosen, strict=True) if r.movable and not on]


def _alike(program: Program, times: Times) -> Iterator[tuple[tuple[int, int], tuple[tuple[int, int], ...]]]:
    """Yield the options that are taken only with others of the same kind around; see `Times`."""

    def options(k: int, on: bool) -> list[tuple[int, int]]:
        return [(k, o) for o, x in enumerate(program.options[k]) if x.on_integers == on]

    for k, on, others in sorted(times.avoided):
        leaders = tuple(option for m in others for option in options(m, on))
        yield from ((option, leaders) for option in options(k, on))


def _elements(model: ModelProto) -> int:
    """Return the number of elements of a model's first input."""
    return math.prod(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
