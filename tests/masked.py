"""Small networks with NaN or infinite values at positions that no output depends on."""

from __future__ import annotations

import numpy as np
from graphs import normal, parse
from onnx import ModelProto

D, S = 16, 6
ATTENTION = """
    u1 = Unsqueeze (valid, ax1)  u2 = Unsqueeze (valid, ax2)  allowed = And (u1, u2)
    q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)  kt = Transpose <perm = [0,2,1]> (k)
    s0 = MatMul (q, kt)  s = Mul (s0, scale)
    {mask}
    p = Softmax (masked)  c = MatMul (p, v)  o = MatMul (c, wo)  r = Add (x, o)
"""
MASKS = {
    "Where": "masked = Where (allowed, s, ninf)",
    "Add": "bias = Where (allowed, zero, ninf)  masked = Add (s, bias)",
    "Log": "kept = Cast <to = 1> (allowed)  bias = Log (kept)  masked = Add (s, bias)",
}
"""Ways to mask; a row that is masked altogether is NaN behind the Softmax."""
PARTS = {
    **{f"attention, {name}": ATTENTION.format(mask=mask) for name, mask in MASKS.items()},
    "log of 0": "u2 = Unsqueeze (valid, ax2)  h = MatMul (x, wq)  pos = Relu (h)  l = Log (pos)  big = Greater (pos, half)"
    "  low = Where (big, l, zero)  r = MatMul (low, wv)",
    "0 by 0": "u2 = Unsqueeze (valid, ax2)  f = Cast <to = 1> (u2)  h = MatMul (x, wq)  top = Mul (h, f)  d = Div (top, f)"
    "  t = Tanh (d)  r = MatMul (t, wv)",
    "root below 0": "u2 = Unsqueeze (valid, ax2)  h = MatMul (x, wq)  root = Sqrt (h)  some = Greater (h, zero)"
    "  n = Where (some, root, h)  r = MatMul (n, wv)",
    "exponent": "u2 = Unsqueeze (valid, ax2)  h = MatMul (x, wq)  far = Mul (h, thousand)  e = Exp (far)"
    "  known = Less (far, one_number)  n = Where (known, e, zero)  w = Min (n, one_number)  r = MatMul (w, wv)",
}
"""Of x and valid, r; padded tokens may hold what they like."""


def masked(part: str, seed: int = 0) -> ModelProto:
    """The part, a feed-forward layer, and the sum over the tokens that are valid."""
    text = f"""
        masked (float[n,{S},{D}] x, bool[n,{S}] valid) => (float[n,4] y)
        {{
            {PARTS[part]}
            h1 = MatMul (r, w1)  h1b = Add (h1, b1)  h1r = Relu (h1b)  h2 = MatMul (h1r, w2)  r2 = Add (r, h2)
            shown = Where (u2, r2, zero)  pooled = ReduceSum <keepdims = 0> (shown, ax1)  y = Gemm (pooled, head, hb)
        }}
    """
    gain = np.float32(1 / np.sqrt(D))
    values = {f"w{k}": gain * normal(D, D, seed=seed + i) for i, k in enumerate("qkvo")}
    values |= {
        "w1": gain * normal(D, 2 * D, seed=seed + 5),
        "b1": np.float32(0.1) * normal(2 * D, seed=seed + 6),
        "w2": gain * normal(2 * D, D, seed=seed + 7),
        "head": gain * normal(D, 4, seed=seed + 8),
        "hb": normal(4, seed=seed + 9),
        "ninf": np.array(-np.inf, np.float32),
        "zero": np.array(0, np.float32),
        "half": np.array(0.5, np.float32),
        "one_number": np.array(1, np.float32),
        "thousand": np.array(1000, np.float32),
        "scale": np.array(D**-0.5, np.float32),
        "ax1": np.array([1]),
        "ax2": np.array([2]),
    }
    return parse(
        text,
        {
            name: v
            for name, v in values.items()
            if name in text.replace("(", " ").replace(")", " ").replace(",", " ").split()
        },
    )


def samples(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, S, D)).astype(np.float32)
    return {"x": x, "valid": np.arange(S) < rng.integers(2, S + 1, count)[:, None]}
