"""Rank the parts of a network by the noise that each causes at the outputs if it alone is quantized.

The float network runs with one weight or one activation quantized at a time, on samples that no range was
chosen on. That is measured, not predicted: first-order scores mislead where errors add up (see
`eptq_onnx.method.float_fallback`). A part may look harmless alone and matter among its neighbours, so groups
are measured, too: alone, and by what is left once all of the group is spared.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from onnx import ModelProto

from eptq_onnx.config import FLOAT_BITS, Config, Objective, Preset
from eptq_onnx.data.readers import Source
from eptq_onnx.errors import ConfigError, ModelError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph.patterns import matching
from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.method.diagnose import only_weights, part_of, readers
from eptq_onnx.method.qdq import write
from eptq_onnx.method.spare import Rules, Spare, most_bits, of_activation, of_dynamic, of_weights, rules
from eptq_onnx.numerics.halving import alone
from eptq_onnx.passes.base import Context, Progress, State
from eptq_onnx.records import DYNAMIC_BITS, ActivationQuantizer, DynamicQuantizer, Layer, Plan
from eptq_onnx.sensitivities import Group, Part, Sensitivity, in_decibels
from eptq_onnx.start import silent, start

MOST_PASSES = 60
"""Most float passes that a ranking may take: runs of all samples through the float model."""
SAMPLES, _FEW = 8, 2
"""Samples that each part runs on, and the fewest to do with."""
_NEIGHBOURHOODS = 8
"""Groups that the network is cut into in the order of execution."""
_FULL, _WIDE = 8, 16
"""Bits that all runtimes compute with, and those that few do."""
_LEAST_PRICE = 0.02
"""Price of sparing any part, so that a list of many small ones is no bargain."""


def sensitivity(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    given: Config,
    folder: str,
    progress: Progress = silent,
) -> Sensitivity:
    """Rank the parts of a network; see `eptq_onnx.sensitivity`.

    Parameters
    ----------
    model : path, bytes or ModelProto
    data : Source
    given : Config
        Its bits, patterns and target say what is quantized and how.
    folder : str
        Temporary folder for the weights of a large model.
    progress : Progress

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    if given.chooses_widths or given.activation_budget is not None:
        raise ConfigError("a ranking is for given widths: leave the budget out, and give bits instead.")
    # What runs on integers does not depend on the time that this machine takes.
    config = given.model_copy(
        update={"preset": Preset.FAST, "steps": 0, "objective": Objective.INTEGERS, "timings": None}
    )
    begun = start(model, data, config, folder, progress)
    runner, ctx = begun.runner.part(last="ranges"), begun.ctx
    count = ctx.samples.count
    before = sum(step.cost(begun.state, ctx).passes for step in runner.passes if step.enabled(ctx))
    state = runner.run(begun.state, ctx)
    found = Ranking(state, ctx).ranked(MOST_PASSES * count - before)
    return replace(
        found,
        model=begun.prepared.name,
        float_passes=round(found.float_passes + before / count, 2),
        notes=(*begun.prepared.notes, *state.notes, *found.notes),
    )


@dataclass(frozen=True)
class Piece:
    """Weights that layers share, or activations with one scale, fixed or found in every run.

    Parameters
    ----------
    layers : tuple of Layer
        Empty for activations.
    activation : ActivationQuantizer, DynamicQuantizer or None
    nodes : tuple of str
        The layers, or the integer nodes that read the activations.
    spares : tuple of Spare
        Ways to spare it, the mildest first.
    """

    layers: tuple[Layer, ...]
    activation: ActivationQuantizer | DynamicQuantizer | None
    nodes: tuple[str, ...]
    spares: tuple[Spare, ...]

    @property
    def name(self) -> str:
        """Return the layer's node, or the activation's tensor."""
        return self.layers[0].node if self.activation is None else self.activation.name

    @property
    def what(self) -> str:
        """Return what it is."""
        return "weights" if self.activation is None else "activation"

    @property
    def bits(self) -> int:
        """Return its bits."""
        if isinstance(self.activation, DynamicQuantizer):
            return DYNAMIC_BITS
        return self.layers[0].weight_spec.bits if self.activation is None else self.activation.spec.bits


@dataclass(frozen=True)
class Move:
    """A way to spare a part, and what it brings and costs.

    Parameters
    ----------
    piece : Piece
    spare : Spare
    gain : float
        Noise that is gone, beside what milder ways have taken away.
    price : float
        What it adds to the bytes of all weights in int8, and the share of multiplications that it slows down.
    """

    piece: Piece
    spare: Spare
    gain: float
    price: float


