"""Rules about placement: where quantizers sit, and how they affect the operators around them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import NodeProto

from eptq_onnx.ops import spec_of
from eptq_onnx.ops.regions import regions
from eptq_onnx.ops.sizes import objection
from eptq_onnx.rules.numbers import TYPE_BITS
from eptq_onnx.rules.roles import activation_of, activations_of, bias_of, rows_of, runs_on_integers
from eptq_onnx.rules.rule import Rule, Severity, rule
from eptq_onnx.rules.scopes import BODY_DOMAIN
from eptq_onnx.rules.view import DEQUANTIZE, QUANTIZE, QdqView, Quantized
from eptq_onnx.targets import ONNXRUNTIME, Target

_INTEGER_OPERATORS = (
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "QGemm",
)


@rule(
    "integer-operator",
    Severity.ERROR,
    "The file has quantizers around float operators, not integer operators of one particular runtime.",
    "Write the file in Q/DQ format.",
)
def integer_operators(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnx-tensorrt operators.md."""
    for node in view.nodes:
        if target.verifier != ONNXRUNTIME and (
            node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear")
        ):
            yield node.name, f"{node.op_type} is not a float operator"


@rule(
    "between",
    Severity.ERROR,
    "No operator sits between QuantizeLinear and DequantizeLinear.",
    "Use the full width of the integer type, and move other operators out of the pair.",
)
def between(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnx-tensorrt importers; onnxruntime takes a Clip."""
    for q in view.dequantizers:
        for node in view.between(q)[0] if not q.constant and not target.activation.narrow else ():
            yield node.name, f"{node.op_type} sits between QuantizeLinear and DequantizeLinear"


@rule(
    "packed",
    Severity.ERROR,
    "Quantized constants are initializers where the target does not fold the nodes that unpack them.",
    "Store weights in int8.",
)
def packed_constants(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT-RTX 1.7, which rejects integer constants without DequantizeLinear."""
    for q in view.dequantizers:
        if q.constant and not target.weight.packed and not view.graph.is_constant(q.integers):
            yield q.node.name, "its integers are computed from other constants"


@rule(
    "layer-input",
    Severity.WARNING,
    "The input and the weight of a layer are either both quantized or both float.",
    "Quantize the missing input, or leave all inputs float.",
)
def layer_input(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT, OpenVINO, onnxruntime: an operator runs on integers if all inputs are quantized."""
    for node, row in rows_of(view, target):
        place = spec_of(node).weight
        if row.runs != "layer" or place is None or len(node.input) <= place:
            continue
        x, weight = activation_of(node.input[0], view, target), view.read(node.input[place])
        if not view.is_constant(node.input[place]) or (x is None) == (weight is None):
            continue
        if x is None and weight is not None and weight.block and target.blocks.sizes:
            continue
        missing = "input" if x is None else "weight"
        yield node.name, f"its {missing} is float, so it runs in float"


@rule(
    "layer-output",
    Severity.WARNING,
    "The output of an operator is quantized if the target's integer kernel can only write integers.",
    "Put QuantizeLinear and DequantizeLinear after the operator, for all its readers.",
)
def layer_output(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime qdq_selectors.cc."""
    for node, row in rows_of(view, target):
        if row.output != "quantized" or not runs_on_integers(node, view, target):
            continue
        tensor = _behind_clipping(node, view, target)
        readers = view.readers(tensor)
        if tensor in view.graph.outputs or any(n.op_type != QUANTIZE for n in readers) or not readers:
            yield node.name, f"its output is read as float, so {node.op_type} runs in float"


def _behind_clipping(node: NodeProto, view: QdqView, target: Target) -> str:
    """Return the output of a node, or of the clipping operators after it that the quantizer absorbs."""
    tensor = str(node.output[0])
    while len(readers := view.readers(tensor)) == 1 and tensor not in view.graph.outputs:
        row = target.operators.get(readers[0].op_type)
        if row is None or row.runs != "absorbed":
            break
        tensor = readers[0].output[0]
    return tensor


@rule(
    "idle-pair",
    Severity.WARNING,
    "A tensor is quantized only if an operator that runs on integers uses it.",
    "Remove the pair: it costs time and accuracy.",
)
def idle_pair(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT best practices for placing Q/DQ; OpenVINO low-precision transformations."""
    for source, q in view.pairs:
        producer = view.maker(source.node.input[0])
        wanted = producer is not None and _writes_integers(producer, view, target)
        readers = view.readers(q.node.output[0])
        wanted |= any(runs_on_integers(n, view, target) or n.op_type == QUANTIZE for n in readers)
        if not wanted:
            kinds = sorted({n.op_type for n in readers})
            kinds += ["an output of the network"] * (q.node.output[0] in view.graph.outputs)
            which = f"only {' and '.join(kinds)} reads it, in float" if kinds else "nothing reads it"
            yield q.node.name, f"on {target.name} {which}"


def _writes_integers(node: NodeProto, view: QdqView, target: Target) -> bool:
    """Return True if a node writes integers, itself or through the clipping operators after it."""
    row = target.operators.get(node.op_type)
    while row is not None and row.runs == "absorbed":
        before = view.graph.producer.get(node.input[0])
        if before is None:
            return False
        node, row = before, target.operators.get(before.op_type)
    return row is not None and row.output != "float" and runs_on_integers(node, view, target)


@rule(
    "residual",
    Severity.WARNING,
    "Of a residual sum, only the branch that does not come from a layer is quantized.",
    "Remove the pair on the branch that comes from the layer: the layer's kernel computes the sum.",
)
def residual(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT, Q/DQ placement for residual sums; modelopt.onnx."""
    layers = target.that_run("layer")
    for node, row in rows_of(view, target):
        if row.inputs != "residual":
            continue
        reads = [
            q for i in node.input if (q := activation_of(i, view, target)) is not None and not q.constant
        ]
        if len(reads) < 2:
            continue
        for q in reads:
            source = view.between(q)[1]
            maker = None if source is None else view.graph.producer.get(source.node.input[0])
            if source is not None and maker is not None and maker.op_type in layers:
                yield node.name, f"its input from {maker.name} is quantized, too"
                break


@rule(
    "shared-scale",
    Severity.WARNING,
    "Operators that only move values have the same scale and zero point at inputs and outputs.",
    "Give these tensors one scale that covers the values of all of them.",
)
def shared_scale(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime qdq_selectors.cc; TensorRT and OpenVINO for Concat."""
    for node, row in rows_of(view, target):
        moves = row.runs == "equal scale" or row.shared_scale
        if not moves or not runs_on_integers(node, view, target):
            continue
        around: list[Quantized] = [
            q for i in activations_of(node, view) if (q := activation_of(i, view, target)) is not None
        ]
        around += [q for o in node.output if o for q in view.written(o)]
        if len(around) > 1 and not all(q.same_numbers(around[0]) for q in around):
            yield node.name, f"{node.op_type} has inputs and outputs with different scales"


@rule(
    "one-width",
    Severity.WARNING,
    "The activations that an operator reads and writes have one width if kernels compute with several.",
    "Convert the narrower ones: read them behind a second pair of the wider type, and write them behind one.",
)
def one_width(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime qdq_selectors.cc, and its mixed precision for the QNN execution provider."""
    for node, row in rows_of(view, target) if target.activation.wide else ():
        if row.runs not in ("layer", "arithmetic", "equal scale"):
            continue
        spec = spec_of(node)
        weight = node.input[spec.weight] if spec.weight is not None and len(node.input) > spec.weight else ""
        data = [i for i in spec.data_inputs(node) if i != weight or not view.is_constant(i)]
        widths = [_bits_of(q) for i in data if (q := view.read(i)) is not None]
        # Kernels of MatMul multiply 16 bits by 8.
        widths = [max(widths)] if widths and node.op_type == "MatMul" else widths
        widths += map(_bits_of, view.written(_behind_clipping(node, view, target)))
        if len(set(widths)) > 1:
            yield node.name, f"its activations have {' and '.join(map(str, sorted(set(widths))))} bits"


def _bits_of(q: Quantized) -> int:
    return TYPE_BITS.get(q.type_name, 8)


@rule(
    "moved",
    Severity.WARNING,
    "No quantizers follow operators that only move values, if the target needs none there.",
    "Remove the pair behind this operator.",
)
def moved(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT, which moves quantizers across such operators itself."""
    for node, row in rows_of(view, target):
        if row.carries and runs_on_integers(node, view, target) and any(view.written(o) for o in node.output):
            yield node.name, f"the output of {node.op_type} is quantized once more"


@rule(
    "pattern",
    Severity.WARNING,
    "No quantizers sit inside patterns that the runtime fuses.",
    "Remove these pairs.",
)
def pattern(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT and OpenVINO fusions; modelopt.onnx."""
    stripped = view.stripped
    inside = regions(stripped, target.patterns.keep)
    for source, q in view.pairs:
        maker = stripped.producer.get(source.node.input[0])
        name = None if maker is None else inside.get(maker.name)
        readers = view.readers(q.node.output[0])
        if name is not None and readers and all(inside.get(n.name) == name for n in readers):
            yield q.node.name, f"it sits inside a {name} pattern"


@rule(
    "size",
    Severity.WARNING,
    "Operators run on integers only at sizes that the target's integer kernels are worth using for.",
    "Leave this operator float.",
)
def size(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: modelopt.onnx; onnxruntime kernels."""
    stripped = view.stripped
    for node in stripped.nodes:
        row = target.operators.get(node.op_type)
        original = view.graph.producer.get(next((o for o in node.output if o), ""))
        if row is None or original is None or not runs_on_integers(original, view, target):
            continue
        why = objection(node, stripped, row)
        if why is not None and not (row.except_first and _is_first(original, view, target)):
            yield node.name, why


def _is_first(node: NodeProto, view: QdqView, target: Target) -> bool:
    """Return True if no other layer comes before this one."""
    before = view.graph.upstream([node.input[0]])
    layers = target.that_run("layer")
    return not any(n.op_type in layers and any(o in before for o in n.output) for n in view.nodes)


@rule(
    "network-output",
    Severity.WARNING,
    "Outputs of the network are not quantized if the target keeps them float.",
    "Make the tensor before QuantizeLinear the output.",
)
def network_output(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: OpenVINO, hardware configurations of NNCF."""
    for name in view.graph.outputs:
        maker = view.graph.producer.get(name)
        if target.outputs == "float" and maker is not None and maker.op_type == DEQUANTIZE:
            yield maker.name, f"the output {name} is dequantized"


@rule(
    "static",
    Severity.ERROR,
    "Inputs have fixed sizes, and there is no control flow, if the target compiles graphs ahead of time.",
    "Fix the sizes of the float model's inputs, unroll loops and resolve branches, and quantize it again.",
)
def static(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime, QNN execution provider."""
    if target.shapes != "static":
        return
    for node in view.nodes:
        if node.domain == BODY_DOMAIN:
            yield node.name, f"{node.op_type} is control flow"
    for name in view.graph.inputs:
        readers = view.readers(name)
        if readers and view.graph.static_shape(name) is None:
            yield readers[0].name, f"it reads the input {name}, which has no fixed size"


@rule(
    "shift",
    Severity.ERROR,
    "Scales lie as far apart as the target's shifts reach.",
    "Move these scales closer together.",
)
def shift(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: AMD Quark, XINT8."""
    for node, row in rows_of(view, target):
        if not row.shifts or not runs_on_integers(node, view, target):
            continue
        found = _shifts(node, view, target)
        for name, (low, high) in row.shifts.items():
            value = found.get(name)
            if value is not None and not low <= value <= high:
                taken = f"{target.name} takes {low} to {high}"
                yield node.name, f"{_SHIFTS[name]} {value:g} powers of two, but {taken}"


_SHIFTS = {
    "product": "the scale of its output is above that of its products by",
    "bias": "the scale of its bias is above that of its products by",
    "sum": "the scale of its output is above the largest of its inputs by",
    "spread": "the scales of its inputs differ by",
}


def _shifts(node: NodeProto, view: QdqView, target: Target) -> dict[str, float]:
    """Return how far scales lie apart, in powers of two; nothing for a scale that is unknown."""
    spec = spec_of(node)
    names = spec.data_inputs(node)
    if spec.weight is not None and len(node.input) > spec.weight:
        names.append(node.input[spec.weight])
    inputs = [_exponent(activation_of(name, view, target)) for name in dict.fromkeys(names)]
    written = view.written(_behind_clipping(node, view, target))
    output, bias = _exponent(written[0] if written else None), _exponent(bias_of(node, view))
    known = [e for e in inputs if e is not None]
    found: dict[str, float] = {}
    if not known or len(known) < len(inputs):
        return found
    found["spread"] = max(known) - min(known)
    if output is not None:
        found["product"], found["sum"] = output - sum(known), output - max(known)
    if bias is not None:
        found["bias"] = bias - sum(known)
    return found


def _exponent(q: Quantized | None) -> float | None:
    """Return the logarithm of a single scale to the base 2."""
    if q is None or q.scale is None or q.scale.size != 1 or not float(q.scale.reshape(())) > 0:
        return None
    return math.log2(float(q.scale.reshape(())))


PLACES: tuple[Rule, ...] = (
    integer_operators, between, packed_constants, layer_input, layer_output, idle_pair, residual,
    shared_scale, one_width, moved, pattern, size, network_output, static, shift,
)  # fmt: skip
