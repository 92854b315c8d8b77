"""Choose the widths of weights by an integer program; see `eptq_onnx.method.allocate`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from eptq_onnx.config import Budget, BudgetUnit
from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.file_count import FileSizes
from eptq_onnx.method.allocate.effects import Candidates
from eptq_onnx.placement import FrontPoint, InFloat, Representation
from eptq_onnx.program import BYTES, EXACT, NOISE, Option, Program, Shared
from eptq_onnx.program import solve as least_of
from eptq_onnx.records import Plan
from eptq_onnx.targets import Target

_FLOAT, _ON = Representation.FLOAT, Representation.INTEGERS
_POINTS = 9
"""Sizes of the file at which the least noise is reported."""


@dataclass(frozen=True)
class Goal:
    """What widths are chosen for.

    Parameters
    ----------
    minimized : str
        ``noise`` or ``bytes``.
    budgets : tuple of Budget
        Limits that the user gave.
    most_noise : float, optional
        Limit of the noise of weights and activations together.
    activation_noise : float
        What quantized activations cause of it.
    """

    minimized: str
    budgets: tuple[Budget, ...] = ()
    most_noise: float = math.inf
    activation_noise: float = 0.0

    @property
    def other_limits(self) -> dict[str, float]:
        """Return the limit of the weights' noise, if there is one."""
        left = self.most_noise - self.activation_noise
        return {NOISE: left} if math.isfinite(left) else {}

    @property
    def bytes(self) -> int | None:
        """Return the limit of the file's bytes, if there is one."""
        return next((int(b.amount) for b in self.budgets if b.unit is BudgetUnit.BYTES), None)

    @property
    def counts_bytes(self) -> bool:
        """True if the bytes of the file are minimized or limited."""
        return self.minimized == BYTES or self.bytes is not None

    def with_bytes(self, amount: int | None) -> Goal:
        """Return the goal with another limit of the file's bytes, or without one."""
        others = tuple(b for b in self.budgets if b.unit is not BudgetUnit.BYTES)
        own = () if amount is None else (Budget(unit=BudgetUnit.BYTES, amount=amount),)
        return replace(self, budgets=(*own, *others))


