"""Compute and store a model in float16 or bfloat16 where its operators can, and in float32 elsewhere.

Inputs and outputs of the model keep their types, and so do values inside subgraphs. A tensor that is needed
in both types gets a Cast. Quantizers stay float32, with Casts around them, although ONNX has scales in
float16 from opset 19 on: onnxruntime 1.19 loses 10 dB with these, and integer kernels do not take them.
TensorRT and OpenVINO run the same integer kernels with both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import QUANTIZERS, GraphView, int_attribute
from eptq_onnx.graph.widen import other_float_types, widen
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import node_reads, subgraphs

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
_LARGEST: dict[int, float] = {
    TensorProto.FLOAT16: 65504.0,
    TensorProto.BFLOAT16: float(np.finfo(np.float32).max),
}
_EXACT: dict[int, float] = {TensorProto.FLOAT16: 2.0**11, TensorProto.BFLOAT16: 2.0**8}
"""Up to here, all integers are exact."""


@dataclass
class Narrowed:
    """A model with a narrower float type.

    Parameters
    ----------
    model : ModelProto
    narrow : int
        Number of nodes that compute in the narrow type.
    wide : dict of str to str
        Nodes that compute in float32, each with the reason.
    """

    model: ModelProto
    narrow: int = 0
    wide: dict[str, str] = field(default_factory=dict)


def narrow(model: ModelProto, to: int, largest: Mapping[str, float], wide: Collection[str] = ()) -> Narrowed:
    """Return a copy that computes in a narrower type.

    Parameters
    ----------
    model : ModelProto
        Computes in float32; it is not changed.
    to : int
        `TensorProto.FLOAT16` or `TensorProto.BFLOAT16`.
    largest : mapping of str to float
        Tensor to its largest finite magnitude. Nodes that read or make a tensor beyond the range of the
        narrow type stay float32.
    wide : collection of str
        Nodes that stay float32 in any case.
    """
    return _Narrowing(infer_shapes(model), to, largest, wide).run()


class _Narrowing:
    def __init__(
        self, model: ModelProto, to: int, largest: Mapping[str, float], wide: Collection[str]
    ) -> None:
        self._model, self._to, self._largest, self._wide = model, to, largest, wide
        self._name = TensorProto.DataType.Name(to).lower()
        self._view = GraphView(model)
        self._opsets = {o.domain: int(o.version) for o in model.opset_import}
        self._result = Narrowed(model)
        self._fixed = _fixed(self._view)
        self._b = edit.Builder(model)
        self._reasons = {id(n): self._why_wide(n) for n in self._view.nodes}
        self._made_narrow = {
            o
            for n in self._view.nodes
            if self._reasons[id(n)] == ""
            for k, o in enumerate(n.output)
            if self._is_float(o) and self._allowed(n, k, output=True)
        }
        self._needs_wide = self._read_wide()
        self._versions: dict[tuple[str, bool], str] = {}

    def run(self) -> Narrowed:
        result = self._result
        for node in self._view.nodes:
            reason = self._reasons[id(node)]
            if reason:
                result.wide[node.name or node.output[0]] = reason
            result.narrow += reason == ""
            self._b.nodes.extend([*self._casts_for(node), self._typed(node)])
            for name in node.output:
                if name in self._made_narrow and name in self._needs_wide:
                    self._b.add("Cast", [self._narrow_name(name)], name, to=TensorProto.FLOAT)
        result.model = edit.with_nodes(self._model, self._b.nodes, self._b.initializers)
        for info in result.model.graph.value_info:
            if info.name in self._made_narrow and info.name not in self._needs_wide:
                info.type.tensor_type.elem_type = self._to
        edit.prune(result.model)
        return result

    # ---- what is narrow ------------------------------------------------------------------------------------
    def _is_float(self, name: str) -> bool:
        return bool(name) and self._view.elem_type(name) == TensorProto.FLOAT

    def _why_wide(self, node: NodeProto) -> str | None:
        """Return why a node stays float32; empty if it does not, None if that needs no reason."""
        floats = [i for i in dict.fromkeys((*node.input, *node.output)) if self._is_float(i)]
        if subgraphs(node):
            return f"{node.op_type} has subgraphs"
        if not floats or node.op_type in QUANTIZERS or node.name in self._wide:
            return None
        if self._fixed.issuperset(filter(None, node.output)):
            # Runtimes fold it when they load the model. onnxruntime has no kernel to fold a float16 Mul with.
            return None
        if node.domain not in ("", "ai.onnx"):
            return f"{node.domain}.{node.op_type} may not support {self._name}"
        if any(
            self._is_float(o) and not self._allowed(node, k, output=True) for k, o in enumerate(node.output)
        ):
            return f"{node.op_type} does not support {self._name} in opset {self._opsets.get('', 0)}"
        reads = [i for k, i in enumerate(node.input) if self._is_float(i) and self._allowed(node, k)]
        if not reads and not any(self._is_float(o) for o in node.output):
            return f"{node.op_type} does not support {self._name} in opset {self._opsets.get('', 0)}"
        for name in (*reads, *(o for o in node.output if self._is_float(o))):
            if self._magnitude(name) > _LARGEST[self._to]:
                return f"values of {name} exceed the range of {self._name}"
            if node.op_type == "Cast" and self._counts(node) and self._magnitude(name) > _EXACT[self._to]:
                return f"{self._name} does not hold the integers of {name} exactly"
        return self._why_constant(node, reads)

    def _why_constant(self, node: NodeProto, reads: Collection[str]) -> str:
        """Return why the constants of a node need float32; empty if they do not."""
        for name in reads:
            if not self._view.is_constant(name):
                continue
            value = self._view.constant(name)
            kept = self._converted(value).astype(np.float32)
            if value.size == 1 and value.any() and not kept.any():
                return f"{name} vanishes in {self._name}"
        return ""

    def _counts(self, node: NodeProto) -> bool:
        """Return True if a Cast converts from or to integers that may be sizes or places."""
        kinds = self._view.elem_type(node.input[0]), int_attribute(node, "to", 0)
        return bool({TensorProto.INT32, TensorProto.INT64} & set(kinds))

    def _magnitude(self, name: str) -> float:
        if not self._view.is_constant(name):
            return self._largest.get(name, 0.0)
        value = np.abs(self._view.constant(name))
        return float(value[np.isfinite(value)].max(initial=0))

    def _allowed(self, node: NodeProto, place: int, *, output: bool = False) -> bool:
        """Return True if an operator takes or makes the narrow type at a place."""
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opsets.get("", 1), "")
        except onnx.defs.SchemaError:
            return False
        formal = schema.outputs if output else schema.inputs
        kind = formal[min(place, len(formal) - 1)]
        return f"tensor({self._name})" in kind.types

    def _read_wide(self) -> set[str]:
        """Return the tensors that something needs in float32."""
        needed = {o.name for o in self._model.graph.output if self._is_float(o.name)}
        for node in self._view.nodes:
            if subgraphs(node):
                needed.update(node_reads(node))
            needed.update(
                i for k, i in enumerate(node.input) if self._is_float(i) and not self._reads_narrow(node, k)
            )
        return needed

    def _reads_narrow(self, node: NodeProto, place: int) -> bool:
        return self._reasons[id(node)] == "" and self._allowed(node, place)

    # ---- names and nodes -----------------------------------------------------------------------------------
    def _narrow_name(self, name: str) -> str:
        """Return the name of a tensor in the narrow type; its own, if nothing needs it in float32."""
        if name in self._made_narrow and name not in self._needs_wide:
            return name
        key = name, True
        if key not in self._versions:
            self._versions[key] = self._b.unique(f"{name}/{self._name}")
        return self._versions[key]

    def _casts_for(self, node: NodeProto) -> list[NodeProto]:
        """Return the Casts to the narrow type that a node needs first, and keep its constants."""
        casts = []
        for k, name in enumerate(node.input):
            if not self._is_float(name) or not self._reads_narrow(node, k) or name in self._made_narrow:
                continue
            if (name, True) in self._versions:
                continue
            own = self._narrow_name(name)
            if self._view.is_constant(name):
                self._keep(name, own)
            else:
                casts.append(
                    helper.make_node("Cast", [name], [own], name=self._b.unique(f"{own}/Cast"), to=self._to)
                )
        return casts

    def _keep(self, name: str, own: str) -> None:
        value = self._view.constant(name)
        if self._to == TensorProto.FLOAT16:
            self._b.keep(self._converted(value), own)
            return
        raw = _bfloat16(value).tobytes()
        self._b.initializers.append(
            store.stored(
                TensorProto(name=own, data_type=self._to, dims=value.shape, raw_data=raw),
                store.folder_of(self._model),
            )
        )

    def _converted(self, value: NDArray[np.float32]) -> NDArray[np.generic]:
        """Return values as they are in the narrow type."""
        if self._to == TensorProto.FLOAT16:
            with np.errstate(over="ignore"):
                return value.astype(np.float16)
        return (_bfloat16(value).astype(np.uint32) << 16).view(np.float32)

    def _typed(self, node: NodeProto) -> NodeProto:
        """Return a copy of a node that reads and makes the types chosen for it."""
        copy = edit.renamed(node, {})
        if self._reasons[id(node)] != "":
            return copy
        for k, name in enumerate(node.input):
            if self._is_float(name) and self._reads_narrow(node, k):
                copy.input[k] = self._narrow_name(name)
        for k, name in enumerate(node.output):
            if name in self._made_narrow:
                copy.output[k] = self._narrow_name(name)
        for item in copy.attribute:
            if item.name in _TYPE_ATTRIBUTES and item.i == TensorProto.FLOAT:
                item.i = self._to
            elif item.type == AttributeProto.TENSOR and item.t.data_type == TensorProto.FLOAT:
                value = store.array(item.t)
                if self._to == TensorProto.FLOAT16:
                    item.t.CopyFrom(onnx.numpy_helper.from_array(self._converted(value), item.t.name))
                else:
                    item.t.CopyFrom(
                        TensorProto(
                            name=item.t.name,
                            data_type=self._to,
                            dims=value.shape,
                            raw_data=_bfloat16(value).tobytes(),
                        )
                    )
        return copy


def _fixed(view: GraphView) -> set[str]:
    """Return the tensors that nodes compute from constants alone."""
    found: set[str] = set()
    for node in view.nodes:
        if node.op_type not in QUANTIZERS and all(view.is_constant(i) or i in found for i in node.input if i):
            found.update(node.output if node.input and not subgraphs(node) else ())
    return found


def _bfloat16(value: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(value.shape)


def emulated(model: ModelProto) -> ModelProto:
    """Return a model that rounds in float32 where a model rounds to bfloat16; itself if it has none.

    onnxruntime's CPU provider computes nothing in bfloat16, but casts.
    """
    if "bfloat16" not in other_float_types(model):
        return model
    view, result = GraphView(infer_shapes(model)), widen(model)
    builder = edit.Builder(result)
    for node in result.graph.node:
        copy = edit.renamed(node, {})
        builder.nodes.append(copy)
        for k, name in enumerate(node.output):
            if name and view.elem_type(name) == TensorProto.BFLOAT16:
                copy.output[k] = builder.unique(f"{name}/exact")
                short = builder.add("Cast", [copy.output[k]], to=TensorProto.BFLOAT16)
                builder.add("Cast", [short], name, to=TensorProto.FLOAT)
    return edit.with_nodes(result, builder.nodes)
