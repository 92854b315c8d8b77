"""Recording of random draws and choices by value in the float network, and replay in every version of it.

Two networks can be compared row by row only if both draw the same numbers and choose the same rows in the
same order. A node that draws (RandomNormalLike) or chooses (TopK, NonZero) is replaced by inputs with its
results for each sample:

    TopK(x, k) → values, indices    becomes
    GatherElements(x, recorded indices) → values, Identity(recorded indices) → indices

The node's tensors keep their names, and gradients pass where the node has them. The tensor that a choice is
made from becomes an output, as an error there may change the choice when the network chooses for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, attribute, int_attribute
from eptq_onnx.proto.bodies import all_names, all_nodes, subgraphs

RANDOM = (
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
"""Operators that always draw random numbers; Dropout draws in training mode only."""
_PREFIX = "recorded/"
_INTEGERS = {
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT16,
    TensorProto.UINT16,
    TensorProto.INT32,
    TensorProto.INT64,
}


@dataclass(frozen=True)
class Recorded:
    """Which outputs of an operator are recorded, and how the others follow from them.

    Parameters
    ----------
    draws : bool
        True for random numbers; False for a choice by value.
    outputs : tuple of int
        Positions of the outputs that are recorded, whether the model names them or not.
    inputs : tuple of int
        Positions of inputs that are recorded instead of outputs, such as the condition of an If. The node
        stays.
    rest : callable, optional
        (node, recorded tensors by position, builder); adds nodes that compute the other outputs.
    orders : bool
        True if rows are chosen, so that their number and order depend on values.
    applies : callable
        (node, view) to True if this particular node draws or chooses at all.
    """

    draws: bool
    outputs: tuple[int, ...] = (0,)
    rest: Callable[[NodeProto, Mapping[int, str], edit.Builder], None] | None = None
    inputs: tuple[int, ...] = ()
    orders: bool = False
    applies: Callable[[NodeProto, GraphView], bool] = lambda node, view: True


RuleOf = Callable[[NodeProto], Recorded | None]


# ---- rules of single operators -----------------------------------------------------------------------------
def top_k_values(node: NodeProto, recorded: Mapping[int, str], b: edit.Builder) -> None:
    """Compute the values of a TopK from the recorded indices."""
    if node.output[0]:
        b.add(
            "GatherElements",
            [node.input[0], recorded[1]],
            node.output[0],
            axis=int_attribute(node, "axis", -1),
        )


def unique_values(node: NodeProto, recorded: Mapping[int, str], b: edit.Builder) -> None:
    """Compute the values (or slices) of a Unique from the recorded indices of their first occurrence."""
    if not node.output[0]:
        return
    axis, source = attribute(node, "axis"), node.input[0]
    if axis is None:
        source = b.add("Reshape", [source, b.constant(np.array([-1], np.int64), "flat")])
    b.add(
        "Gather",
        [source, recorded[1]],
        node.output[0],
        axis=0 if axis is None else int_attribute(node, "axis", 0),
    )


def dropout_values(node: NodeProto, recorded: Mapping[int, str], b: edit.Builder) -> None:
    """Compute a Dropout in training mode: ``x / (1 - ratio)`` where the recorded mask is true, else 0."""
    ratio = node.input[1] if len(node.input) > 1 and node.input[1] else b.constant(0.5, "ratio")
    # The ratio may have another float type than x.
    kept = b.add("Sub", [b.constant(1.0, "one"), b.add("Cast", [ratio], to=TensorProto.FLOAT)])
    mask = b.add("Cast", [recorded[1]], to=TensorProto.FLOAT)
    b.add("Mul", [node.input[0], b.add("Div", [mask, kept])], node.output[0])


def rounds(node: NodeProto, view: GraphView) -> bool:
    """Return True for a Cast from float to integer that depends on values of inputs, not only on shapes."""
    makes = view.elem_type(node.output[0])
    return view.is_float(node.input[0]) and makes in _INTEGERS and node.input[0] in view.varying


def rounds_sizes(node: NodeProto, view: GraphView) -> bool:
    """Return True for a rounded value that is cast to an integer: a length, an index, a number of rows."""
    if node.output[0] not in view.varying:
        return False
    behind = view.downstream([node.output[0]])
    return any(
        n.op_type == "Cast" and n.output[0] in behind and view.elem_type(n.output[0]) in _INTEGERS
        for n in view.nodes
    )


def decides(node: NodeProto, view: GraphView) -> bool:
    """Return True for a condition that depends on values of inputs through computed floats."""
    condition = node.input[1 if node.op_type == "Compress" else 0]
    if condition not in view.varying:
        return False
    return any(True for _ in _float_sources(view, condition))


def trains(node: NodeProto, view: GraphView) -> bool:
    """Return True for a Dropout whose training mode is not known to be off."""
    if len(node.input) < 3 or not node.input[2]:
        return False
    return not view.is_constant(node.input[2]) or bool(view.constant(node.input[2]).reshape(-1)[0])


# ---- replay ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """A recorded tensor of a node, and the model input that replaces it.

    Parameters
    ----------
    node : str
        Name of the node.
    position : int
        Position among the node's outputs, or inputs if ``reads``.
    name : str
        Name of the model input.
    draws : bool
        True for a random draw, False for a choice.
    reads : bool
        True if the tensor is an input of the node.
    """

    node: str
    position: int
    name: str
    draws: bool
    reads: bool = False

    def source(self, node: NodeProto) -> str:
        """Return the tensor that the node's choice is based on."""
        return str(node.input[self.position if self.reads else 0])


