"""Decide which tensors are quantized and how, and state why the others stay float.

The rules, in terms of the operator table (`ops.TABLE`) and the target:

- a layer (constant weight) that the target runs on integers is quantized: its input, its weight, and, if the
  target wants it, its output behind the clipping function that the target absorbs;
- arithmetic and equal-scale operators are quantized if a quantized node reads their result, or if the target
  quantizes their output in any case. For most targets, everything behind the last layers thus stays float:
  nothing there would use the integers, and the outputs keep full precision;
- of a residual sum, some targets quantize only the branch that does not come from a layer;
- nodes of a pattern that the target keeps whole stay float;
- tensors joined by equal-scale operators, and by operators whose scale is shared, have one scale;
- the weight of a layer that stays float is stored as integers, if the target's runtime turns them back into
  floats when it loads the model; so are the weights of recurrent layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from onnx import AttributeProto, ModelProto, NodeProto

from eptq_onnx.config import FLOAT_BITS, Activations, Config
from eptq_onnx.errors import ModelError
from eptq_onnx.graph.branches import settled_branch
from eptq_onnx.graph.nbits import MATMUL_NBITS
from eptq_onnx.graph.patterns import matching, tensor_of
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.plan.activations import dynamic_quantizers, quantizers_of
from eptq_onnx.method.plan.draft import NO_BOUNDS, Draft, bounds_of, weight_of
from eptq_onnx.method.plan.guards import guarded_tensors, shielded_nodes
from eptq_onnx.method.plan.held import held_weights
from eptq_onnx.method.plan.layers import bias_objection, layers_of
from eptq_onnx.method.plan.storing import stored_nodes
from eptq_onnx.method.plan.tables import lookup_tables
from eptq_onnx.method.plan.wide import with_wide
from eptq_onnx.numerics.quant_math import keeps_bounds
from eptq_onnx.ops import OpSpec, Role, is_known, recorded, sizes, spec_of
from eptq_onnx.ops.regions import regions
from eptq_onnx.proto.bodies import all_nodes, node_reads, subgraphs
from eptq_onnx.records import ActivationQuantizer, KeptFloat, Plan
from eptq_onnx.runtime import OWN_DOMAINS
from eptq_onnx.targets import Operator, Target

_RUNS = {Role.LAYER: "layer", Role.ARITHMETIC: "arithmetic", Role.EQUAL_SCALE: "equal scale"}
"""What a target's row says of an operator that has a role and runs on integers."""
_OTHER_RANGES = (
    ": with activations=dynamic, matrix products alone run on integers; choose activations=static with "
    "samples, or bits=w8a32 to store weights alone as integers"
)
"""What to do if no layer is dynamic."""


