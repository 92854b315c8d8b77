"""Queries about nodes and graphs that are answered from the operator table."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping

from onnx import ModelProto, NodeProto

from eptq_onnx.errors import ConfigError
from eptq_onnx.graph import channel_axes, channels, replay
from eptq_onnx.graph.branches import flattened
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.integer_products import PRODUCTS
from eptq_onnx.graph.view import STOP, GraphView, int_attribute
from eptq_onnx.ops.regions import REGIONS
from eptq_onnx.ops.spec import Gradient, OpSpec, Role
from eptq_onnx.ops.table import TABLE, spec_of
from eptq_onnx.targets import Target

_BRANCHES = replay.Recorded(False, inputs=(0,), applies=replay.decides)


def recorded(node: NodeProto) -> replay.Recorded | None:
    """Return what is recorded of a node, or None; of an If, which has no row, its condition is recorded."""
    return _BRANCHES if node.op_type == "If" and not node.domain else spec_of(node).recorded


def executed(model: ModelProto, found: replay.Replay, read_as: Mapping[str, str] | None = None) -> ModelProto:
    """Return the form of a model that is run on samples.

    In it, settled Ifs are replaced by the branch that they take, and recorded tensors are inputs.

    Parameters
    ----------
    model : ModelProto
    found : Replay
    read_as : mapping of str to str, optional
        Tensor of the recorded model to its name in this one, where they differ.
    """
    flat = flattened(model)
    result = found(flat, recorded, read_as)
    return result if result is flat else infer_shapes(result)


def check_roles(target: Target) -> None:
    """Check that a target's rows are for operators that the table knows in that role.

    Raises
    ------
    ConfigError
        If one is not, or if a pattern is unknown; the message names it.
    """
    allowed = operators_by_field()
    for op, row in sorted(target.operators.items()):
        if op not in allowed['runs = "float"']:
            raise ConfigError(f"target {target.name}: operators.{op} is no operator of the operator table.")
        asked = {
            f'runs = "{row.runs}"': True,
            'inputs = "residual"': row.inputs == "residual",
            "shared_scale": row.shared_scale,
            "computed": not row.computed,
            "weight": row.weight is not None,
            "dynamic": row.dynamic,
            "stored": row.stored,
            "output_range": row.output_range is not None,
            "shifts": bool(row.shifts),
        }
        for field, has in asked.items():
            if has and op not in allowed[field]:
                choices = ", ".join(sorted(allowed[field]))
                raise ConfigError(
                    f"target {target.name}: operators.{op} has {field}, which is for {choices} alone."
                )
    wrong = sorted(target.patterns.keep - REGIONS.keys())
    if wrong:
        raise ConfigError(
            f"target {target.name}: patterns.keep names {wrong[0]!r}: choose among {', '.join(REGIONS)}."
        )


def operators_by_field() -> dict[str, set[str]]:
    """Return for each field of a target's row the operators that may have it."""

    def those(wanted: Callable[[OpSpec], bool]) -> set[str]:
        return {op for (_, op), row in TABLE.items() if wanted(row)}

    layers = those(lambda row: row.role is Role.LAYER)
    return {
        'runs = "layer"': layers,
        'runs = "arithmetic"': those(lambda row: row.role is Role.ARITHMETIC),
        'runs = "equal scale"': those(lambda row: row.role is Role.EQUAL_SCALE),
        'runs = "absorbed"': those(lambda row: row.role is Role.CLIPPING),
        'runs = "float"': those(lambda row: True),
        'inputs = "residual"': those(lambda row: row.role is Role.ARITHMETIC and _is_sum(row)),
        "shared_scale": those(lambda row: row.role is Role.ARITHMETIC and row.rearranges),
        "computed": those(lambda row: row.weight is not None and row.weight in (row.data or ())),
        "weight": layers,
        "dynamic": set(PRODUCTS),
        "stored": those(lambda row: row.table is not None),
        "output_range": those(lambda row: row.role is Role.ARITHMETIC),
        "shifts": those(lambda row: row.role in (Role.LAYER, Role.ARITHMETIC)),
    }


def _is_sum(row: OpSpec) -> bool:
    return row.elementwise and row.channels is channels.sums


def is_elementwise(node: NodeProto) -> bool:
    """Return True if every output element depends only on the input elements at the same position."""
    return spec_of(node).elementwise or node.op_type in ("Pow", "Mod")


