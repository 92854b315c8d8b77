"""Reading and writing ONNX files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, checker, numpy_helper

from eptq_onnx.errors import ModelError, one_line
from eptq_onnx.files import Replacement, data_file, write_atomically
from eptq_onnx.graph import nbits
from eptq_onnx.graph.canonical import make_canonical
from eptq_onnx.graph.check import check as check_declared
from eptq_onnx.graph.check import fault, labelled_tensors, read_names
from eptq_onnx.graph.external import OutsideError, place_of, with_values, write_external
from eptq_onnx.graph.repair import repair
from eptq_onnx.graph.sound import make_sound
from eptq_onnx.graph.unquantize import Quantization, unquantized
from eptq_onnx.graph.view import opset_of
from eptq_onnx.proto import store, weights
from eptq_onnx.proto.bodies import all_nodes, initializers
from eptq_onnx.runtime import PROTOBUF_LIMIT

_RUNTIMES_OWN = {"SimplifiedLayerNormalization"}


def load(
    model: str | os.PathLike[str] | bytes | ModelProto, folder: str | None = None, *, quantized: bool = False
) -> ModelProto:
    """Read a model with its external data, and check it.

    Parameters
    ----------
    model : path, bytes or ModelProto
        A ModelProto is copied, never changed.
    folder : str, optional
        Folder for the weights of a large model; see `eptq_onnx.proto.store`.
    quantized : bool
        True if the model may be quantized, for whichever runtime: onnxruntime is not asked about it.

    Raises
    ------
    ModelError
        If the file does not exist, is not valid ONNX, or is quantized in a form that is not read. One that is
        quantized is returned without its quantizers; see `eptq_onnx.graph.unquantize`.
    """
    proto, name = _loaded(model, folder, quantized=quantized)
    return proto if quantized else _float_form(proto, name, folder)[0]


def load_with_quantization(
    model: str | os.PathLike[str] | bytes | ModelProto, folder: str | None = None, *, blocks: bool = False
) -> tuple[ModelProto, ModelProto, Quantization]:
    """Return a model as it is given, without its quantizers, and how it is quantized; see `load`.

    With ``blocks``, MatMulNBits are products with float weights, too.
    """
    proto, name = _loaded(model, folder, quantized=False)
    found, quantization = _float_form(proto, name, folder)
    if blocks and (count := nbits.products(found)):
        found, quantization.other_weights = nbits.as_floats(found), quantization.other_weights + count
    return proto, found, quantization


def _float_form(proto: ModelProto, name: str, folder: str | None) -> tuple[ModelProto, Quantization]:
    """Return a model without its quantizers, whose weights take more memory, and how it was quantized."""
    found, quantization = unquantized(proto, name)
    if found is not proto and folder is not None and _is_heavy(found):
        found = weights.stored(found, folder)
    return found, quantization


def _loaded(
    model: str | os.PathLike[str] | bytes | ModelProto, folder: str | None, *, quantized: bool
) -> tuple[ModelProto, str]:
    """Return a model, as it is, and its name in messages."""
    if isinstance(model, (ModelProto, bytes)):
        name, proto = "the model", _parse(model, "the model") if isinstance(model, bytes) else model
        unread = check_declared(proto, name)
        apart = next((t.name for _, t in labelled_tensors(proto) if store.is_stored(t)), None)
        if apart is not None:
            raise ModelError(
                f"the weight {apart} is in a file beside the model, whose folder is unknown: "
                "give the path of the model."
            )
        if proto is not model:
            _leave_out(proto, unread)
    else:
        path = Path(model)
        name, proto = str(path), read_file(path)
        unread = check_declared(proto, name)
        try:
            unread |= _unread_elsewhere(proto, path)
            _leave_out(proto, unread)
            if any(store.is_stored(t) for _, t in labelled_tensors(proto)):
                proto = with_values(proto, path, folder if _is_heavy(proto) else None)
        except (OSError, ValueError) as e:
            raise ModelError(f"the external data of {name} cannot be read: {one_line(e, None)}.") from e
    if proto is model and (unread or folder is None or not _is_heavy(proto)):
        proto = ModelProto()
        proto.CopyFrom(model)
        _leave_out(proto, unread)
    if folder is not None and _is_heavy(proto):
        proto = weights.stored(proto, folder)
    repair(proto, name)
    if not quantized:
        make_sound(proto, name)
    make_canonical(proto)
    _check(proto, name)
    _densify(proto)
    return proto, name


def _unread_elsewhere(proto: ModelProto, path: Path) -> set[str]:
    """Return the unread initializers whose external data is missing or damaged.

    onnxruntime does not read it.
    """
    read, found = read_names(proto.graph), set()
    for tensor in proto.graph.initializer:
        if tensor.name not in read and store.is_stored(tensor) and not fault(tensor):
            try:
                place_of(tensor, path)
            except OutsideError:
                raise
            except (OSError, ValueError):
                found.add(tensor.name)
    return found


def _leave_out(proto: ModelProto, names: set[str]) -> None:
    for k in reversed(range(len(proto.graph.initializer) if names else 0)):
        if proto.graph.initializer[k].name in names:
            del proto.graph.initializer[k]


def read_file(path: Path) -> ModelProto:
    """Read a model file without its external data."""
    if not path.is_file():
        raise ModelError(f"model file {path} does not exist.")
    try:
        return _parse(path.read_bytes(), str(path))
    except OSError as e:
        raise ModelError(f"model file {path} cannot be read: {e.strerror}.") from e


def _is_heavy(proto: ModelProto) -> bool:
    values = sum(math.prod(t.dims) for t in initializers(proto.graph))
    return bool(4 * values > min(store.APART, store.LARGE))


def _densify(proto: ModelProto) -> None:
    """Convert sparse initializers to dense ones, in place."""
    for sparse in proto.graph.sparse_initializer:
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        dense[tuple(places.T) if places.ndim == 2 else np.unravel_index(places, dense.shape)] = values
        proto.graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del proto.graph.sparse_initializer[:]


def _parse(data: bytes, name: str) -> ModelProto:
    try:
        proto = onnx.load_model_from_string(data)
    except DecodeError as e:
        raise ModelError(f"{name} is not an ONNX model, or it is damaged or nested too deep.") from e
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"{name} is not an ONNX model, or its graph has no nodes.")
    return proto


def check(model: ModelProto, *, full: bool = False) -> None:
    """Run onnx's checker.

    The checker does not know onnxruntime's own operators in the default domain; these are moved to another
    domain for the check.

    Raises
    ------
    onnx.checker.ValidationError
        If the model is not valid; with ``full``, also an inference error.
    """
    own = [n for n in all_nodes(model.graph) if n.op_type in _RUNTIMES_OWN and not n.domain]
    versions = len(model.opset_import)
    if own and not opset_of(model, "com.microsoft"):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for node in own:
        node.domain = "com.microsoft"
    # The checker requires shapes of inputs and outputs, unlike onnxruntime.
    tensors = [
        i.type.tensor_type
        for i in (*model.graph.input, *model.graph.output)
        if i.type.HasField("tensor_type")
    ]
    shapeless = [t for t in tensors if not t.HasField("shape")]
    for tensor in shapeless:
        tensor.shape.SetInParent()
    try:
        checker.check_model(model)
        for tensor in shapeless:
            tensor.ClearField("shape")
        if full:
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    finally:
        for tensor in shapeless:
            tensor.ClearField("shape")
        del model.opset_import[versions:]
        for node in own:
            node.domain = ""


def _check(proto: ModelProto, name: str) -> None:
    light, _ = weights.light(proto)
    try:
        check(light)
    except checker.ValidationError as e:
        raise ModelError(f"{name} is not valid ONNX: {one_line(e)}") from e


def save(model: ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model; above protobuf's limit of 2 GiB, its weights go to ``<name>.data`` beside it.

    Raises
    ------
    OutputError
        If the model cannot be written; existing files are then unchanged.
    """
    if model.ByteSize() < PROTOBUF_LIMIT:
        write_atomically(path, model.SerializeToString(deterministic=True))
        return
    # The data file is replaced first, so that the model file never refers to a missing file.
    with Replacement(data_file(path), path) as (data, temporary):
        write_external(model, Path(temporary), Path(data), data_file(path).name)