def plan(
    model: ModelProto,
    target: Target,
    config: Config,
    sensitive: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
    exact: Collection[str] = (),
    dynamic: Collection[str] = (),
) -> Plan:
    """Make the plan for a normalized model.

    Parameters
    ----------
    model : ModelProto
    target : Target
    config : Config
    sensitive : mapping of str to str, optional
        Tensors that must not be quantized, each with the reason.
    kept : mapping of str to str, optional
        Nodes that must stay float, each with the reason.
    exact : collection of str, optional
        Tensors and nodes around which weights stay float, too.
    dynamic : collection of str, optional
        Layers whose inputs are quantized in every run, where ``config.activations`` leaves it open.

    Raises
    ------
    ModelError
        If there is nothing to quantize: no layer runs on integers although the options ask for it.
    ConfigError
        If a pattern matches no node.
    """
    view = GraphView(model)
    excluded = {pattern: tensor_of(view, pattern) for pattern in config.exclude}
    left = {t: f"excluded by the pattern {p}" for p, t in excluded.items() if t is not None}
    by_user = {
        name: f"excluded by the pattern {pattern}"
        for pattern, tensor in excluded.items()
        if tensor is None
        for name in matching(view, pattern)
    }
    bits = {name: (w, a) for pattern, w, a in config.node_bits for name in matching(view, pattern)}
    draft = Draft(
        view,
        target,
        sensitive=sensitive or {},
        excluded=dict(kept or {}) | by_user,
        bits=bits,
        whole=regions(view, target.patterns.keep),
        activation_bits=config.activation_bits,
        asked=_asked(config, dynamic),
        only_dynamic=config.activations is Activations.DYNAMIC,
    )
    _absorb(draft)
    draft.sensitive = {**draft.sensitive, **{draft.final(t): why for t, why in left.items()}}
    _choose(draft)
    draft.stored |= stored_nodes(draft, {*exact, *by_user}, config.block)
    layers = layers_of(draft, config, model)
    held = held_weights(draft, layers, {*exact, *by_user})
    if all(layer.stored for layer in layers) and not held and not (layers and config.weights_only):
        reasons = "; ".join(f"{name}: {why}" for name, why in list(draft.reasons.items())[:3])
        in_every_run = config.activations is Activations.DYNAMIC
        kinds = target.dynamic if in_every_run else target.that_run("layer")
        raise ModelError(
            f"there is nothing to quantize: no {', '.join(sorted(kinds))} "
            f"with a constant float32 weight{' (' + reasons + ')' if reasons else ''}"
            f"{_OTHER_RANGES if in_every_run and layers else ''}."
        )
    activations, operands = quantizers_of(draft, layers, config)
    tables = lookup_tables(draft, layers, config, by_user)
    absorbed = _absorbed_nodes(draft, activations)
    integer, kept_float = _integer_nodes(draft), _kept_float(draft, absorbed)
    found = Plan(
        layers,
        activations,
        operands,
        tables,
        integer,
        absorbed,
        kept_float,
        bias=target.bias_spec(),
        exact=_choosing(draft, integer),
        float_outputs=target.outputs == "float",
        carried=_carried(draft),
        guarded=guarded_tensors(draft, activations) if target.rest.quantizes else frozenset(),
        shielded=shielded_nodes(draft),
        dynamic=dynamic_quantizers(layers),
        held=held,
    )
    return with_wide(found, view, target)


def _asked(config: Config, dynamic: Collection[str]) -> Callable[[str], bool]:
    """Return whether a layer of a name is to be dynamic."""
    if config.activations is Activations.DYNAMIC:
        return lambda name: True
    chosen = frozenset(dynamic) if config.activations is Activations.AUTO else frozenset()
    return chosen.__contains__


def _absorb(draft: Draft) -> None:
    view = draft.view
    for node in view.nodes:
        spec = spec_of(node)
        if (
            spec.role is not Role.CLIPPING
            or draft.row(node).runs != "absorbed"
            or node.name in draft.excluded
            or node.name in draft.whole
        ):
            continue
        source = view.producer.get(node.input[0])
        if source is None or spec_of(source).role not in (Role.LAYER, Role.ARITHMETIC, Role.CLIPPING):
            continue
        low, high = spec.bounds(node, view) if spec.bounds else NO_BOUNDS
        private = len(view.consumers[node.input[0]]) == 1 and node.input[0] not in view.outputs
        if private and spec.objection(node, view) is None and low <= 0 <= high:
            draft.absorbed[node.input[0]] = node.output[0]


def _choose(draft: Draft) -> None:
    """Decide which nodes run on integers.

    Nodes are visited backwards, so that a node knows whether its readers run on integers.
    """
    for node in reversed(draft.view.nodes):
        spec = spec_of(node)
        reason = _objection(node, spec, draft)
        if reason is None and draft.is_dynamic(node):
            draft.dynamic.add(node.name)
        elif reason is None and draft.only_dynamic:
            draft.reasons[node.name] = "the option activations leaves its activations float"
        elif reason is None:
            draft.quantized[node.name] = spec
        else:
            draft.reasons[node.name] = reason
    for node in draft.view.nodes:
        # An absorbed function belongs to the node in front of it, and is float only if that node is.
        if (
            node.input
            and node.input[0] in draft.absorbed
            and draft.view.producer[node.input[0]].name in draft.quantized
        ):
            del draft.reasons[node.name]