@dataclass(frozen=True)
class Replay:
    """The replay of recorded tensors in any version of a model; versions have the same node names.

    Parameters
    ----------
    places : tuple of Place
    types : mapping of str to (int, int)
        Element type and rank of each input that replaces a recorded tensor.
    decisive : mapping of str to int
        Element type of each tensor that a choice is made from.
    """

    places: tuple[Place, ...] = ()
    types: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    decisive: Mapping[str, int] = field(default_factory=dict)

    @property
    def draws(self) -> Replay:
        """The replay of random draws only."""
        return Replay(tuple(p for p in self.places if p.draws), self.types)

    def __call__(
        self, model: ModelProto, rule_of: RuleOf, read_as: Mapping[str, str] | None = None
    ) -> ModelProto:
        """Return a copy that takes recorded tensors as inputs; the model itself if nothing was recorded.

        Parameters
        ----------
        model : ModelProto
        rule_of : callable
            Node to what is recorded of its operator.
        read_as : mapping of str to str, optional
            Tensor of the recorded model to its name in this one, where they differ.
        """
        if not self.places:
            return model
        by_node = _by_node(self.places)
        builder = edit.Builder(model, _PREFIX)
        for node in model.graph.node:
            rule, own = rule_of(node), by_node.get(node.name, [])
            if rule is None or not own:
                builder.nodes.append(node)
                continue
            if rule.inputs:
                builder.nodes.append(_reading(node, {p.position: p.name for p in own}))
                continue
            names = {p.position: p.name for p in own}
            for position, name in names.items():
                if position < len(node.output) and node.output[position]:
                    builder.add("Identity", [name], node.output[position])
            if rule.rest is not None:
                rule.rest(node, names, builder)
        result = edit.with_nodes(model, builder.nodes, builder.initializers)
        for place in self.places:
            elem_type, rank = self.types[place.name]
            result.graph.input.append(helper.make_tensor_value_info(place.name, elem_type, [None] * rank))
        made = {o for n in result.graph.node for o in n.output}
        for name, elem_type in self.decisive.items():
            tensor = (read_as or {}).get(name, name)
            if tensor in made:
                edit.add_output(result, tensor, elem_type)
        return result