class Ranking:
    """Measures the parts of a network.

    Parameters
    ----------
    state : State
        With all weights rounded to nearest.
    ctx : Context
    """

    def __init__(self, state: State, ctx: Context) -> None:
        self._state, self._ctx = state, ctx
        self._view = GraphView(state.model)
        self._operators = {n.name: n.op_type for n in self._view.nodes}
        self.pieces = self._pieces()
        """All that an option can spare, in the order of execution."""
        self.noises: dict[Piece, float] = {}
        """The noise of each alone, once it is ranked."""
        self._runs = self._planned = 0

    def ranked(self, most: float) -> Sensitivity:
        """Measure everything within a number of runs of the network for one sample.

        Raises
        ------
        ModelError
            If no output can be compared.
        """
        pieces, groups = self.pieces, list(self._groups())
        wanted = 3 + len(pieces) + 2 * len(groups)
        deviation = self._deviation(max(_FEW, min(SAMPLES, int(most // wanted))))
        if not deviation.parts:
            raise ModelError("no output of this model varies from sample to sample: nothing can be ranked.")
        runs = max(int(most // deviation.samples), 5)
        groups = groups if runs >= wanted else groups[: runs // 8]
        self._planned = min(wanted, runs)
        noises = self.noises
        notes = []

        def noise(chosen: Iterable[Piece]) -> float:
            return self._noise(deviation, self._plan_of(chosen))

        total = self._noise(deviation, self._state.plan)
        weights, activations = ([p for p in pieces if p.what == w] for w in ("weights", "activation"))
        left = runs - 3 - 2 * len(groups)
        for kind in (weights, activations):
            own = left * len(kind) // max(len(pieces), 1)
            noises |= dict(zip(kind, alone(kind, noise, own), strict=True))
        if left < len(pieces):
            notes.append(
                f"{MOST_PASSES} float passes of {self._ctx.samples.count} samples are too few to measure "
                f"{len(pieces)} parts one by one: the quiet ones share the noise of their neighbours"
            )
        parts = [self._part(p, noises, total) for p in pieces]
        found = [self._group(pattern, nodes, noises, noise) for pattern, nodes in groups]
        together = noise(weights), noise(activations)
        self._ctx.progress("sensitivity", self._planned, self._planned)
        return Sensitivity(
            model="",
            target=self._ctx.target.name,
            samples=deviation.samples,
            given=self._ctx.samples.count,
            float_passes=self._runs * deviation.samples / self._ctx.samples.count,
            total=total,
            weights=together[0],
            activations=together[1],
            parts=tuple(sorted(parts, key=lambda part: -part.noise)),
            groups=tuple(sorted(found, key=lambda group: -group.noise)),
            notes=tuple(notes),
        )

    def moves(self, most: float, multiplications: Mapping[str, float]) -> tuple[list[Move], float]:
        """Return ways to spare parts, what helps most for its price first, and the noise of the whole.

        The noise of the weights is that of their final rounding: less than that of nearest rounding, by
        about the same factor for all of them.

        Parameters
        ----------
        most : float
            Most runs of the network for one sample.
        multiplications : mapping of str to float
            Of each layer, by node.
        """
        found = self.ranked(most)
        state = self._state
        rounded = state.changed(nearest=state.rounding)
        weights = Ranking(rounded, self._ctx).noise_of_weights(found.samples)
        together = {"weights": weights, "activation": found.activations}
        moves: list[Move] = []
        for what, noise in together.items():
            own = {p: n for p, n in self.noises.items() if p.what == what}
            factor = noise / max(sum(own.values()), 1e-30)
            for piece, alone_noise in own.items():
                moves += self._ways(piece, alone_noise * factor, multiplications)
        return sorted(moves, key=lambda m: -m.gain / m.price), sum(together.values())

    def noise_of_weights(self, count: int) -> float:
        """Return the noise of all weights alone, on a number of samples."""
        return self._noise(self._deviation(count), only_weights(self._state.plan))

    def _ways(self, piece: Piece, noise: float, multiplications: Mapping[str, float]) -> Iterator[Move]:
        """Yield the ways to spare a part, the mildest first, none a better bargain than the one before."""
        total = max(sum(multiplications.values()), 1e-30)
        left, best = 1.0, np.inf
        for spare in piece.spares:
            if spare.activation_bits == _WIDE and not self._has_wide_types:
                continue
            touched = set(spare.nodes)
            if spare.tensor:
                touched = {n.name for n in self._view.consumers[spare.tensor]}
                maker = self._view.producer.get(spare.tensor)
                touched |= {maker.name} if maker is not None else set()
            slowed = sum(multiplications.get(n, 0.0) for n in touched) / total
            price = _LEAST_PRICE
            if spare.runs_float or spare.activation_bits == _WIDE:
                price += slowed
            if piece.layers:
                size = math.prod(self._view.constant_shape(piece.layers[0].weight)) / self._weights
                price += size * ((spare.weight_bits or FLOAT_BITS) - piece.bits) / _FULL
            gain = noise * (left - spare.left)
            left = spare.left
            best = min(best, gain / price)
            yield Move(piece, spare, gain, max(price, gain / max(best, 1e-300)))

    @cached_property
    def _weights(self) -> int:
        shapes = {p.layers[0].weight for p in self.pieces if p.layers}
        return max(sum(math.prod(self._view.constant_shape(w)) for w in shapes), 1)

    @property
    def _has_wide_types(self) -> bool:
        """Return True if the network's opset has the types of 16-bit activations."""
        return opset_of(self._state.model) >= self._ctx.target.opset_for(_WIDE, self._ctx.config.storage)

    def rules(self, spares: Iterable[Spare]) -> Rules:
        """Return the options that spare several parts at once."""
        return rules(spares, self._state.plan, self._view, self._ctx.config)

    def _deviation(self, count: int) -> Deviation:
        # No range was chosen on these.
        judged = self._ctx.shares.judged
        samples = self._ctx.samples_of(self._state.plan)
        size = samples.fixed_batch or min(count, samples.micro_batch())
        return Deviation(
            self._state.executed,
            samples,
            judged,
            count,
            self._state.calibration.variance,
            self._ctx.config,
            size,
        )

    def _noise(self, deviation: Deviation, plan: Plan) -> float:
        self._runs += 1
        self._ctx.progress("sensitivity", min(self._runs, self._planned - 1), self._planned)
        marked, stands_for = write(self._state.model, plan, self._state.nearest)
        return deviation(self._ctx.executed(marked, stands_for), stands_for)

    def _plan_of(self, pieces: Iterable[Piece]) -> Plan:
        chosen = list(pieces)
        nodes = {x.node for p in chosen for x in p.layers}
        names = {p.name for p in chosen if p.activation is not None}
        plan = self._state.plan
        return part_of(plan, [x for x in plan.layers if x.node in nodes], names)

    def _pieces(self) -> tuple[Piece, ...]:
        plan, most = self._state.plan, most_bits(self._ctx.target)
        sharing: dict[str, list[Layer]] = defaultdict(list)
        for layer in plan.layers:
            sharing[layer.weight].append(layer)
        read_by = readers(plan, self._view)
        weights = [
            Piece(tuple(own), None, tuple(x.node for x in own), tuple(of_weights(own)))
            for own in sharing.values()
        ]
        inputs = [
            Piece((), q, read_by[q.name], tuple(of_activation(q, read_by[q.name], most)))
            for q in plan.activations
            if q.name in read_by
        ]
        # A tensor that has a fixed range, too, is one part with that.
        known = {p.name for p in inputs}
        inputs += [Piece((), q, q.nodes, tuple(of_dynamic(q))) for q in plan.dynamic if q.name not in known]
        order = {name: k for k, name in enumerate(self._operators)}
        return tuple(sorted([*inputs, *weights], key=lambda p: min(order[n] for n in p.nodes)))

    def _groups(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield patterns of several parts, and the nodes that they select."""
        plan, seen = self._state.plan, set[frozenset[str]]()
        kinds = [*plan.integer_nodes.values(), *(x.op_type for x in plan.layers)]
        patterns = [f"op:{kind}" for kind in dict.fromkeys(kinds)]
        chunks = np.array_split([x.node for x in plan.layers], _NEIGHBOURHOODS)
        patterns += [f"from:{c[0]}..to:{c[-1]}" for c in chunks if len(c) > 1]
        for pattern in patterns:
            try:
                nodes = matching(self._view, pattern)
            except ConfigError:
                continue  # no path leads from the first of these layers to the last
            members = frozenset(p.name for p in self._members(nodes))
            if 1 < len(members) < len(self.pieces) and members not in seen:
                seen.add(members)
                yield pattern, nodes

    def _members(self, nodes: frozenset[str]) -> list[Piece]:
        return [p for p in self.pieces if nodes.issuperset(p.nodes)]

    def _part(self, piece: Piece, noises: Mapping[Piece, float], total: float) -> Part:
        own = noises[piece]
        kind = sum(n for p, n in noises.items() if p.what == piece.what)
        everything = sum(noises.values())
        spare = piece.spares[0]
        # The parts may add up to more or less than the whole: each counts by its share of it.
        gone = own * (1 - spare.left) / everything if everything else 0.0
        operators = dict.fromkeys(self._operators[n] for n in piece.nodes)
        return Part(
            name=piece.name,
            what=piece.what,
            operator=", ".join(operators),
            bits=piece.bits,
            nodes=piece.nodes,
            noise=own,
            share=own / kind if kind else 0.0,
            option=self.rules([spare]).on_command_line,
            left_db=in_decibels(total * (1 - gone)),
        )

    def _group(
        self,
        pattern: str,
        nodes: frozenset[str],
        noises: Mapping[Piece, float],
        noise: Callable[[Iterable[Piece]], float],
    ) -> Group:
        members = self._members(nodes)
        others = [p for p in self.pieces if p not in members]
        narrow = any(p.bits < _FULL for p in members)
        spared = Rules((f"{pattern}=w8a8",)) if narrow else Rules((), (pattern,))
        return Group(
            pattern=pattern,
            parts=len(members),
            noise=noise(members),
            of_members=sum(noises[p] for p in members),
            left_db=in_decibels(noise(others)),
            option=spared.on_command_line,
        )