def _objection(node: NodeProto, spec: OpSpec, draft: Draft) -> str | None:
    """Return why a node stays float, or None."""
    view, row = draft.view, draft.row(node)
    if node.name in draft.excluded:
        return draft.excluded[node.name]
    if draft.bits_read(node) == FLOAT_BITS:
        return "the option bits leaves its activations float"
    if subgraphs(node):
        return _inside(node, draft.target.that_run("layer"))
    if not is_known(node) and node.domain not in OWN_DOMAINS:
        return f"{node.op_type} is a custom operator, of the domain {node.domain}"
    if not is_known(node) and node.op_type == MATMUL_NBITS:
        return "its weight is quantized already; the option requantize quantizes it anew"
    if not is_known(node):
        return f"{node.op_type} is not in the operator table"
    if node.name in draft.whole:
        return f"{draft.target.name} runs {draft.whole[node.name]} as a whole, in float"
    if spec.role is Role.CLIPPING and row.runs == "absorbed":
        return "nothing that runs on integers absorbs it"
    if row.runs != _RUNS.get(spec.role):
        return f"{draft.target.name} has no integer kernel for {node.op_type}"
    special = spec.objection(node, view) or _beyond(node, row, draft)
    if special:
        return special
    data = draft.inputs(node)
    weighted = draft.is_weighted(node)
    if weighted:
        weight = weight_of(node)
        data = [d for d in data if d != weight]
        if view.shape(weight) is not None and len(view.shape(weight) or ()) < 2:
            return "its weight is a vector"
        if (why := bias_objection(node, view)) is not None:
            return why
        bias = node.input[spec.bias] if spec.bias is not None and len(node.input) > spec.bias else ""
        constants = [weight, bias]
        infinite = [c for c in constants if c and view.is_float(c) and not view.is_finite(c)]
        if infinite:
            return f"its weight {infinite[0]} has NaN or Inf"
    elif spec.role is Role.LAYER and (spec.weight not in (spec.data or ()) or not row.computed):
        return "its weight is computed at run time"
    if not all(view.is_float(d) for d in (*data, *node.output)):
        return "its values are not float32"
    results = () if row.output == "float" else (draft.final(o) for o in node.output)
    for tensor in (*data, *results):
        if tensor in draft.sensitive:
            return draft.sensitive[tensor]
    if weighted:
        return None
    infinite = [d for d in data if view.is_constant(d) and not view.is_finite(d)]
    if infinite:
        return f"its operand {infinite[0]} has infinite values"
    if all(view.is_constant(d) for d in data):
        return "all its inputs are constant"
    if row.output != "quantized" and not any(draft.is_read(o) for o in node.output):
        return "no integer operator reads its result"
    return None


def _beyond(node: NodeProto, row: Operator, draft: Draft) -> str | None:
    """Return which of the target's conditions a node does not meet, or None.

    Decides which branch of a residual sum stays float.
    """
    view = draft.view
    if not (row.except_first and draft.is_weighted(node) and node.input[0] not in draft.behind_layers):
        limit = sizes.objection(node, view, row)
        if limit is not None:
            return limit
    operands = spec_of(node).data_inputs(node)
    if row.shared_scale and any(view.is_constant(i) for i in operands):
        return "one of its operands is constant and does not share the scale of the others"
    if row.inputs == "residual" and node.name not in draft.unread:
        branch = _layer_branch(node, operands, draft)
        if branch is None:
            return "neither operand comes from a layer alone, so no layer can add the other in its kernel"
        draft.unread[node.name] = branch
    return None