def places_of(model: ModelProto, rule_of: RuleOf) -> tuple[Place, ...]:
    """Return the tensors of the main graph to record: all draws, and choices that float values depend on.

    Parameters
    ----------
    model : ModelProto
        With named nodes and inferred types.
    rule_of : callable
        Node to what is recorded of its operator.
    """
    view = GraphView(model)
    taken = all_names(model.graph)
    prefix = _PREFIX
    while any(name.startswith(prefix) for name in taken):
        prefix = f"{prefix}_"
    found = []
    for node in view.nodes:
        rule = rule_of(node)
        if rule is None or not rule.applies(node, view):
            continue
        if not rule.draws and not any(view.is_float(t) for t in view.downstream(o for o in node.output if o)):
            continue
        reads = bool(rule.inputs)
        found += [
            Place(node.name, k, f"{prefix}{node.name}/{k}", rule.draws, reads)
            for k in rule.inputs or rule.outputs
        ]
    return tuple(found)


def recording(model: ModelProto, places: tuple[Place, ...], seed: int) -> tuple[ModelProto, list[str]]:
    """Return a model whose outputs are the tensors to record, and the name of the output for each place.

    Parameters
    ----------
    model : ModelProto
    places : tuple of Place
    seed : int
        Seed of all random draws.
    """
    by_node = _by_node(places)
    builder, names = edit.Builder(model, _PREFIX), dict[str, str]()
    for number, node in enumerate(model.graph.node):
        wanted = by_node.get(node.name)
        if wanted is None:
            builder.nodes.append(node)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        for place in wanted:
            if place.reads:
                names[place.name] = copy.input[place.position]
                continue
            while len(copy.output) <= place.position:
                copy.output.append("")
            if not copy.output[place.position]:
                copy.output[place.position] = builder.unique(place.name)
            names[place.name] = copy.output[place.position]
        if wanted[0].draws:
            _seed(copy, seed + number)
        builder.nodes.append(copy)
    result = edit.with_nodes(model, builder.nodes)
    outputs = [names[p.name] for p in places]
    # onnxruntime infers types that are unknown.
    edit.set_outputs(result, list(dict.fromkeys(outputs)), TensorProto.UNDEFINED)
    edit.prune(result)
    return result, outputs


def _by_node(places: Sequence[Place]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {}
    for place in places:
        found.setdefault(place.node, []).append(place)
    return found


def _reading(node: NodeProto, names: Mapping[int, str]) -> NodeProto:
    """Return a copy of a node with other inputs at some positions."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for position, name in names.items():
        copy.input[position] = name
    return copy


def _seed(node: NodeProto, seed: int) -> None:
    kept = [a for a in node.attribute if a.name != "seed"]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(
        helper.make_attribute("seed", int(seed) if node.op_type == "Dropout" else float(seed))
    )


def decisive(model: ModelProto, places: tuple[Place, ...]) -> dict[str, int]:
    """Return the computed float tensors that choices are made from, with their element types."""
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    found: dict[str, int] = {}
    for place in places:
        node = nodes[place.node]
        if not place.draws:
            found.update((t, view.elem_type(t)) for t in _float_sources(view, place.source(node)))
    return {t: kind for t, kind in found.items() if t not in view.outputs}


def _float_sources(view: GraphView, tensor: str) -> Iterator[str]:
    """Yield a tensor, or, if it is not float, the nearest float tensors that it is computed from."""
    queue, seen = [tensor], set[str]()
    while queue:
        name = queue.pop()
        node = view.producer.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if view.is_float(name):
            yield name
        elif node.op_type not in ("Shape", "Size"):
            queue.extend(i for i in node.input if i and not view.is_constant(i))


def draws_inside_bodies(model: ModelProto, rule_of: RuleOf) -> list[str]:
    """Return the names of the nodes of the main graph in whose subgraphs random numbers are drawn."""
    found = []
    for node in model.graph.node:
        rules = (
            rule_of(inner)
            for graph in subgraphs(node)
            for inner in all_nodes(graph)
            if inner.op_type != "Dropout"
        )
        if any(rule is not None and rule.draws for rule in rules):
            found.append(node.name)
    return found