def with_widths(plan: Plan, widths: Mapping[str, int], target: Target) -> Plan:
    """Return a plan whose weights have other widths."""
    layers = (
        replace(
            x, weight_spec=target.of(x.op_type).weight_spec(widths[x.weight], x.weight_spec.axis, x.depthwise)
        )
        for x in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def program_of(
    weights: Mapping[str, Candidates],
    sizes: FileSizes,
    in_float: Mapping[str, InFloat] | None = None,
    mean: float = 0.0,
) -> Program:
    """Return the integer program whose regions are weights, with their widths as options.

    What the file has besides weights and the tables of their widths counts in no option.

    Parameters
    ----------
    weights : mapping of str to Candidates
    sizes : FileSizes
    in_float : mapping of str to InFloat, optional
        Weights whose layers may compute in float, on float values or on stored integers.
    mean : float
        Bits at which a float weight counts, so that it does not change whether the others keep within a
        limit of that many mean bits.
    """
    total = sum(w.size for w in weights.values())

    def at(name: str, bits: int, place: Representation, more: int = 0) -> Option:
        """Return the option of a width, for layers that compute in float or on integers."""
        weight = weights[name]
        costs = {
            NOISE: weight.effects[bits],
            BudgetUnit.BYTES.value: float(sizes.weights[name][bits] + more),
            BudgetUnit.WEIGHTS.value: weight.size * bits / total,
            BudgetUnit.BITOPS.value: weight.operations * bits if place is _ON else 0.0,
        }
        return Option(place, place, costs, bits)

    def exact(name: str, count: int) -> Option:
        """Return the option of float values."""
        costs = {
            NOISE: 0.0,
            EXACT: float(weights[name].size),
            BudgetUnit.BYTES.value: float(count),
            BudgetUnit.WEIGHTS.value: weights[name].size * mean / total,
            BudgetUnit.BITOPS.value: 0.0,
        }
        return Option(_FLOAT, _FLOAT, costs)

    def floats(name: str, widths: Iterable[int]) -> Iterator[Option]:
        own = (in_float or {}).get(name)
        if own is not None:
            yield exact(name, own.exact)
            if own.stored is not None:
                yield from (at(name, bits, _FLOAT, own.stored) for bits in widths)

    options = tuple(
        (*floats(name, weight.effects), *(at(name, bits, _ON) for bits in weight.effects))
        for name, weight in weights.items()
    )
    shared = []
    for width, count in sizes.shared.items():
        users = [(k, o) for k, own in enumerate(options) for o, x in enumerate(own) if x.bits == width]
        if users:
            shared.append(Shared(tuple(users), {BudgetUnit.BYTES.value: float(count)}))
    return Program(options, (), shared=tuple(shared))


def solve(weights: Mapping[str, Candidates], goal: Goal, sizes: FileSizes) -> dict[str, int]:
    """Return the widths that meet the goal.

    Raises
    ------
    ConfigError
        If no choice keeps within the limits.
    """
    program = program_of(weights, sizes)
    found = least_of(program, goal.minimized, limits_of(goal, sizes))
    if found is None:
        raise unmet(program, goal, sizes)
    return {name: own[o].bits for name, own, o in zip(weights, program.options, found.options, strict=True)}


def keeps_within(weights: Mapping[str, Candidates], goal: Goal, widths: Mapping[str, int]) -> bool:
    """Return True if widths keep within the budgets, but for that of bytes."""
    total = sum(w.size for w in weights.values())
    spent = {
        BudgetUnit.WEIGHTS: sum(w.size * widths[name] for name, w in weights.items()) / total,
        BudgetUnit.BITOPS: sum(w.operations * widths[name] for name, w in weights.items()),
    }
    return all(spent.get(b.unit, 0.0) <= b.amount for b in goal.budgets)


def limits_of(goal: Goal, sizes: FileSizes) -> dict[str, float]:
    """Return the limits on what is chosen, by currency."""
    limits = {**{b.unit.value: b.amount for b in goal.budgets}, **goal.other_limits}
    rest = {BudgetUnit.BYTES.value: float(sizes.rest)}
    return {name: amount - rest.get(name, 0.0) for name, amount in limits.items()}


def unmet(program: Program, goal: Goal, sizes: FileSizes) -> ConfigError:
    """Return the error for the first limit that no choice meets alone, or for all together."""
    for budget in goal.budgets:
        found = least_of(program, budget.unit.value)
        smallest = min(
            (x.bits for own in program.options for x in own if x.bits and budget.unit.value in x.costs),
            default=0,
        )
        is_bytes = budget.unit is BudgetUnit.BYTES
        least = (0.0 if found is None else found.amount) + (sizes.rest if is_bytes else 0)
        if least > budget.amount:
            amount = f"{math.ceil(least - 1e-6)}" if is_bytes else f"{least:.4g}"
            return ConfigError(
                f"option budget={budget} cannot be met: the smallest widths ({smallest} bits) "
                f"take {budget.unit.value}={amount}; give at least that."
            )
    noise = least_of(program, NOISE)
    both = any(BudgetUnit.ACTIVATIONS.value in x.costs for own in program.options for x in own)
    what = "weights and activations" if both else "weights"
    if noise is not None and noise.amount > goal.other_limits.get(NOISE, math.inf):
        return ConfigError(
            f"option max_noise={goal.most_noise:g} leaves {what} a noise of "
            f"{max(goal.other_limits[NOISE], 0.0):.2g} of the outputs' power, and the largest widths cause "
            f"{noise.amount:.2g}: give more, or leave objective={goal.minimized} out."
        )
    given = ", ".join([*map(str, goal.budgets), *(f"noise={a:.2g}" for a in goal.other_limits.values())])
    return ConfigError(f"the limits {given} cannot be met together: raise one of them.")


def front_of(
    weights: Mapping[str, Candidates], sizes: FileSizes, widths: Mapping[str, int]
) -> tuple[FrontPoint, ...]:
    """Return the least noise at several sizes of the file, from the smallest to that of the least noise.

    Parameters
    ----------
    weights : mapping of str to Candidates
    sizes : FileSizes
    widths : mapping of str to int
        The choice that was taken, which is one of the points.
    """
    program, unit = program_of(weights, sizes), BudgetUnit.BYTES.value
    smallest, quietest = least_of(program, unit), least_of(program, NOISE)
    points: dict[tuple[int, ...], bool] = {}
    if smallest is not None and quietest is not None:
        for amount in np.linspace(smallest.totals[unit], quietest.totals[unit], _POINTS):
            found = least_of(program, NOISE, {unit: float(amount)})
            if found is not None:
                points[tuple(own[o].bits for own, o in zip(program.options, found.options, strict=True))] = (
                    False
                )
    points[tuple(widths[name] for name in weights)] = True
    total = sum(w.size for w in weights.values())
    front = []
    for bits, chosen in points.items():
        own = dict(zip(weights, bits, strict=True))
        noise = sum(weights[name].effects[b] for name, b in own.items())
        mean = sum(weights[name].size * b for name, b in own.items()) / total
        front.append(FrontPoint(noise, bytes=sizes.total(own), bits=mean, chosen=chosen))
    return tuple(sorted(front, key=lambda point: (point.bytes or 0, -point.noise)))