def _layer_branch(node: NodeProto, operands: Sequence[str], draft: Draft) -> str | None:
    """Return the operand of a sum that comes from a layer which can add the other one; None if none does.

    If both do, it is the one behind more layers: the other is the shortcut.
    """
    view = draft.view
    shapes = [view.shape(i) for i in operands]
    if len(set(operands)) != 2 or any(map(view.is_constant, operands)) or shapes[0] != shapes[1]:
        return None
    depth: dict[str, int] = {}
    for tensor in operands:
        layer = view.producer.get(tensor)
        if layer is None or not draft.is_weighted(layer) or len(view.consumers[tensor]) > 1:
            continue
        if tensor not in view.outputs and _objection(layer, spec_of(layer), draft) is None:
            before = view.upstream([tensor])
            depth[tensor] = sum(draft.is_weighted(n) and n.output[0] in before for n in view.nodes)
    return max(depth, key=lambda tensor: depth[tensor], default=None)


def _inside(node: NodeProto, layers: frozenset[str]) -> str:
    """Return why a node with subgraphs stays float, and which layers stay float with it."""
    bodies = {a.name: a.g for a in node.attribute if a.type == AttributeProto.GRAPH}
    settled = settled_branch(node)
    if settled is not None:
        del bodies[settled]
    counts = Counter(n.op_type for graph in bodies.values() for n in all_nodes(graph) if n.op_type in layers)
    left = f" ({', '.join(f'{n} {op}' for op, n in sorted(counts.items()))})" if counts else ""
    if settled is not None:
        return f"no sample takes its {next(iter(bodies))}: its contents stay float{left}"
    if len(bodies) > 1:
        return f"samples take different branches: their contents stay float{left}"
    return f"its body stays float{left}"


def _integer_nodes(draft: Draft) -> dict[str, str]:
    return {n.name: n.op_type for n in draft.view.nodes if n.name in draft.quantized}


def _carried(draft: Draft) -> frozenset[str]:
    """Return the results of moves behind which the target wants no quantizer; they are on the grid."""
    return frozenset(
        draft.final(o)
        for n in draft.view.nodes
        if n.name in draft.quantized and draft.row(n).carries
        for o in n.output
        if o
    )


def _choosing(draft: Draft, integer: Mapping[str, str]) -> frozenset[str]:
    """Return the float nodes whose results only serve choices by value.

    An example is the mean of an image that is compared with a threshold.
    """
    view = draft.view
    found: set[str] = set()
    for node in reversed(view.nodes):
        if node.name in integer or any(o in view.outputs for o in node.output):
            continue
        rule = recorded(node)
        chooses = rule is not None and not rule.draws and not rule.inputs and rule.applies(node, view)
        readers = [(n, o) for o in node.output for n in view.consumers[o]]
        if chooses or (readers and all(n.name in found or _only_decides(n, o, view) for n, o in readers)):
            found.add(node.name)
    return frozenset(found)


def _only_decides(node: NodeProto, tensor: str, view: GraphView) -> bool:
    """Return True if a node reads a tensor only as its condition (If, Compress)."""
    rule = recorded(node)
    if rule is None or rule.draws or not rule.applies(node, view):
        return False
    reads = node_reads(node)
    for k in rule.inputs:
        reads.remove(node.input[k])
    return tensor not in reads


def _absorbed_nodes(draft: Draft, activations: tuple[ActivationQuantizer, ...]) -> dict[str, str]:
    """Return the absorbed clipping nodes that are followed by a quantizer with the same limits.

    Not every quantizer can reproduce the limits.
    """
    specs = {tensor: q.spec for q in activations for tensor in q.tensors}
    return {
        n.name: n.op_type
        for n in draft.view.nodes
        if n.input
        and n.input[0] in draft.absorbed
        and n.output[0] == draft.absorbed[n.input[0]]
        and (spec := specs.get(draft.final(n.output[0])))
        and keeps_bounds(spec, bounds_of(draft, n.output[0]))
    }


def _kept_float(draft: Draft, absorbed: Mapping[str, str]) -> tuple[KeptFloat, ...]:
    view = draft.view
    return tuple(
        KeptFloat(n.name, n.op_type, draft.reasons[n.name])
        for n in view.nodes
        if n.name in draft.reasons and n.name not in absorbed and any(view.is_float(o) for o in n.output)
    )
