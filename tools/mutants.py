"""Mutants of small models and calibration files: what a fault in a file, a tool or a hand may make of them.

A mutant is drawn by its seed and number alone: a base (a shipped model, or a tiny drawn one), and one to
three mutations of the model's fields, types, shapes, names, attributes, wiring and bytes, of the data beside
it, or of the calibration file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mutant_samples
import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from mutant_bases import EXTREME_FLOATS, Mutant, Rng, base, damaged, messages, pick
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

_TYPES = (0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 16, 17, 21, 22, 23, 99, -1)
_EXTREME_INTS = (0, 1, -1, 2, 3, 7, 2**31 - 1, -(2**31), 2**31, 2**32, 2**62, -(2**63), 2**63 - 1)
_STRINGS = (
    "",
    "x",
    "y",
    "w",
    "/../x",
    "a\nb",
    "[/red]",
    "\x1b[31m",
    "名",
    "n" * 3000,
    "ai.onnx",
    "com.microsoft",
    "no.such.domain",
    " ",
)
_OPERATORS = (
    "Add",
    "Mul",
    "Relu",
    "Conv",
    "MatMul",
    "Gemm",
    "Reshape",
    "Softmax",
    "Transpose",
    "Identity",
    "Cast",
    "Shape",
    "NoSuchOperator",
)


def mutant(seed: int, number: int) -> Mutant:
    """The mutant of a seed and a number."""
    rng = np.random.default_rng([seed, number])
    result = base(rng)
    names = list(_MUTATIONS)
    weights = np.array([weight for _, weight in _MUTATIONS.values()], float)
    for _ in range(int(rng.choice([1, 2, 3], p=[0.75, 0.2, 0.05]))):
        name = str(rng.choice(names, p=weights / weights.sum()))
        if result.model_bytes is not None and not name.startswith("data"):
            continue
        said = _MUTATIONS[name][0](result, rng)
        result.said.append(f"{name}: {said}")
    return result


# ---- mutations of the model --------------------------------------------------------------------------------
def _any_field(m: Mutant, rng: Rng) -> str:
    """Set, clear, double, or take from elsewhere any field of any message."""
    found = list(messages(m.model))
    path, message = pick(rng, found)
    what: Any = pick(rng, list(message.DESCRIPTOR.fields))
    where = f"{path}.{what.name}"
    held = getattr(message, what.name)
    repeated = not isinstance(held, (Message, str, bytes, int, float))
    if rng.random() < 0.3:
        message.ClearField(what.name)
        return f"{where} cleared"
    if what.type == FieldDescriptor.TYPE_MESSAGE:
        others = [x for _, x in found if x.DESCRIPTOR is what.message_type]
        content = pick(rng, others).SerializeToString() if others else b""
        target = held.add() if repeated else held
        target.ParseFromString(content)
        return f"{where} from elsewhere"
    value = _scalar(what, m, rng)
    if not repeated:
        setattr(message, what.name, value)
    elif len(held) and rng.random() < 0.7:
        held[int(rng.integers(len(held)))] = value
    else:
        held.append(value)
    return f"{where} = {str(value)[:60]!r}"


def _scalar(what: Any, m: Mutant, rng: Rng) -> Any:
    if what.type == FieldDescriptor.TYPE_STRING:
        return _name(m, rng)
    if what.type == FieldDescriptor.TYPE_BYTES:
        return bytes(rng.integers(0, 256, int(rng.integers(0, 40)), np.uint8))
    if what.type == FieldDescriptor.TYPE_ENUM:
        return int(pick(rng, what.enum_type.values).number)
    if what.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return pick(rng, EXTREME_FLOATS)
    low, high = {
        FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
        FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    }.get(what.type, (-(2**63), 2**63 - 1))
    return min(max(int(pick(rng, _EXTREME_INTS)), low), high)


def _name(m: Mutant, rng: Rng) -> str:
    names = [n for node in m.model.graph.node for n in (*node.input, *node.output)]
    return str(pick(rng, names if names and rng.random() < 0.5 else _STRINGS))


def _tensors(m: Mutant) -> list[TensorProto]:
    return [x for _, x in messages(m.model) if isinstance(x, TensorProto)]


def _infos(m: Mutant) -> list[Any]:
    return [x for _, x in messages(m.model) if isinstance(x, onnx.ValueInfoProto)]


def _nodes(m: Mutant) -> list[Any]:
    return [x for _, x in messages(m.model) if isinstance(x, onnx.NodeProto)]


def _type(m: Mutant, rng: Rng) -> str:
    value = int(pick(rng, _TYPES))
    if rng.random() < 0.5 and (tensors := _tensors(m)):
        tensor = pick(rng, tensors)
        tensor.data_type = value
        return f"tensor {tensor.name} has type {value}"
    info = pick(rng, _infos(m) or [onnx.ValueInfoProto()])
    if rng.random() < 0.2:
        info.ClearField("type")
        return f"{info.name} has no type"
    info.type.tensor_type.elem_type = value
    return f"{info.name} has type {value}"


def _shape(m: Mutant, rng: Rng) -> str:
    infos = _infos(m)
    if not infos:
        return "nothing"
    info = pick(rng, infos)
    shape = info.type.tensor_type.shape
    how = int(rng.integers(5))
    if how == 0:
        info.type.tensor_type.ClearField("shape")
    elif how == 1:
        shape.dim.add().dim_value = int(pick(rng, _EXTREME_INTS))
    elif how == 2 and len(shape.dim):
        del shape.dim[int(rng.integers(len(shape.dim)))]
    elif len(shape.dim):
        dim = pick(rng, shape.dim)
        if how == 3:
            dim.dim_param = str(pick(rng, _STRINGS))
        else:
            dim.dim_value = int(pick(rng, _EXTREME_INTS))
    return f"{info.name} has shape {str([d.dim_param or d.dim_value for d in shape.dim])[:100]}"


def _dims(m: Mutant, rng: Rng) -> str:
    tensors = [t for t in _tensors(m) if len(t.dims)]
    if not tensors:
        return "nothing"
    tensor = pick(rng, tensors)
    how, k = int(rng.integers(4)), int(rng.integers(len(tensor.dims)))
    if how == 0:
        tensor.dims[k] = int(pick(rng, _EXTREME_INTS))
    elif how == 1:
        del tensor.dims[k]
    elif how == 2:
        tensor.dims.insert(k, int(pick(rng, (1, 2, 0, -1))))
    else:
        turned = list(tensor.dims)[::-1]
        del tensor.dims[:]
        tensor.dims.extend(turned)
    return f"{tensor.name} has dims {list(tensor.dims)}"


def _values(m: Mutant, rng: Rng) -> str:
    """Other numbers in a constant: extreme, equal, or none."""
    tensors = [
        t for t in m.model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.raw_data) >= 4
    ]
    if not tensors:
        return "nothing"
    tensor = pick(rng, tensors)
    value = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 4 * 4], np.float32).copy()
    how = float(pick(rng, (*EXTREME_FLOATS, 1e20, 1e-20, 1e-42)))
    if rng.random() < 0.5:
        value[int(rng.integers(len(value)))] = how
    elif rng.random() < 0.5:
        value *= np.float32(rng.choice([1e10, 1e-10, -1, 1e-38]))
        how = float("nan") if not np.isfinite(value).all() else 0.5
    else:
        value[:] = how
    tensor.raw_data = value.tobytes()
    return f"values of {tensor.name}, {how}"


def _raw(m: Mutant, rng: Rng) -> str:
    tensors = [t for t in _tensors(m) if t.HasField("raw_data")]
    if not tensors:
        return "nothing"
    tensor = pick(rng, tensors)
    data = bytearray(tensor.raw_data)
    how = int(rng.integers(3))
    if how == 0 and data:
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    elif how == 1:
        del data[int(rng.integers(len(data) + 1)) :]
    else:
        data += bytes(int(rng.integers(1, 9)))
    tensor.raw_data = bytes(data)
    return f"{tensor.name} has {len(data)} bytes"


def _rename(m: Mutant, rng: Rng) -> str:
    node = pick(rng, _nodes(m) or [onnx.NodeProto()])
    places = [(node.input, k) for k in range(len(node.input))] + [
        (node.output, k) for k in range(len(node.output))
    ]
    new = _name(m, rng)
    if not places or rng.random() < 0.3:
        old, node.name = node.name, new
        return f"node {old!r} is {new[:40]!r}"
    names, k = pick(rng, places)
    old, names[k] = names[k], new
    return f"tensor {old!r} of {node.op_type} is {new[:40]!r}"


def _everywhere(m: Mutant, rng: Rng) -> str:
    """Another name for a tensor, wherever it is named: valid."""
    old = _name(m, rng)
    new = str(
        pick(
            rng,
            (
                "a b",
                "名前",
                "[/red]",
                "n" * 2000,
                "x_quantized",
                "y/DequantizeLinear",
                "loss",
                "w_bn",
                "\x1b[0m",
            ),
        )
    )
    for _, message in messages(m.model):
        for what, value in message.ListFields():
            if what.type == FieldDescriptor.TYPE_STRING and what.name in ("input", "output", "name"):
                if isinstance(value, str):
                    setattr(message, what.name, new if value == old else value)
                else:
                    value[:] = [new if v == old else v for v in value]
    if old in m.samples:
        m.samples[new] = m.samples.pop(old)
    return f"{old!r} is {new[:40]!r} everywhere"


def _operator(m: Mutant, rng: Rng) -> str:
    node = pick(rng, _nodes(m) or [onnx.NodeProto()])
    old = node.op_type
    if rng.random() < 0.2:
        node.domain = str(pick(rng, ("com.microsoft", "ai.onnx", "ai.onnx.ml", "no.such.domain")))
    else:
        node.op_type = str(pick(rng, _OPERATORS))
    return f"{old} is {node.domain}:{node.op_type}"


def _attribute(m: Mutant, rng: Rng) -> str:
    nodes = [n for n in _nodes(m) if len(n.attribute)]
    if not nodes or rng.random() < 0.2:
        node = pick(rng, _nodes(m) or [onnx.NodeProto()])
        name = str(
            pick(
                rng,
                (
                    "axis",
                    "alpha",
                    "group",
                    "pads",
                    "transA",
                    "keepdims",
                    "strides",
                    "auto_pad",
                    "to",
                    "dilations",
                    "kernel_shape",
                ),
            )
        )
        node.attribute.append(
            helper.make_attribute(
                name, pick(rng, (0, 1, -1, 2, 0.5, [1, 1], [2, 2, 2, 2], "SAME_UPPER", "VALID", 2**40))
            )
        )
        return f"{node.op_type} has {name}"
    node = pick(rng, nodes)
    item = pick(rng, node.attribute)
    small = [0, 1, 2, -1, -2, 5, *_EXTREME_INTS]
    if item.type == onnx.AttributeProto.INTS and len(item.ints) and rng.random() < 0.7:
        item.ints[int(rng.integers(len(item.ints)))] = int(pick(rng, small))
    elif item.type == onnx.AttributeProto.INT and rng.random() < 0.7:
        item.i = int(pick(rng, small))
    elif rng.random() < 0.5:
        item.type = int(rng.integers(0, 15))
    else:
        node.attribute.remove(item)
    return f"{node.op_type}.{item.name} is {str(item).split(chr(10))[1:3]}"


def _wiring(m: Mutant, rng: Rng) -> str:
    """Nodes and other entries left out, doubled, moved, or nested."""
    graph = m.model.graph
    entries = pick(
        rng, (graph.node, graph.node, graph.initializer, graph.input, graph.output, graph.value_info)
    )
    if not len(entries):
        return "nothing"
    k, how = int(rng.integers(len(entries))), int(rng.integers(4))
    said = f"{type(entries[k]).__name__} {k}"
    if how == 0:
        del entries[k]
        return f"{said} left out"
    if how == 1:
        entries.add().CopyFrom(entries[k])
        return f"{said} doubled"
    if how == 2:
        order = [type(e).FromString(e.SerializeToString()) for e in entries]
        del entries[:]
        entries.extend(order[j] for j in rng.permutation(len(order)))
        return f"{said} and others shuffled"
    name = _name(m, rng)
    graph.output.append(onnx.ValueInfoProto(name=name))
    return f"{name[:40]!r} is an output, too"


def _nested(m: Mutant, rng: Rng) -> str:
    """An If in an If, many times."""
    depth = int(pick(rng, (2, 5, 20, 28)))
    source, sink = m.model.graph.input[0].name if m.model.graph.input else "x", "deep"
    body = helper.make_graph(
        [helper.make_node("Identity", [source], ["deepest"])], "b", [], [onnx.ValueInfoProto(name="deepest")]
    )
    for k in range(depth):
        other = helper.make_graph(
            [helper.make_node("Identity", [source], [f"other{k}"])],
            "o",
            [],
            [onnx.ValueInfoProto(name=f"other{k}")],
        )
        node = helper.make_node("If", ["deep_yes"], [f"deep{k}"], then_branch=body, else_branch=other)
        body = helper.make_graph([node], "b", [], [onnx.ValueInfoProto(name=f"deep{k}")])
    m.model.graph.initializer.append(numpy_helper.from_array(np.array(True), "deep_yes"))
    m.model.graph.node.append(
        helper.make_node("If", ["deep_yes"], [sink], then_branch=body, else_branch=body)
    )
    m.model.graph.output.append(onnx.ValueInfoProto(name=sink))
    return f"{depth} deep"


def _versions(m: Mutant, rng: Rng) -> str:
    if rng.random() < 0.4:
        m.model.ir_version = int(pick(rng, (0, 1, 2, 3, 4, 5, 7, 9, 10, 11, 12, 13, 14, 99, -1, 2**40)))
        return f"IR {m.model.ir_version}"
    opset = (
        pick(rng, m.model.opset_import)
        if len(m.model.opset_import) and rng.random() < 0.8
        else m.model.opset_import.add()
    )
    if rng.random() < 0.2:
        opset.domain = str(pick(rng, ("ai.onnx", "com.microsoft", "ai.onnx.ml", "no.such.domain", "")))
    else:
        opset.version = int(
            pick(
                rng, (0, 1, 5, 7, 8, 9, 10, 11, 12, 13, 15, 18, 19, 20, 21, 22, 23, 24, 25, 30, 99, -1, 2**40)
            )
        )
    return f"opset {opset.domain}:{opset.version}"


def _bytes(m: Mutant, rng: Rng) -> str:
    """The file is cut, longer, or has other bytes."""
    m.model_bytes = damaged(m.model.SerializeToString(), rng)
    return f"{len(m.model_bytes)} bytes"


def _external(m: Mutant, rng: Rng) -> str:
    """Weights in a file beside the model, as they should be or not."""
    data, said = bytearray(), "valid"
    tensors = [t for t in m.model.graph.initializer if t.HasField("raw_data")]
    for tensor in tensors:
        set_external_data(tensor, "model.data", offset=len(data), length=len(tensor.raw_data))
        data += tensor.raw_data
        tensor.ClearField("raw_data")
    if tensors and rng.random() < 0.7:
        tensor = pick(rng, tensors)
        entry = pick(rng, tensor.external_data)
        new = {
            "location": (
                "../model.data",
                "/etc/passwd",
                "",
                "none.data",
                ".",
                "a/../model.data",
                "model.data/",
                "sub/../../model.data",
            )
        }
        entry.value = str(
            pick(rng, new.get(entry.key, ("-1", "x", "", "0", "1", "99999999999999999999", "7")))
        )
        said = f"{entry.key} of {tensor.name} is {entry.value!r}"
    m.beside["model.data"] = bytes(data)
    return said


_MUTATIONS: dict[str, tuple[Callable[[Mutant, Rng], str], float]] = {
    "field": (_any_field, 3),
    "type": (_type, 1.5),
    "shape": (_shape, 2),
    "dims": (_dims, 1),
    "values": (_values, 2),
    "raw data": (_raw, 0.7),
    "name": (_rename, 1),
    "name everywhere": (_everywhere, 1.2),
    "operator": (_operator, 1),
    "attribute": (_attribute, 2),
    "wiring": (_wiring, 1.5),
    "nesting": (_nested, 0.2),
    "versions": (_versions, 1.2),
    "bytes": (_bytes, 1.5),
    "external data": (_external, 1),
    "data values": (mutant_samples.data_values, 0.8),
    "data members": (mutant_samples.data_members, 0.4),
    "data bytes": (mutant_samples.data_bytes, 0.5),
}
