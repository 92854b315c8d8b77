"""Choice between plain and blocked layout for each node, so that the fewest elements are reordered.

Tensors between nodes of different layouts have to be reordered, once for all consumers in the other layout.
The nodes are split into the two sides of a minimum cut whose capacities are the sizes of these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from eptq_onnx.graph.view import GraphView
from eptq_onnx.proto.bodies import node_reads


@dataclass(frozen=True)
class Form:
    """The blocked form of a node.

    Parameters
    ----------
    write : callable
        Adds the nodes.
    reads, makes : tuple of str
        Inputs and outputs in blocked layout.
    always : bool
        True if the form is worth any reordering.
    """

    write: Callable[[], None]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    always: bool = False


def least_reordered(view: GraphView, forms: Sequence[Form | None]) -> list[bool]:
    """Return for each node whether to compute its blocked form, by a minimum cut.

    Parameters
    ----------
    view : GraphView
    forms : sequence of Form or None
        The blocked form of each node of the graph, if it has one.
    """
    if not any(form is not None and form.always for form in forms):
        return [False] * len(forms)
    blocked, plain = 0, 1
    place = [plain if form is None else blocked if form.always else k + 2 for k, form in enumerate(forms)]
    makers = {name: place[k] for k, form in enumerate(forms) if form is not None for name in form.makes}
    readers: dict[str, set[int]] = {}
    for k, (node, form) in enumerate(zip(view.nodes, forms, strict=True)):
        for name in node_reads(node):
            readers.setdefault(name, set()).add(
                place[k] if form is not None and name in form.reads else plain
            )
    for name in view.outputs:
        readers.setdefault(name, set()).add(plain)
    crossing = [name for name, sides in readers.items() if sides != {makers.get(name, plain)}]
    if not crossing:
        return [side == blocked for side in place]
    sizes = {name: math.prod(view.static_shape(name) or (1,)) for name in crossing}
    unit = max(1, sum(sizes.values()) >> 28)
    most = np.iinfo(np.int32).max >> 1
    edges: dict[tuple[int, int], int] = {}
    fresh = len(forms) + 2
    for name, size in sizes.items():
        maker = makers.get(name, plain)
        # onnxruntime reorders float tensors only.
        cost = (
            1 + size // unit if view.elem_type(name) in (TensorProto.FLOAT, TensorProto.UNDEFINED) else most
        )
        # The cost counts once for all readers in the other layout, whichever layout the producer has.
        for side in readers[name]:
            edges[fresh, side] = edges[side, fresh + 1] = most
        edges[maker, fresh] = edges[fresh + 1, maker] = cost
        fresh += 2
    rows, columns = np.array(list(edges)).T
    capacities = csr_array((np.array(list(edges.values()), np.int32), (rows, columns)), shape=(fresh, fresh))
    left = capacities - maximum_flow(capacities, blocked, plain).flow
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, blocked, return_predecessors=False).tolist())
    return [side in reached for side in place]
