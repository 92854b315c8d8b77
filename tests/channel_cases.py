"""Small models in normal form whose channels may be scaled or mixed, and some that prevent it."""

from __future__ import annotations

from typing import Any

import numpy as np
from drawing import deck, drawn
from graphs import normal, parse
from onnx import ModelProto

from eptq_onnx.method.normalize import normalize
from eptq_onnx.runtime import Session

HEAD = "a = Conv <pads = [1,1,1,1]> (x, w, b)"
TAIL = "y = Conv (z, v)"
VECTOR = np.linspace(0.5, 2, 4, dtype=np.float32)

PASSING = {
    "Relu": "z = Relu (a)",
    "Clip": "z = Clip (a, zero)",
    "PRelu": "z = PRelu (a, slope)",
    "LeakyRelu": "z = LeakyRelu <alpha = 0.1> (a)",
    "MaxPool": "z = MaxPool <kernel_shape = [2,2]> (a)",
    "AveragePool": "z = AveragePool <kernel_shape = [2,2], pads = [1,1,1,1]> (a)",
    "GlobalAveragePool": "z = GlobalAveragePool (a)",
    "GlobalMaxPool": "z = GlobalMaxPool (a)",
    "BatchNormalization": "p = MaxPool <kernel_shape = [2,2]> (a)  r = Relu (p)"
    "  z = BatchNormalization (r, s1, s2, s3, s4)",
    "Add": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Add (a, c)",
    "Add, constant": "r = Relu (a)  z = Add (r, each)",
    "Sub": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Sub (a, c)",
    "Sum": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Sum (a, c, a)",
    "Mul, constant": "r = Relu (a)  z = Mul (each, r)",
    "Mul, constant behind a curve": "s = Sigmoid (a)  z = Mul (s, each)",
    "Mul, scalar": "r = Relu (a)  z = Mul (r, half)",
    "Mul, gate": "g = GlobalAveragePool (a)  s = Sigmoid (g)"
    "  c = Conv <pads = [1,1,1,1]> (x, u)  r = Relu (c)  z = Mul (s, r)",
    "Div, constant": "r = Relu (a)  z = Div (r, each)",
    "Concat": "c = Conv <pads = [1,1,1,1]> (x, u)"
    "  j = Concat <axis = 1> (a, c)  k = Relu (j)  z = Conv (k, j8)",
    "Concat, other axis": "c = Conv <pads = [1,1,1,1]> (x, u)  z = Concat <axis = 2> (a, c)",
    "Split": "s, t = Split <axis = 1> (a, parts)  r = Relu (t)  z = Concat <axis = 1> (r, s)",
    "Transpose": "t = Transpose <perm = [0,2,3,1]> (a)  r = MatMul (t, m)  q = Relu (r)"
    "  z = Transpose <perm = [0,3,1,2]> (q)",
    "Reshape": "r = Reshape (a, flat)  q = Relu (r)  z = Reshape (q, back)",
    "Flatten": "g = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)"
    "  f = Flatten (g)  q = Gemm (f, gw, gb)  z = Reshape (q, one)",
    "Squeeze": "g = GlobalAveragePool (a)  s = Squeeze (g, two)  q = Relu (s)  z = Unsqueeze (q, two)",
    "Identity": "i = Identity (a)  z = Relu (i)",
    "Dropout": "i = Dropout (a)  z = Relu (i)",
    "Pad": "z = Pad (a, pads)",
    "Pad, reflect": 'z = Pad <mode = "reflect"> (a, pads)',
    "Resize": 'z = Resize <mode = "linear"> (a, , scales)',
    "ConvTranspose": "r = Relu (a)  z = ConvTranspose <strides = [2,2], group = 2> (r, tw, tb)",
    "Conv, depthwise": "r = Relu (a)  z = Conv <group = 4, pads = [1,1,1,1]> (r, dw)",
    "Conv, grouped": "r = Relu (a)  z = Conv <group = 2> (r, gcw)",
    "LayerNormalization": "t = Transpose <perm = [0,2,3,1]> (x)  n = LayerNormalization (t, ln, lnb)"
    "  q = MatMul (n, lm)  z = Transpose <perm = [0,3,1,2]> (q)",
}  # fmt: skip

