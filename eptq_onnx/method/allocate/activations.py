"""Choose the widths of activations by the integer program that chooses those of weights.

Each quantizer is tried alone, in the float network, at every candidate width of at most 8 bits; if there are
more quantizers than runs, loud groups of neighbours are halved. At 16 bits, where hardly anything is left,
all are tried at once. What single quantizers cause is scaled so that it adds up to what all cause together.

The width is that of a tensor, and an operator with an activation of 16 bits computes with 16; see
`eptq_onnx.method.plan.wide`. So the bits that a layer multiplies by are those of its input, or 16 if its
output has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from eptq_onnx.config import BudgetUnit
from eptq_onnx.graph.file_count import FileSizes
from eptq_onnx.method.allocate.choice import Goal, limits_of, program_of, unmet
from eptq_onnx.method.allocate.effects import Candidates
from eptq_onnx.numerics.halving import alone
from eptq_onnx.placement import FrontPoint, Representation
from eptq_onnx.program import NOISE, Option, Product, Program
from eptq_onnx.program import solve as least_of
from eptq_onnx.records import FULL_BITS

_UNIT = BudgetUnit.ACTIVATIONS.value
_POINTS = 9
"""Mean bits at which the least noise is reported."""
_ON = Representation.INTEGERS
_CONVERSION, _CLIP = 200, 100
"""Bytes of the nodes that an activation takes beside those of 8 bits, at about.

