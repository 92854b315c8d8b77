"""What mutants are made of: the shipped models, and tiny drawn ones, each with a few samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

_SHIPPED = Path(__file__).resolve().parent.parent / "models"
_SAMPLES = 6

Rng = np.random.Generator

EXTREME_FLOATS = (0.0, -1.0, 1e-30, 1e30, 3e38, float("inf"), float("-inf"), float("nan"))


@dataclass
class Mutant:
    """A model with its samples, as they come to be written.

    Parameters
    ----------
    name : str
        Of the base.
    model : ModelProto
    samples : dict of str to ndarray
    said : list of str
        The mutations.
    model_bytes : bytes, optional
        In place of ``model``, if its bytes were changed.
    data_bytes : bytes, optional
        In place of ``samples``.
    beside : dict of str to bytes
        Files beside the model.
    """

    name: str
    model: ModelProto
    samples: dict[str, NDArray[Any]]
    said: list[str] = field(default_factory=list)
    model_bytes: bytes | None = None
    data_bytes: bytes | None = None
    beside: dict[str, bytes] = field(default_factory=dict)
    in_data: bool = False

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write the files; returns the paths of model and samples."""
        model, data = folder / "model.onnx", folder / "samples.npz"
        model.write_bytes(
            self.model_bytes if self.model_bytes is not None else self.model.SerializeToString()
        )
        if self.data_bytes is None:
            np.savez(data, **self.samples)  # type: ignore[arg-type]
        else:
            data.write_bytes(self.data_bytes)
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)
        return model, data


def base(rng: Rng) -> Mutant:
    """A drawn model without faults; mostly a tiny one, which runs in less than a second."""
    names = [*_TINY, "digits_resnet", "digits_mobile", "shapes_detector", "shapes_segmenter"]
    shares = np.array([1.0] * len(_TINY) + [0.1, 0.1, 0.03, 0.03])
    name = str(rng.choice(names, p=shares / shares.sum()))
    if name in _TINY:
        model = onnx.parser.parse_model(
            f'<ir_version: {rng.integers(7, 10)}, opset_import: ["" : {rng.integers(13, 20)}]>\n{_TINY[name]}'
        )
        _fill(model, rng)
        samples = _samples(model, rng)
    else:
        content, samples = _shipped(name)
        model, samples = onnx.load_model_from_string(content), dict(samples)
    return Mutant(name, model, samples)


@cache
def _shipped(name: str) -> tuple[bytes, dict[str, NDArray[Any]]]:
    calibration = "digits_calib.npz" if name.startswith("digits") else "shapes_calib.npz"
    with np.load(_SHIPPED / calibration) as arrays:
        few = {n: arrays[n][: _SAMPLES if name.startswith("digits") else 2] for n in arrays.files}
    return (_SHIPPED / f"{name}.onnx").read_bytes(), few


