"""Bytes that parts of a model take in its file, without writing it."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import initializers


def field_bytes(length: int) -> int:
    """Return the bytes of a field of ``length`` bytes with its tag and length (protobuf's wire format)."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length


def tensor_bytes(tensor: TensorProto, content: int) -> int:
    """Return the bytes of an initializer in a graph whose value takes ``content`` bytes.

    Parameters
    ----------
    tensor : TensorProto
        Name, type and shape.
    content : int
    """
    bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return field_bytes(int(bare.ByteSize()) + field_bytes(content))


def file_bytes(model: ModelProto, more: int = 0) -> int:
    """Return the size of a model's file; values that are stored apart count as if they were in it.

    Parameters
    ----------
    model : ModelProto
    more : int
        Bytes by which the graph in the file is larger.
    """
    graph, apart = int(model.graph.ByteSize()), [t for t in initializers(model.graph) if store.is_stored(t)]
    within = sum(tensor_bytes(t, store.value_bytes(t)) - field_bytes(int(t.ByteSize())) for t in apart)
    return int(model.ByteSize()) - field_bytes(graph) + field_bytes(graph + within + more)


class Tally(edit.Builder):
    """A builder that counts what is added to it, and keeps no values."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(ModelProto(), prefix)
        self._contents = 0

    def keep(self, value: NDArray[Any], name: str, type_name: str | None = None) -> None:
        """Count an initializer."""
        kind = (
            helper.np_dtype_to_tensor_dtype(value.dtype)
            if type_name is None
            else TensorProto.DataType.Value(type_name.upper())
        )
        self._contents += tensor_bytes(TensorProto(name=name, data_type=kind, dims=value.shape), value.nbytes)

    @property
    def bytes(self) -> int:
        """Return the bytes of all nodes and initializers in a graph."""
        return self._contents + sum(field_bytes(int(node.ByteSize())) for node in self.nodes)