BLOCKING = {
    "a limit": "z = Clip (a, zero, half)",
    "a curve": "z = Sigmoid (a)",
    "a square": "z = Mul (a, a)",
    "a mix of channels": "z = Softmax <axis = 1> (a)",
    "a shared weight": "r = Relu (a)  p = Conv (r, v)  q = Relu (p)  z = Conv (q, v)",
    "channels turned away": "t = Transpose <perm = [0,2,1,3]> (a)  z = Conv (t, v6)",
    "values from outside": 'z = Resize <mode = "linear",'
    ' coordinate_transformation_mode = "tf_crop_and_resize", extrapolation_value = 1.0> (a, roi, scales)',
    "a pool over channels": "t = Transpose <perm = [0,2,1,3]> (a)"
    "  p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (t)  z = Transpose <perm = [0,2,1,3]> (p)",
    "a normalization of others": "t = Transpose <perm = [0,2,1,3]> (a)  r = Relu (t)"
    "  p = BatchNormalization (r, n1, n2, n3, n4)  z = Transpose <perm = [0,2,1,3]> (p)",
    "rows of other samples": "r = Reshape (a, mixed)  q = Relu (r)  z = Reshape (q, back)",
    "a sum across channels": "z = Add (a, half)",
    "padding with ones": "z = Pad (a, pads, half)",
    "a limit computed at run time": "t = ReduceMax <keepdims = 0> (x)  z = Clip (a, zero, t)",
}


def case(body: str) -> ModelProto:
    constants: dict[str, Any] = {
        "w": normal(4, 3, 3, 3, seed=1), "b": normal(4, seed=2), "v": normal(4, 4, 1, 1, seed=3),
        "u": normal(4, 3, 3, 3, seed=4), "zero": np.float32(0), "half": np.float32(0.5),
        "slope": normal(4, 1, 1, seed=5), "each": VECTOR.reshape(4, 1, 1),
        "s1": VECTOR, "s2": normal(4, seed=6), "s3": normal(4, seed=7), "s4": VECTOR,
        "j8": normal(4, 8, 1, 1, seed=8), "parts": np.array([1, 3]), "m": normal(4, 4, seed=9),
        "flat": np.array([2, 4, 36]), "back": np.array([2, 4, 6, 6]), "gw": normal(36, 4, seed=10),
        "gb": normal(4, seed=11), "one": np.array([2, 4, 1, 1]), "two": np.array([2, 3]),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "scales": np.array([1, 1, 2, 2], np.float32),
        "tw": normal(4, 2, 2, 2, seed=12),
        "tb": normal(4, seed=13), "dw": normal(4, 1, 3, 3, seed=14), "gcw": normal(4, 2, 1, 1, seed=15),
        "mixed": np.array([4, 4, 18]), "n1": np.linspace(1, 2, 6, dtype=np.float32), "n2": normal(6, seed=21),
        "n3": normal(6, seed=22), "n4": np.linspace(1, 2, 6, dtype=np.float32),
        "v6": normal(4, 6, 1, 1, seed=18),
        "ln": np.array([1, 2, 0.5], np.float32), "lnb": normal(3, seed=16), "lm": normal(3, 4, seed=17),
        "half_wide": normal(4, 2, 1, 1, seed=23), "dense": normal(4, 4, 2, 2, seed=24),
        "full": normal(4, 4, 3, 3, seed=25),
        "roi": np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5], np.float32), "halves": np.array([2, 2]),
    }  # fmt: skip
    text = f"g (float[2,3,6,6] x) => (float[2,4,h,w] y) {{ {HEAD}  {body}  {TAIL} }}"
    used = {
        n: v
        for n, v in constants.items()
        if any(n in part.replace("(", " ").replace(",", " ").replace(")", " ").split() for part in [text])
    }
    return normalize(parse(text, used), 13)


def outputs_agree(model: ModelProto, other: ModelProto, feeds: dict[str, np.ndarray]) -> None:
    got = Session(other).run(feeds)
    for name, value in Session(model).run(feeds).items():
        np.testing.assert_allclose(
            got[name], value, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(value).max(initial=0)))
        )


def drawn_case(seed: int) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """Return a random model in normal form, and its inputs."""
    opset, samples = deck(seed, 8)[seed % 5]
    rng = np.random.default_rng(seed)
    feeds = {
        "a": rng.normal(size=(1, 12)).astype(np.float32),
        "b": rng.normal(size=(1, 7)).astype(np.float32),
    }
    return normalize(drawn(seed, opset, samples), 13), feeds
