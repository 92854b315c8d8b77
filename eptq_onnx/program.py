"""The integer program that chooses how each region is computed: in float or on integers, at which widths.

Let x[k, o] = 1 if region k is computed by its option o. An option reads its inputs in one representation and
produces its outputs in one. If a reader needs another representation than the producer gives, the tensor is
converted step by step (blocked → float → integers → channels last). Let y[t, c, r, s] = 1 if tensor t is
produced as r and reader c needs it as s, and u[t, r, a] = 1 if t, produced as r, goes through step a. Then

- sum over o of x[k, o] = 1;
- sum over s of y[t, c, r, s] = sum of x[k, o] over the options of t's producer k that produce r;
- sum over r of y[t, c, r, s] = sum of x[c, o] over the options of c that read s;
- u[t, r, a] ≥ sum of y[t, c, r, s] over all s whose path from r contains step a, for each c, so that readers
  share conversions;
- a region with a result other than a layer's is on integers only if one of its readers is (`needs`);
- a lone node between integers is an integer kernel, whatever the plan says (`bound`);
- a weight is like a region: its options are widths for integer kernels, widths for regions that compute in
  float on stored integers, and its float values (`eptq_onnx.method.place.joint`);
- what several options share costs once if any of them is taken: v ≥ x[k, o] for each of them (`shared`);
- the bits of a weight and those of an activation multiply: for each option of the one, and each width that
  the other may exceed, v ≥ x[k, o] + sum of x[j, p] over the wider options p of j, minus 1 (`products`).

Each option has a cost in one or more currencies (time, noise, bytes and others). The total of one currency is
minimized, and those of others can be limited. SciPy's MILP solver is exact within its time limit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from eptq_onnx.placement import Representation

TIME, NOISE, BYTES, EXACT = "time", "noise", "bytes", "exact"
"""Currencies; ``exact`` counts the elements of float weights."""
Step = tuple[Representation, Representation]
_GAP, _SMALL = 0.01, 1000
"""Optimality gap, relative, of programs with more variables than that.

Times and noise are not known to a percent, and most of the solver's time goes into the proof of optimality.
"""
_SECONDS = 60.0
"""Time limit of the solver, which then returns the best choice found so far."""


@dataclass(frozen=True)
class Option:
    """A way to compute a region.

    Parameters
    ----------
    reads, makes : Representation
    costs : dict of str to float
        Currency to cost.
    bits : int
        Width of the region's weight; 0 if that is not chosen.
    """

    reads: Representation
    makes: Representation
    costs: Mapping[str, float]
    bits: int = 0

    @property
    def on_integers(self) -> bool:
        """Return True if the region is computed on integers."""
        return self.reads.is_integer


@dataclass(frozen=True)
class Tensor:
    """A tensor between regions.

    Parameters
    ----------
    maker : int or None
        Region that produces it; None for an input of the network.
    readers : tuple of int
        Regions that read it.
    is_output : bool
        True if it is an output of the network.
    steps : dict of Step to float
        Available conversion steps to their seconds.
    """

    maker: int | None
    readers: tuple[int, ...]
    is_output: bool
    steps: Mapping[Step, float]


@dataclass(frozen=True)
class Shared:
    """What several options share.

    Parameters
    ----------
    options : tuple of (int, int)
        Regions and their options.
    costs : dict of str to float
        Currency to cost, which arises once if any of the options is taken.
    """

    options: tuple[tuple[int, int], ...]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Product:
    """What arises if an option is taken along with others.

    Parameters
    ----------
    option : tuple of (int, int)
        A region and its option.
    others : tuple of tuples of (int, int)
        Options of one region each.
    costs : dict of str to float
        Currency to cost, at least 0, which arises if ``option`` is taken and any of the others is.
    """

    option: tuple[int, int]
    others: tuple[tuple[tuple[int, int], ...], ...]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Program:
    """The choice to be made.

    Parameters
    ----------
    options : tuple of tuples of Option
        Options of each region.
    tensors : tuple of Tensor
    needs : tuple of (int, tuple of int)
        A region, and its readers, one of which must be on integers if it is.
    bound : tuple of (int, tuple of int, tuple of int)
        A region, the producers of its inputs, and its readers. The region is on integers if all producers and
        one of the readers are.
    layers : frozenset of int
        Regions of which at least one must be on integers.
    shared : tuple of Shared
    follows : tuple of (option, tuple of option)
        An option, as region and number, and those of which one must be taken if it is.
    products : tuple of Product
    """

    options: tuple[tuple[Option, ...], ...]
    tensors: tuple[Tensor, ...]
    needs: tuple[tuple[int, tuple[int, ...]], ...] = ()
    bound: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
    layers: frozenset[int] = frozenset()
    shared: tuple[Shared, ...] = ()
    follows: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...] = ()
    products: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A solution.

    Parameters
    ----------
    options : tuple of int
        Option of each region.
    amount : float
        Total of the minimized currency.
    conversions : float
        Total seconds of conversions.
    totals : dict of str to float
        Total of every currency.
    """

    options: tuple[int, ...]
    amount: float
    conversions: float
    totals: Mapping[str, float]


