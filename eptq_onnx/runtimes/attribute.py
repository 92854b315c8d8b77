"""Attribute run time to operators, in float and on integers, and to the conversions between the two.

A runtime fuses operators differently in the two models. Nodes that a kernel of either model computes together
form a region, and only the times of whole regions can be compared. The time of a conversion is attributed to
the tensor that it converts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnx import GraphProto

from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto.bodies import all_nodes
from eptq_onnx.runtimes.base import CONVERSIONS, Model, NodeTime, Verifier, graph_of


@dataclass(frozen=True)
class RegionTime:
    """Time per run of the operators in one region: see the module.

    Parameters
    ----------
    nodes : tuple of str
        Names of their nodes in the float model.
    float_seconds, quantized_seconds : float
    kernels : tuple of str
        Kernels that run in the quantized model, with their precision, such as ``QLinearConv uint8``.
    """

    nodes: tuple[str, ...]
    float_seconds: float
    quantized_seconds: float
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class BorderTime:
    """Time per run of a tensor's conversions, by kind: see `CONVERSIONS`.

    Parameters
    ----------
    tensor : str
        Name of the float tensor; empty for conversions of unknown tensors.
    float_seconds, quantized_seconds : dict of str to float
        Seconds in the float and in the quantized model, by kind.
    """

    tensor: str
    float_seconds: dict[str, float]
    quantized_seconds: dict[str, float]


@dataclass(frozen=True)
class Attribution:
    """Where each model spends its time.

    Parameters
    ----------
    regions : tuple of RegionTime
        Largest increase first.
    borders : tuple of BorderTime
        Largest increase first.
    float_rest, quantized_rest : dict of str to float
        Seconds in kernels whose nodes the runtime does not name, by kernel.
    """

    regions: tuple[RegionTime, ...]
    borders: tuple[BorderTime, ...]
    float_rest: dict[str, float]
    quantized_rest: dict[str, float]

    @property
    def avoidable(self) -> float:
        """Return by how much regions and tensors exceed their float times, as a share of the quantized time.

        No choice between float and integers can save more, other kernels being equal.
        """
        spent = [(r.float_seconds, r.quantized_seconds) for r in self.regions]
        spent += [(sum(b.float_seconds.values()), sum(b.quantized_seconds.values())) for b in self.borders]
        total = sum(q for _, q in spent) + sum(self.quantized_rest.values())
        return sum(max(0.0, q - f) for f, q in spent) / max(total, 1e-30)

    def region_of(self, node: str) -> RegionTime | None:
        """Return the region of a float model's node; None if no kernel computes it, such as a constant."""
        return next((region for region in self.regions if node in region.nodes), None)


def attribute(
    verifier: Verifier,
    pair: tuple[Model, Model],
    feeds: Feeds,
    names: Mapping[str, str] | None = None,
    threads: int = 1,
) -> Attribution:
    """Profile a float model and its quantized form, and compare them operator by operator.

    Parameters
    ----------
    verifier : Verifier
    pair : tuple of two models
        The float model and the quantized one.
    feeds : dict of str to ndarray
    names : dict of str to str, optional
        Node of the quantized model to its counterpart in the float model; by default the node that has the
        same name or makes the same first output.
    threads : int

    Raises
    ------
    ModelError
        If the runtime rejects a model.
    CapabilityError
        If the runtime cannot time nodes.
    """
    exact, quantized = (verifier.profile(model, feeds, threads) for model in pair)
    return joined(exact, quantized, same_nodes(*map(graph_of, pair)) if names is None else names)


def same_nodes(graph: GraphProto, quantized: GraphProto) -> dict[str, str]:
    """Return the nodes of a quantized graph whose names differ in the float graph, with the float names.

    Nodes are matched by their first output, which also stands in for a missing name.
    """
    made = {n.output[0]: n.name or n.output[0] for n in all_nodes(graph) if n.output}
    names = set(made.values())
    return {
        n.name: made[n.output[0]]
        for n in all_nodes(quantized)
        if n.name not in names and n.output and n.output[0] in made
    }


def joined(
    exact: Sequence[NodeTime], quantized: Sequence[NodeTime], names: Mapping[str, str] | None = None
) -> Attribution:
    """Join two profiles; see `attribute`."""
    sides = (_claims(exact, {}), _claims(quantized, names or {}))
    regions = _Regions()
    for claims in sides:
        for nodes, _ in claims:
            regions.unite(nodes)
    seconds = [[0.0, 0.0] for _ in regions.found]
    kernels: list[list[str]] = [[] for _ in regions.found]
    for k, claims in enumerate(sides):
        for nodes, time in claims:
            place = regions.place[nodes[0]]
            seconds[place][k] += time.seconds
            if k:
                kernels[place].append(f"{time.kernel.kernel} {time.kernel.precision}".strip())
    rows = [
        RegionTime(tuple(nodes), spent[0], spent[1], tuple(dict.fromkeys(run)))
        for nodes, spent, run in zip(regions.found, seconds, kernels, strict=True)
        if nodes
    ]
    return Attribution(
        tuple(sorted(rows, key=lambda r: r.float_seconds - r.quantized_seconds)),
        _borders(exact, quantized),
        _rest(exact),
        _rest(quantized),
    )


def _claims(times: Iterable[NodeTime], names: Mapping[str, str]) -> list[tuple[tuple[str, ...], NodeTime]]:
    """Return each kernel other than conversions, with the nodes that it computes.

    A node that several kernels claim, such as a shape that they share, belongs to none of them, unless a
    kernel computes nothing else.
    """
    known = [(tuple(names.get(n, n) for n in t.kernel.stands_for), t) for t in times]
    counts = Counter(name for nodes, _ in known for name in set(nodes))
    return [
        (tuple(n for n in nodes if counts[n] == 1) or nodes, t)
        for nodes, t in known
        if nodes and t.kernel.operator not in CONVERSIONS
    ]


class _Regions:
    """Disjoint sets of nodes, merged as kernels are added."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []
        self.place: dict[str, int] = {}

    def unite(self, nodes: Sequence[str]) -> None:
        """Merge the regions of some nodes into one."""
        places = {self.place[n] for n in nodes if n in self.place}
        target = min(places, default=len(self.found))
        if target == len(self.found):
            self.found.append([])
        moved = [n for place in sorted(places - {target}) for n in self.found[place]]
        for place in places - {target}:
            self.found[place] = []
        own = self.found[target]
        own.extend(dict.fromkeys(n for n in (*moved, *nodes) if n not in own))
        self.place.update(dict.fromkeys(own, target))


def _borders(exact: Iterable[NodeTime], quantized: Iterable[NodeTime]) -> tuple[BorderTime, ...]:
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = defaultdict(lambda: ({}, {}))
    for k, times in enumerate((exact, quantized)):
        for time in times:
            kind = time.kernel.operator
            if kind in CONVERSIONS:
                spent = found[time.kernel.border][k]
                spent[kind] = spent.get(kind, 0.0) + time.seconds
    rows = [BorderTime(tensor, *spent) for tensor, spent in found.items()]
    return tuple(
        sorted(rows, key=lambda b: sum(b.float_seconds.values()) - sum(b.quantized_seconds.values()))
    )


def _rest(times: Iterable[NodeTime]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for time in times:
        if not time.kernel.stands_for and time.kernel.operator not in CONVERSIONS:
            found[time.kernel.kernel] += time.seconds
    return dict(found)
