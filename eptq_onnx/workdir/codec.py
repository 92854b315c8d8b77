"""Encode and decode values of a run: numbers, containers, arrays, models, and the package's records.

Decoding executes nothing: only the package's own dataclasses and enums are known, by name. Arrays keep their
type, shape and memory layout, because sums follow the order of memory.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.errors import OutputError
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import initializers

_HEAVY = 2**16
"""Bytes from which an array is stored as an object of its own."""
_PACKAGE = "eptq_onnx."
_KIND = "@"
"""Key of the kind of a JSON object."""


class Sink(Protocol):
    """Stores contents, and returns the digest that finds each again."""

    def put(self, content: bytes | memoryview) -> str:
        """Store a content."""
        ...

    def put_file(self, path: str) -> str:
        """Store the content of a file."""
        ...


class Source(Protocol):
    """Returns contents by their digests."""

    def get(self, digest: str) -> bytes:
        """Return a content."""
        ...

    def mapped(self, digest: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a content as a flat array, mapped copy-on-write."""
        ...

    def file(self, digest: str, folder: str) -> str:
        """Return a file in ``folder`` with a content."""
        ...


def digest_of(content: bytes | memoryview) -> str:
    """Return the digest of a content, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=20).hexdigest()


class HashOnly:
    """A sink that computes digests and stores nothing."""

    def put(self, content: bytes | memoryview) -> str:
        """Return the digest of a content."""
        return digest_of(content)

    def put_file(self, path: str) -> str:
        """Return the digest of a file."""
        with open(path, "rb") as file:
            return hash_of_file(file.read)


def hash_of_file(read: Callable[[int], bytes]) -> str:
    """Return the digest of what ``read`` returns until it is empty."""
    state = hashlib.blake2b(digest_size=20)
    while part := read(2**24):
        state.update(part)
    return state.hexdigest()


def encode(value: object, sink: Sink) -> str:
    """Store a value.

    Parameters
    ----------
    value : object
        None, a number, text, bytes, an enum, a container or record of such, an array, or a model.
    sink : Sink

    Returns
    -------
    str
        Digest of the value.

    Raises
    ------
    TypeError
        If a part has another type.
    """
    return sink.put(json.dumps(_tree(value, sink), separators=(",", ":")).encode())


def decode(digest: str, source: Source, folder: str | None = None) -> Any:
    """Load a value.

    Parameters
    ----------
    digest : str
    source : Source
    folder : str, optional
        Where the weights of a large model go.

    Raises
    ------
    OutputError
        If the value is damaged.
    """
    tree = json.loads(source.get(digest))
    try:
        return _value(tree, source, folder)
    except (LookupError, AttributeError, TypeError, ImportError) as e:
        raise damaged(f"value {digest}") from e


def damaged(what: str) -> OutputError:
    """Return the error for a part of a workdir that is not what it was."""
    return OutputError(f"the {what} of the workdir is damaged: remove the folder, and run again.")


def objects_of(digest: str, source: Source) -> set[str]:
    """Return the digests of all contents of a value."""
    found = {digest}
    queue: list[Any] = [json.loads(source.get(digest))]
    while queue:
        tree = queue.pop()
        if isinstance(tree, list):
            queue.extend(tree)
        elif isinstance(tree, dict):
            kind = tree.get(_KIND)
            if kind == "array" and "object" in tree:
                found.add(tree["object"])
            if kind == "model":
                found |= {tree["object"], *(weight for _, weight, _ in tree["weights"])}
            queue.extend(tree.values())
    return found


def _tree(value: object, sink: Sink) -> Any:
    """Return a value as JSON."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Enum):
        return {_KIND: "enum", "class": _name(type(value)), "value": _tree(value.value, sink)}
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_tree(value, sink)
    if isinstance(value, bytes):
        return {_KIND: "bytes", "data": _text(value)}
    if isinstance(value, list):
        return [_tree(v, sink) for v in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", "of": [_tree(v, sink) for v in value]}
    if isinstance(value, (set, frozenset)):
        # In an order of their own: that of a set is another one in every process.
        return {_KIND: type(value).__name__, "of": sorted((_tree(v, sink) for v in value), key=json.dumps)}
    if isinstance(value, Mapping):
        return {_KIND: "dict", "of": [[_tree(k, sink), _tree(v, sink)] for k, v in value.items()]}
    if isinstance(value, ModelProto):
        return _model_tree(value, sink)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _tree(getattr(value, f.name), sink) for f in dataclasses.fields(value) if f.init}
        return {_KIND: "record", "class": _name(type(value)), "fields": fields}
    raise TypeError(f"a {type(value).__name__} cannot be kept")