def channels_of(view: GraphView, *, linear: bool = False) -> channels.Channels:
    """Return the channels of a graph that may be scaled, or with ``linear`` those that may be mixed.

    ``linear`` applies the rules of linear operators only.
    """
    axes = channel_axes_of(view)
    return channels.Channels(
        view, lambda node: spec.channels if (spec := spec_of(node)).mixes or not linear else None, axes
    )


def channel_axes_of(view: GraphView) -> dict[str, int]:
    """Return the channel axis of every computed tensor and input that has axes.

    This function alone decides it, for all steps.
    """

    def axis_spec(node: NodeProto) -> channel_axes.AxisSpec:
        spec = spec_of(node)
        # In a product of two computed matrices, neither operand is known to have channels.
        both = (
            spec.weight is not None
            and spec.weight in (spec.data or ())
            and not view.is_constant(node.input[spec.weight])
        )
        reads = None if both else spec.output_axis
        data = [i for k, i in enumerate(node.input) if i and (spec.data is None or k in spec.data)]
        return channel_axes.AxisSpec(
            data, spec.output_axis, reads, spec.axis or (channel_axes.keeps if spec.elementwise else None)
        )

    return channel_axes.channel_axes(view, axis_spec)


def output_channels(node: NodeProto, view: GraphView) -> int:
    """Return the number of output channels of a layer with a constant weight.

    Source: ONNX operators Conv (weight M x C/group x k), ConvTranspose (C x M/group x k), Gemm, MatMul.
    """
    spec = spec_of(node)
    shape = view.constant_shape(node.input[spec.weight or 0])
    return int(shape[spec.weight_axis(node)]) * (int_attribute(node, "group", 1) if spec.grouped_axis else 1)


def without_gradient(view: GraphView) -> frozenset[str]:
    """Return the names of the nodes that gradients cannot pass through."""
    return frozenset(
        n.name
        for n in view.nodes
        if spec_of(n).gradient in (Gradient.NONE, Gradient.ZERO) or n.doc_string == STOP
    )


def pointwise(
    view: GraphView, tensor: str, fits: Callable[[tuple[int, ...]], bool]
) -> tuple[list[NodeProto], str]:
    """Return the nodes that compute an elementwise function of a tensor alone.

    Parameters
    ----------
    view : GraphView
    tensor : str
    fits : callable
        Shape of a constant to True if the function may use the constant.

    Returns
    -------
    list of NodeProto
        In topological order.
    str
        The only result of these nodes that is used elsewhere. If there are several, it is ``tensor`` itself,
        and the list is empty.
    """
    inside, nodes, reached = {tensor}, list[NodeProto](), deque((tensor,))
    while reached:
        for node in view.consumers[reached.popleft()]:
            reads = [i for i in node.input if i]
            known = spec_of(node).elementwise and all(i in inside or view.is_constant(i) for i in reads)
            if not known or node.output[0] in inside:
                continue
            if all(fits(view.constant_shape(i)) for i in reads if view.is_constant(i)):
                inside.add(node.output[0])
                reached.append(node.output[0])
                nodes.append(node)
    exits = [
        t for t in inside if t in view.outputs or any(n.output[0] not in inside for n in view.consumers[t])
    ]
    return (nodes, exits[0]) if len(exits) == 1 else ([], tensor)


def output_parts(view: GraphView, counted: Collection[str] = ()) -> list[str]:
    """Return the float tensors that the outputs of a model are assembled from.

    The search goes upstream through operators that only rearrange elements, and through operators without a
    gradient. A detector that concatenates boxes and scores has one part of each kind, each with a variance of
    its own.

    Parameters
    ----------
    view : GraphView
    counted : collection of str
        Names of the outputs that count; empty for all.
    """
    blocked = without_gradient(view)
    parts: dict[str, None] = {}
    queue, seen = [o for o in view.outputs if not counted or o in counted], set[str]()
    while queue:
        name = queue.pop(0)
        node = view.producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        row = spec_of(node)
        if view.is_float(name) and row.rearranges:
            queue.extend(row.data_inputs(node))
        elif view.is_float(name) and node.name not in blocked:
            parts[name] = None
        else:
            queue.extend(i for i in node.input if i and not view.is_constant(i))
    return list(parts)