_TINY = {
    "gemm": """g (float[N,6] x) => (float[N,4] y) <float[6,8] w, float[8] b, float[4,8] v, float[4] c>
        { h = Gemm (x, w, b) r = Relu (h) y = Gemm <transB = 1> (r, v, c) }""",
    "matmul": """g (float[N,3,6] x) => (float[N,3,6] y) <float[6,6] w, float[6] b, float[6] s, float[6] o, float[6,6] v>
        { m = MatMul (x, w) h = Add (m, b) t = Tanh (h) z = MatMul (t, v) k = Add (z, x) a = Mul (k, s) y = Add (a, o) }""",
    "conv2d": """g (float[N,2,6,6] x) => (float[N,3] y) <float[4,2,3,3] w, float[4] b, float[4] s, float[4] o, float[4] m, float[4] v,
        float[4,1,3,3] d, float[3,4] f> { c = Conv <pads = [1,1,1,1]> (x, w, b) n = BatchNormalization (c, s, o, m, v) r = Relu (n)
        e = Conv <group = 4, pads = [1,1,1,1]> (r, d) k = Add (e, r) p = GlobalAveragePool (k) q = Flatten (p)
        y = Gemm <transB = 1> (q, f) }""",
    "conv1d": """g (float[N,2,8] x) => (float[N,3,4] y) <float[4,2,3] w, float[4] b, float[4,4,3] v, float[3,8,2] u>
        { c = Conv <pads = [1,1]> (x, w, b) a = Relu (c) d = Conv <pads = [1,1]> (a, v) k = Add (d, a) j = Concat <axis = 1> (k, a)
        y = Conv <strides = [2]> (j, u) }""",
    "if": """g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4,4] v, float zero>
        { h = MatMul (x, w) s = ReduceMean <keepdims = 0> (x) p = Greater (s, zero)
        z = If (p) <then_branch = t () => (float[N,4] a) { a = Relu (h) }, else_branch = e () => (float[N,4] b) { b = MatMul (h, w) }>
        y = MatMul (z, v) }""",
    "loop": """g (float[N,4] x) => (float[N,4] y) <float[4,4] w, float[4,4] v, int64 count = {2}, bool yes = {1}>
        { h = MatMul (x, w) r = Relu (h)
        z = Loop (count, yes, r) <body = l (int64 i, bool c, float[N,4] s) => (bool d, float[N,4] t) { d = Identity (c) t = Tanh (s) }>
        y = MatMul (z, v) }""",
    "embeddings": """g (int64[N,5] ids) => (float[N,5,3] y) <float[7,4] table, float[4] s, float[4] o, float[4,4] w, float[4,3] v>
        { e = Gather (table, ids) n = Mul (e, s) l = Add (n, o) q = MatMul (l, w) t = Transpose <perm = [0,2,1]> (l)
        a = MatMul (q, t) p = Softmax <axis = -1> (a) z = MatMul (p, l) k = Add (z, l) y = MatMul (k, v) }""",
}


def _fill(model: ModelProto, rng: Rng) -> None:
    """Values for the constants that are declared without."""
    for info in model.graph.value_info:
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        model.graph.initializer.append(numpy_helper.from_array(_value(info.name, shape, rng), info.name))
    del model.graph.value_info[:]


def _value(name: str, shape: tuple[int, ...], rng: Rng) -> NDArray[np.float32]:
    value = rng.normal(0, 0.6, shape).astype(np.float32)
    return np.abs(value) + np.float32(0.3) if name in ("v", "s") and len(shape) == 1 else np.asarray(value)


def _samples(model: ModelProto, rng: Rng) -> dict[str, NDArray[Any]]:
    constants = {t.name for t in model.graph.initializer}
    result: dict[str, NDArray[Any]] = {}
    for info in (i for i in model.graph.input if i.name not in constants):
        shape = (_SAMPLES, *[d.dim_value for d in info.type.tensor_type.shape.dim][1:])
        whole = info.type.tensor_type.elem_type == TensorProto.INT64
        result[info.name] = rng.integers(0, 7, shape) if whole else rng.normal(size=shape).astype(np.float32)
    return result


def pick(rng: Rng, items: Any) -> Any:
    """One of a sequence."""
    return items[int(rng.integers(len(items)))]


def messages(message: Message, path: str = "") -> Iterator[tuple[str, Message]]:
    """All messages in a message, itself included."""
    yield path, message
    for what, value in message.ListFields():
        if what.type == FieldDescriptor.TYPE_MESSAGE:
            repeated = not isinstance(value, Message)
            for k, inner in enumerate(value if repeated else [value]):
                yield from messages(inner, f"{path}.{what.name}" + (f"[{k}]" if repeated else ""))


def damaged(content: bytes, rng: Rng) -> bytes:
    """Content with bytes changed, left out or put in."""
    data = bytearray(content)
    how = int(rng.integers(6))
    for _ in range(int(pick(rng, (1, 1, 2, 8)))):
        at = int(rng.integers(max(1, len(data))))
        if how == 0:
            del data[at:]
        elif how == 1:
            data[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8))
        elif data:
            data[at % len(data)] = int(rng.integers(256))
    return bytes(data)