def _value(tree: Any, source: Source, folder: str | None) -> Any:
    """Return the value of its JSON."""
    if isinstance(tree, list):
        return [_value(v, source, folder) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree[_KIND]
    if kind == "array":
        return _array(tree, source)
    if kind == "bytes":
        return base64.b64decode(tree["data"])
    if kind == "model":
        return _model(tree, source, folder)
    if kind == "enum":
        return _class(tree["class"])(_value(tree["value"], source, folder))
    if kind == "record":
        return _class(tree["class"])(
            **{name: _value(v, source, folder) for name, v in tree["fields"].items()}
        )
    values = _value(tree["of"], source, folder)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](values)


def _array_tree(value: NDArray[Any] | np.generic, sink: Sink) -> dict[str, Any]:
    array = np.asarray(value)
    if np.dtype(array.dtype.str) != array.dtype:
        raise TypeError(f"an array of {array.dtype} cannot be kept")
    tree: dict[str, Any] = {_KIND: "array", "dtype": array.dtype.str, "shape": list(array.shape)}
    if isinstance(value, np.generic):
        tree["scalar"] = True
    if array.dtype.hasobject:
        return {**tree, "values": [_tree(v, sink) for v in array.reshape(-1).tolist()]}
    # The axes as they lie in memory.
    axes = sorted(range(array.ndim), key=lambda axis: (-abs(array.strides[axis]), axis))
    if axes != list(range(array.ndim)):
        tree["axes"] = axes
    content = np.ascontiguousarray(array.transpose(axes)).reshape(-1).view(np.uint8).data
    if array.nbytes < _HEAVY:
        return {**tree, "data": _text(content)}
    return {**tree, "object": sink.put(content)}


def _array(tree: dict[str, Any], source: Source) -> Any:
    dtype, shape = np.dtype(tree["dtype"]), tuple(tree["shape"])
    if "values" in tree:
        values = np.empty(len(tree["values"]), dtype)
        values[:] = [_value(v, source, None) for v in tree["values"]]
        return values.reshape(shape)
    if "object" in tree:
        flat = source.mapped(tree["object"], dtype)
    else:  # a bytearray, so that the array can be written to
        flat = np.frombuffer(bytearray(base64.b64decode(tree["data"])), dtype)
    axes = tree.get("axes", list(range(len(shape))))
    array = flat.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return array[()] if tree.get("scalar") else array


def _model_tree(model: ModelProto, sink: Sink) -> dict[str, Any]:
    """Split a model into its bytes without heavy weights, and these weights."""
    copy = ModelProto()
    copy.CopyFrom(model)
    weights = []
    for index, tensor in enumerate(initializers(copy.graph)):
        if store.is_stored(tensor):
            weights.append([index, sink.put_file(store.path_of(tensor)), True])
            # Its place is another one in every run.
            tensor.ClearField("external_data")
        elif len(tensor.raw_data) >= _HEAVY:
            weights.append([index, sink.put(tensor.raw_data), False])
            tensor.ClearField("raw_data")
    return {
        _KIND: "model",
        "object": sink.put(copy.SerializeToString(deterministic=True)),
        "weights": weights,
    }


def _model(tree: dict[str, Any], source: Source, folder: str | None) -> ModelProto:
    model = ModelProto()
    model.ParseFromString(source.get(tree["object"]))
    tensors = list(initializers(model.graph))
    for index, digest, is_stored in tree["weights"]:
        tensor = tensors[index]
        if not is_stored:
            tensor.raw_data = source.get(digest)
            continue
        if folder is None:
            raise ValueError("a model with weights in files needs a folder for them")
        tensor.external_data.add(key="location", value=source.file(digest, folder))
    return model


def _text(content: bytes | memoryview) -> str:
    return base64.b64encode(content).decode("ascii")


def _name(kind: type) -> str:
    if not kind.__module__.startswith(_PACKAGE):
        raise TypeError(f"a {kind.__module__}.{kind.__qualname__} cannot be kept")
    return f"{kind.__module__}:{kind.__qualname__}"


@cache
def _class(name: str) -> Any:
    module, _, qualified = name.partition(":")
    kind = getattr(importlib.import_module(module), qualified) if module.startswith(_PACKAGE) else None
    if not (isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Enum))):
        raise TypeError(f"{name} is no record")
    return kind
