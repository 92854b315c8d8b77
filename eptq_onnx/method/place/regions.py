"""Cut a planned network into regions, each of which is either float or on integers as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops import Role, spec_of
from eptq_onnx.records import Plan

_FUSED = frozenset({"LeakyRelu", "Sigmoid"})
"""Activation functions that runtimes fuse into the float convolution before them."""


@dataclass(frozen=True)
class Region:
    """Nodes that are either all float or all on integers.

    Parameters
    ----------
    nodes : tuple of str
        In topological order.
    operators : str
        Their operators, joined by "+".
    movable : bool
        False if the plan keeps the nodes float.
    """

    nodes: tuple[str, ...]
    operators: str
    movable: bool


@dataclass(frozen=True)
class Link:
    """A float tensor between regions.

    Parameters
    ----------
    tensor : str
    maker : int or None
        Region that produces it; None for an input of the network.
    readers : tuple of int
        Regions that read it.
    is_output : bool
        True if it is an output of the network.
    """

    tensor: str
    maker: int | None
    readers: tuple[int, ...]
    is_output: bool


@dataclass(frozen=True)
class Regions:
    """A network as regions and the tensors between them.

    Parameters
    ----------
    regions : tuple of Region
        In the order of their last nodes.
    links : tuple of Link
    needs : tuple of (int, tuple of int)
        A region with a result that is not a layer's, and the readers of such results. If the region is on
        integers, at least one reader must be, because nothing would use the integers otherwise.
    bound : tuple of (int, tuple of int, tuple of int)
        A region of a single node that is not a layer, the producers of its inputs, and its readers. Between
        integers, the runtime matches the pattern of an integer kernel, whatever the plan says.
    layers : frozenset of int
        Regions with a constant weight.
    """

    regions: tuple[Region, ...]
    links: tuple[Link, ...]
    needs: tuple[tuple[int, tuple[int, ...]], ...]
    bound: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    layers: frozenset[int]


def regions_of(view: GraphView, plan: Plan) -> Regions:
    """Return the regions of a planned network."""
    joined = _joined(view, plan)
    members: dict[str, list[NodeProto]] = defaultdict(list)
    for node in view.nodes:
        members[joined[node.name]].append(node)
    last = {n.name: k for k, n in enumerate(view.nodes)}
    groups = sorted(members.values(), key=lambda nodes: last[nodes[-1].name])
    regions = tuple(
        Region(
            tuple(n.name for n in nodes),
            "+".join(n.op_type for n in nodes),
            any(n.name in plan.integer_nodes for n in nodes),
        )
        for nodes in groups
    )
    place = {n.name: k for k, nodes in enumerate(groups) for n in nodes}
    weighted = {layer.node for layer in plan.static_layers}
    links, layers = _links(view, place), frozenset(place[name] for name in weighted)
    return Regions(
        regions,
        links,
        _needs(view, groups, place, regions, weighted),
        _bound(regions, links, layers),
        # Stored weights and dynamic layers are worth a file without any other layer on integers.
        frozenset() if plan.held or plan.dynamic else layers,
    )


def _joined(view: GraphView, plan: Plan) -> dict[str, str]:
    """Return for each node the name of the first node in its region."""
    first: dict[str, str] = {}
    for node in view.nodes:
        first[node.name] = node.name
        before = _joins(node, view, plan)
        if before:
            root, *others = dict.fromkeys(first[b.name] for b in before)
            for name, found in first.items():
                if found in others:
                    first[name] = root
            first[node.name] = root
    return first


def _joins(node: NodeProto, view: GraphView, plan: Plan) -> list[NodeProto]:
    """Return the producers of a node's inputs that the runtime computes together with it."""
    makers = [view.producer.get(i) for i in node.input]
    own = [m for m in makers if m is not None and _is_private(m.output[0], node, view)]
    if spec_of(node).role is Role.CLIPPING:
        return [
            m for m in own if m.output[0] == node.input[0] and m.name in {*plan.integer_nodes, *plan.absorbed}
        ]
    alike = [m for m in own if (m.name in plan.integer_nodes) == (node.name in plan.integer_nodes)]
    if node.op_type == "Mul":
        # SiLU: x * Sigmoid(x).
        return [m for m in alike if m.op_type == "Sigmoid" and m.input[0] in node.input]
    return [m for m in alike if node.op_type in _FUSED and m.op_type == "Conv"]


def _is_private(tensor: str, reader: NodeProto, view: GraphView) -> bool:
    return tensor not in view.outputs and [n.name for n in view.consumers[tensor]] == [reader.name]


def _links(view: GraphView, place: dict[str, int]) -> tuple[Link, ...]:
    links = []
    for tensor in [*view.inputs, *(o for n in view.nodes for o in n.output if o)]:
        maker = place[view.producer[tensor].name] if tensor in view.producer else None
        readers = dict.fromkeys(place[n.name] for n in view.consumers[tensor])
        outside = tuple(k for k in readers if k != maker)
        if view.is_float(tensor) and (outside or tensor in view.outputs):
            links.append(Link(tensor, maker, outside, tensor in view.outputs))
    return tuple(links)


def _needs(
    view: GraphView,
    groups: Sequence[Sequence[NodeProto]],
    place: dict[str, int],
    regions: Sequence[Region],
    weighted: set[str],
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found = []
    for k, nodes in enumerate(groups):
        if not regions[k].movable:
            continue
        makers = {o: n for n in nodes for o in n.output if o}
        for tensor, maker in makers.items():
            source = maker
            while spec_of(source).role is Role.CLIPPING and source.input[0] in makers:
                source = makers[source.input[0]]
            inside = any(place[n.name] == k for n in view.consumers[tensor])
            if inside or source.name in weighted:
                continue
            readers = dict.fromkeys(
                place[n.name]
                for n in view.consumers[tensor]
                if tensor in spec_of(n).data_inputs(n) and regions[place[n.name]].movable
            )
            found.append((k, tuple(readers)))
    # A node with several results needs only one reader on integers, of any of them.
    needs: dict[int, dict[int, None]] = defaultdict(dict)
    for k, readers_of in found:
        needs[k].update(dict.fromkeys(readers_of))
    return tuple((k, tuple(readers)) for k, readers in needs.items())


def _bound(
    regions: Sequence[Region], links: Sequence[Link], layers: frozenset[int]
) -> tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]:
    found = []
    for k, region in enumerate(regions):
        makers = [x.maker for x in links if k in x.readers]
        readers = tuple(dict.fromkeys(r for x in links if x.maker == k for r in x.readers))
        known = tuple(dict.fromkeys(m for m in makers if m is not None and regions[m].movable))
        if region.movable and len(region.nodes) == 1 and k not in layers and len(known) == len(set(makers)):
            found.append((k, known, tuple(r for r in readers if regions[r].movable)))
    return tuple(found)
