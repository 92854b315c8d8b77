"""Small models for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, numpy_helper

from eptq_onnx.graph import edit

T = TypeVar("T")


def known(value: T | None) -> T:
    """A value that is there."""
    assert value is not None
    return value


def parse(
    text: str, constants: Mapping[str, np.ndarray | np.generic] | None = None, *, opset: int = 17
) -> ModelProto:
    """A model from the body of its graph, with initializers of the given values."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}'
    )
    for name, value in (constants or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def normal(*shape: int, seed: int = 0, scale: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def scalar(body: str, inputs: str = "float[4,3] x", **constants: np.ndarray) -> ModelProto:
    """A model whose output ``loss`` is the sum of the tensor y."""
    model = parse(
        f"g ({inputs}) => (float loss) {{ {body}  loss = ReduceSum <keepdims = 0> (y) }}",
        {"w": normal(3, 2), **constants},
    )
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return edit.specialize(model, {"x": (4, 3)})


def small_convnet(batch: str | int = "N") -> ModelProto:
    """Conv, BatchNormalization, Relu6, a residual Add, pooling, Gemm; weights in an initializer and a
    Constant node."""
    model = parse(
        """
        convnet (float[N,3,8,8] image) => (float[N,5] logits)
        {
            c1 = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (image, w1)
            n1 = BatchNormalization (c1, bn_scale, bn_bias, bn_mean, bn_var)
            zero = Constant <value_float = 0.0> ()
            six = Constant <value_float = 6.0> ()
            a1 = Clip (n1, zero, six)
            c2 = Conv <kernel_shape = [3,3], pads = [1,1,1,1], group = 8> (a1, w2, b2)
            a2 = Relu (c2)
            c3 = Conv <kernel_shape = [1,1]> (a2, w3, b3)
            s = Add (c3, a1)
            p = GlobalAveragePool (s)
            f = Flatten (p)
            logits = Gemm <transB = 1> (f, w4, b4)
        }
        """.replace("[N,", f"[{batch},"),
        {
            "w1": normal(8, 3, 3, 3, seed=1),
            "bn_scale": np.linspace(0.5, 1.5, 8, dtype=np.float32),
            "bn_bias": np.linspace(-0.5, 1, 8, dtype=np.float32),
            "bn_mean": np.linspace(-0.2, 0.2, 8, dtype=np.float32),
            "bn_var": np.linspace(0.5, 3, 8, dtype=np.float32),
            "w2": normal(8, 1, 3, 3, seed=2),
            "b2": normal(8, seed=3),
            "w3": normal(8, 8, 1, 1, seed=4),
            "b3": normal(8, seed=5),
            "w4": normal(5, 8, seed=6),
            "b4": normal(5, seed=7),
        },
    )
    return model


def images(count: int = 24, channels: int = 3, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, channels, size, size)).astype(np.float32)


def silent(*_: Any, **__: Any) -> None:
    """Progress that nobody looks at."""