def solve(program: Program, currency: str = TIME, limits: Mapping[str, float] | None = None) -> Choice | None:
    """Return the choice that minimizes one currency within limits on others; None if none is found."""
    model = _Model(program, currency)
    for name, limit in (limits or {}).items():
        model.limit(name, limit)
    return model.solve()


def paths(steps: Iterable[tuple[Step, float]]) -> dict[Step, tuple[Step, ...]]:
    """Return the cheapest sequence of steps between each pair of connected representations."""
    known = dict(steps)
    best: dict[Step, tuple[float, tuple[Step, ...]]] = {(r, r): (0.0, ()) for r in Representation}
    best |= {step: (cost, (step,)) for step, cost in known.items()}
    for via in Representation:
        for a in Representation:
            for b in Representation:
                if (a, via) in best and (via, b) in best:
                    cost = best[a, via][0] + best[via, b][0]
                    if (a, b) not in best or cost < best[a, b][0]:
                        best[a, b] = cost, best[a, via][1] + best[via, b][1]
    return {ends: way for ends, (_, way) in best.items()}


@dataclass
class _Model:
    program: Program
    currency: str
    costs: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    """Seconds that each variable adds to the time of conversions."""
    integral: list[int] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        options = self.program.options
        self.x = [[self._variable(o.costs.get(self.currency, 0.0), True) for o in own] for own in options]
        for own in self.x:
            self.rows.append(({v: 1.0 for v in own}, 1, 1))
        for tensor in self.program.tensors:
            self._tensor(tensor)
        for region, others in self.program.needs:
            self._row({**self._integers(region), **_minus(self._all(others))}, high=0)
        for region, makers, readers in self.program.bound:
            for reader in readers:
                around = set(makers) | {reader}
                row = {**self._all(around), **_minus(self._integers(region))}
                self._row(row, high=len(around) - 1)
        if self.program.layers:
            self._row(self._all(self.program.layers), low=1)
        for (follower, option), leaders in self.program.follows:
            before = {self.x[leader][o]: 1.0 for leader, o in leaders}
            self._row({self.x[follower][option]: 1.0, **_minus(before)}, high=0)
        self.shared = [self._variable(s.costs.get(self.currency, 0.0), True) for s in self.program.shared]
        for variable, shared in zip(self.shared, self.program.shared, strict=True):
            for region, option in shared.options:
                self._row({self.x[region][option]: 1.0, variable: -1.0}, high=0)
        self.products = [self._variable(p.costs.get(self.currency, 0.0)) for p in self.program.products]
        for variable, product in zip(self.products, self.program.products, strict=True):
            taken = {self.x[product.option[0]][product.option[1]]: 1.0, variable: -1.0}
            for group in product.others:
                self._row({**taken, **{self.x[k][o]: 1.0 for k, o in group}}, high=1)

    def limit(self, currency: str, amount: float) -> None:
        """Limit the total of a currency."""
        row = self._spent(currency)
        unit = max([*map(abs, row.values()), abs(amount), 1e-30])
        self._row({v: a / unit for v, a in row.items()}, high=amount / unit)

    def _spent(self, currency: str) -> dict[int, float]:
        """Return what each variable costs in a currency."""
        options = self.program.options
        row = {
            v: o.costs.get(currency, 0.0)
            for own, variables in zip(options, self.x, strict=True)
            for o, v in zip(own, variables, strict=True)
        }
        row |= {v: s.costs.get(currency, 0.0) for v, s in zip(self.shared, self.program.shared, strict=True)}
        row |= {
            v: p.costs.get(currency, 0.0) for v, p in zip(self.products, self.program.products, strict=True)
        }
        if currency == TIME:
            row |= {v: s for v, s in enumerate(self.steps) if s}
        return row

    def solve(self) -> Choice | None:
        count = len(self.costs)
        places = [(r, v, a) for r, (row, _, _) in enumerate(self.rows) for v, a in row.items()]
        matrix = coo_array(
            ([a for _, _, a in places], ([r for r, _, _ in places], [v for _, v, _ in places])),
            shape=(len(self.rows), count),
        ).tocsr()
        unit = max([*map(abs, self.costs), 1e-30])
        gap = _GAP if count > _SMALL and self.currency in (TIME, NOISE) else 0.0
        for presolve in (True, False):
            # The presolver of HiGHS takes some programs for infeasible that are not.
            found = milp(
                np.array(self.costs) / unit,
                integrality=np.array(self.integral),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, [r[1] for r in self.rows], [r[2] for r in self.rows]),
                options={"mip_rel_gap": gap, "time_limit": _SECONDS, "presolve": presolve},
            )
            if found.x is not None:
                break
        else:
            return None
        chosen = tuple(int(np.argmax([found.x[v] for v in own])) for own in self.x)
        return Choice(
            chosen,
            float(found.fun * unit),
            float(np.dot(self.steps, found.x)),
            totals_of(self.program, chosen),
        )

    def _variable(self, cost: float, integral: bool = False, step: float = 0.0) -> int:
        self.costs.append(cost)
        self.steps.append(step)
        self.integral.append(int(integral))
        return len(self.costs) - 1

    def _converting(self, seconds: float) -> int:
        return self._variable(seconds if self.currency == TIME else 0.0, step=seconds)

    def _row(self, row: Mapping[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        self.rows.append((dict(row), low, high))

    def _integers(self, region: int) -> dict[int, float]:
        own = zip(self.program.options[region], self.x[region], strict=True)
        return {v: 1.0 for o, v in own if o.on_integers}

    def _all(self, regions: Iterable[int]) -> dict[int, float]:
        return {v: a for k in sorted(set(regions)) for v, a in self._integers(k).items()}

    def _tensor(self, tensor: Tensor) -> None:
        """Add the variables and constraints of a tensor's conversions."""
        made = self._by_representation(tensor, tensor.maker, made=True)
        ways = paths(tensor.steps.items())
        shared: dict[tuple[Representation, Step], int] = {}
        ends: list[int | None] = [*tensor.readers, *([None] if tensor.is_output else [])]
        for reader in ends:
            wanted = self._by_representation(tensor, reader, made=False)
            used: dict[tuple[Representation, Step], dict[int, float]] = defaultdict(dict)
            out: dict[Representation, dict[int, float]] = defaultdict(dict)
            into: dict[Representation, dict[int, float]] = defaultdict(dict)
            for r in made:
                for s in wanted:
                    if (r, s) not in ways:
                        continue
                    y = self._variable(0.0)
                    out[r][y] = into[s][y] = 1.0
                    for step in ways[r, s]:
                        used[r, step][y] = 1.0
            for r, (variables, constant) in made.items():
                self._row({**out[r], **_minus(variables)}, constant, constant)
            for s, (variables, constant) in wanted.items():
                self._row({**into[s], **_minus(variables)}, constant, constant)
            for key, variables in used.items():
                if key not in shared:
                    shared[key] = self._converting(tensor.steps[key[1]])
                self._row({**variables, shared[key]: -1.0}, high=0)
        self._read_again(tensor)

    def _read_again(self, tensor: Tensor) -> None:
        """Add the cost of DequantizeLinear for float readers of a tensor that another reader quantizes.

        All readers then read the quantized values.
        """
        step = (Representation.INTEGERS, Representation.FLOAT)
        if len(tensor.readers) + tensor.is_output < 2 or step not in tensor.steps:
            return
        made = {} if tensor.maker is None else self._integers(tensor.maker)
        w = self._converting(tensor.steps[step])
        for a in tensor.readers:
            others = [self._integers(b) for b in tensor.readers if b != a] + [{}] * tensor.is_output
            for b in others if self._integers(a) else ():
                # w ≥ a on integers − b on integers − maker on integers; an output is never on integers.
                self._row({**self._integers(a), **_minus(b), **_minus(made), w: -1.0}, high=0)

    def _by_representation(
        self, tensor: Tensor, region: int | None, *, made: bool
    ) -> dict[Representation, tuple[dict[int, float], float]]:
        """Return for each representation the variables of a region's options that produce or read it.

        Inputs and outputs of the network are always float, which is a constant instead of a variable.
        """
        if region is None:
            return {Representation.FLOAT: ({}, 1.0)}
        found: dict[Representation, tuple[dict[int, float], float]] = {}
        for option, variable in zip(self.program.options[region], self.x[region], strict=True):
            own = plain(option.makes if made else option.reads, tensor.steps)
            found.setdefault(own, ({}, 0.0))[0][variable] = 1.0
        return found


def plain(representation: Representation, steps: Mapping[Step, float]) -> Representation:
    """Return a representation without its layout if a tensor has no conversions to and from that layout."""
    if any(representation in step for step in steps):
        return representation
    return Representation.INTEGERS if representation.is_integer else Representation.FLOAT


def _minus(row: Mapping[int, float]) -> dict[int, float]:
    return {v: -a for v, a in row.items()}


def totals_of(program: Program, options: Sequence[int]) -> dict[str, float]:
    """Return the total of every currency, computed without the solver.

    Its variables of conversions and of what is shared may be larger than needed in currencies other than the
    one that it minimizes.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    taken = set(enumerate(options))
    costs = [own[o].costs for own, o in zip(program.options, options, strict=True)]
    costs += [s.costs for s in program.shared if taken & set(s.options)]
    costs += [
        p.costs for p in program.products if p.option in taken and any(taken & set(o) for o in p.others)
    ]
    for own in costs:
        for name, cost in own.items():
            totals[name] += cost
    totals[TIME] = cost_of(program, options)
    return dict(totals)


def cost_of(program: Program, options: Sequence[int]) -> float:
    """Return the time of a choice, computed without the solver."""
    total = sum(own[o].costs.get(TIME, 0.0) for own, o in zip(program.options, options, strict=True))
    for tensor in program.tensors:
        ways = paths(tensor.steps.items())
        made = Representation.FLOAT
        if tensor.maker is not None:
            made = plain(program.options[tensor.maker][options[tensor.maker]].makes, tensor.steps)
        read = [program.options[k][options[k]] for k in tensor.readers]
        ends = {plain(o.reads, tensor.steps) for o in read} | (
            {Representation.FLOAT} if tensor.is_output else set()
        )
        steps = {step for end in ends for step in ways[made, end]}
        total += sum(tensor.steps[step] for step in steps)
        forms = {o.on_integers for o in read} | ({False} if tensor.is_output else set())
        maker_on_integers = (
            tensor.maker is not None and program.options[tensor.maker][options[tensor.maker]].on_integers
        )
        if len(tensor.readers) + tensor.is_output > 1 and forms == {True, False} and not maker_on_integers:
            total += tensor.steps.get((Representation.INTEGERS, Representation.FLOAT), 0.0)
    return total