With 16 bits, some of its neighbours are converted; with fewer than 8, its integers are clipped.
"""


@dataclass(frozen=True)
class Activation:
    """Candidate widths of activations with one scale.

    Parameters
    ----------
    values : float
        Values of one sample.
    effects : dict of int to float
        Bit width to the noise it causes at the outputs.
    """

    values: float
    effects: Mapping[int, float]


@dataclass(frozen=True)
class Work:
    """What a layer on integers multiplies.

    Parameters
    ----------
    weight : str
    multiplications : float
        Of one sample.
    reads, writes : str
        Quantizers of its input and output; ``writes`` is empty if the output has none.
    """

    weight: str
    multiplications: float
    reads: str
    writes: str = ""


def measured(
    candidates: Mapping[str, Sequence[int]],
    values: Mapping[str, float],
    noise: Callable[[Sequence[str], int], float] | None,
    runs: int,
) -> dict[str, Activation]:
    """Return the noise of every width of every quantizer.

    Parameters
    ----------
    candidates : mapping of str to sequence of int
        Quantizer to its widths.
    values : mapping of str to float
        Quantizer to its values of one sample.
    noise : callable or None
        Returns the noise of some quantizers at a width, where each has the nearest width that it can have;
        None if no output can be compared.
    runs : int
        How often it may be called, at about.
    """
    names, widths = list(candidates), sorted({b for own in candidates.values() for b in own})
    by_width: dict[int, dict[str, float]] = {}
    narrow = [bits for bits in widths if bits <= FULL_BITS]
    for bits in widths:
        if noise is None:
            by_width[bits] = {name: values[name] * 4.0**-bits for name in names}
            continue
        together = noise(names, bits)
        if bits in narrow:
            share = max(runs // len(narrow) - 1, 1)
            own = alone(names, partial(_at, noise, bits), share)
        else:
            own = list(by_width[narrow[-1]].values()) if narrow else [1.0] * len(names)
        own = own if sum(own) > 0 else [1.0] * len(names)
        unit = together / max(sum(own), 1e-30)
        by_width[bits] = {name: unit * one for name, one in zip(names, own, strict=True)}
    return {
        name: Activation(values[name], {bits: by_width[bits][name] for bits in own})
        for name, own in candidates.items()
    }


def _at(noise: Callable[[Sequence[str], int], float], bits: int, names: Sequence[str]) -> float:
    return noise(names, bits)


def widths_of(
    activations: Mapping[str, Activation],
    weights: Mapping[str, Candidates],
    works: Sequence[Work],
    goal: Goal,
    sizes: FileSizes,
) -> dict[str, int]:
    """Return the widths of activations that meet a goal along with the best widths of weights.

    Parameters
    ----------
    activations : mapping of str to Activation
    weights : mapping of str to Candidates
        Empty if their widths are not chosen.
    works : sequence of Work
    goal : Goal
        Its noise of activations is 0.
    sizes : FileSizes

    Raises
    ------
    ConfigError
        If no choice keeps within the limits.
    """
    program = joint_program(activations, weights, works, sizes)
    found = least_of(program, goal.minimized, limits_of(goal, sizes))
    if found is None:
        raise unmet(program, goal, sizes)
    return _widths(activations, program, found.options)


def joint_program(
    activations: Mapping[str, Activation],
    weights: Mapping[str, Candidates],
    works: Sequence[Work],
    sizes: FileSizes,
) -> Program:
    """Return the program whose regions are weights, and activations behind them; see `widths_of`."""
    least: dict[str, float] = dict.fromkeys(weights, 0.0)
    for work in works if weights else ():
        least[work.weight] += work.multiplications * min(activations[work.reads].effects)
    own = {name: replace(weight, operations=least[name]) for name, weight in weights.items()}
    program = program_of(own, sizes) if weights else Program((), ())
    total = sum(a.values for a in activations.values())
    options = tuple(
        tuple(Option(_ON, _ON, _costs(a, bits, total), bits) for bits in a.effects)
        for a in activations.values()
    )
    whole = replace(program, options=program.options + options)
    place = {name: k for k, name in enumerate((*weights, *activations))}
    return replace(whole, products=tuple(_products(whole, place, activations, works if weights else ())))


def _costs(activation: Activation, bits: int, total: float) -> dict[str, float]:
    """Return what a width costs, given the values of all activations."""
    nodes = _CONVERSION if bits > FULL_BITS else _CLIP if bits < FULL_BITS else 0
    mean = activation.values * bits / max(total, 1e-30)
    return {NOISE: activation.effects[bits], _UNIT: mean, BudgetUnit.BYTES.value: float(nodes)}


def _products(
    program: Program, place: Mapping[str, int], activations: Mapping[str, Activation], works: Sequence[Work]
) -> Iterator[Product]:
    """Yield the multiplications by bits of activations beyond the fewest that they may have."""
    for work in works:
        writes = work.writes if work.writes in activations else ""
        steps = sorted({*activations[work.reads].effects, *_wide(activations, writes)})
        for before, bits in itertools.pairwise(steps):
            ends = (work.reads, *([writes] if bits > FULL_BITS and writes else []))
            wider = [
                tuple((place[e], o) for o, x in enumerate(program.options[place[e]]) if x.bits >= bits)
                for e in dict.fromkeys(ends)
            ]
            more = work.multiplications * (bits - before)
            for o, weight in enumerate(program.options[place[work.weight]]):
                costs = {BudgetUnit.BITOPS.value: more * weight.bits}
                yield Product((place[work.weight], o), tuple(filter(None, wider)), costs)


def _wide(activations: Mapping[str, Activation], name: str) -> list[int]:
    return [bits for bits in activations[name].effects if bits > FULL_BITS] if name else []


def operations(works: Sequence[Work], widths: Mapping[str, int]) -> dict[str, float]:
    """Return the multiplications of each weight, times the bits of the activations."""
    found: dict[str, float] = {}
    for work in works:
        bits = widths[work.reads]
        if widths.get(work.writes, 0) > FULL_BITS:
            bits = max(bits, widths[work.writes])
        found[work.weight] = found.get(work.weight, 0.0) + work.multiplications * bits
    return found


def front_of_activations(
    activations: Mapping[str, Activation], widths: Mapping[str, int]
) -> tuple[FrontPoint, ...]:
    """Return the least noise at several mean bits, from the fewest to the most.

    Parameters
    ----------
    activations : mapping of str to Activation
    widths : mapping of str to int
        The choice that was taken, which is one of the points.
    """
    program = joint_program(activations, {}, (), FileSizes(0, {}, {}))
    fewest, most = (
        mean_bits(activations, {n: end(a.effects) for n, a in activations.items()}) for end in (min, max)
    )
    points: dict[tuple[int, ...], bool] = {}
    for amount in np.linspace(fewest, most, _POINTS):
        found = least_of(program, NOISE, {_UNIT: float(amount) * (1 + 1e-9)})
        if found is not None:
            points[tuple(_widths(activations, program, found.options).values())] = False
    points[tuple(widths[name] for name in activations)] = True
    front = []
    for bits, chosen in points.items():
        own = dict(zip(activations, bits, strict=True))
        noise = sum(activations[name].effects[b] for name, b in own.items())
        front.append(FrontPoint(noise, activation_bits=mean_bits(activations, own), chosen=chosen))
    return tuple(sorted(front, key=lambda point: (point.activation_bits or 0.0, -point.noise)))


def mean_bits(activations: Mapping[str, Activation], widths: Mapping[str, int]) -> float:
    """Return the mean bits of a value."""
    total = sum(a.values for a in activations.values())
    return sum(a.values * widths[name] for name, a in activations.items()) / max(total, 1e-30)


def _widths(
    activations: Mapping[str, Activation], program: Program, options: Sequence[int]
) -> dict[str, int]:
    first = len(program.options) - len(activations)
    own = zip(activations, program.options[first:], options[first:], strict=True)
    return {name: choices[o].bits for name, choices, o in own}
