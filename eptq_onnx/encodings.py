"""Write the scales of a quantized model as AIMET's encodings, schema 1.0.0, as aimet-onnx 2.42 reads it."""

from __future__ import annotations

from typing import Any

import numpy as np

from eptq_onnx._version import __version__
from eptq_onnx.numerics.formats import IntFormat, PerBlock
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.records import Plan, Rounding


def encodings_of(plan: Plan, rounding: Rounding) -> dict[str, Any]:
    """Return the scales of activations and weights as a document that `Encodings` reads.

    A value u from 0 to 2^bw - 1 stands for scale * (u + offset). What is quantized to floats is left out.

    Parameters
    ----------
    plan : Plan
    rounding : Rounding
    """
    activations = [
        {"name": tensor, **_encoding(rounding.grids[q.name], q.spec.symmetric)}
        for q in plan.activations
        for tensor in q.tensors
        if isinstance(q.spec.format, IntFormat)
    ]
    weights = [
        {"name": name, **_encoding(rounding.weights[name], spec.symmetric)}
        for name, spec in plan.weight_specs.items()
        if isinstance(spec.format, IntFormat)
    ]
    return {
        "version": "1.0.0",
        "activation_encodings": activations,
        "param_encodings": weights,
        "producer": {"package": "eptq-onnx", "version": __version__},
    }


def _encoding(grid: Grid, symmetric: bool) -> dict[str, Any]:
    form, scale = grid.format, np.asarray(grid.scale, np.float32)
    zero = np.broadcast_to(np.asarray(grid.zero_point), scale.shape)
    kind: dict[str, Any] = {"enc_type": "PER_CHANNEL" if scale.size > 1 else "PER_TENSOR"}
    if isinstance(grid.granularity, PerBlock):
        kind = {"enc_type": "PER_BLOCK", "block_size": grid.granularity.size}
        if scale.ndim == 2 and grid.granularity.axis % 2 == 0:
            # Blocks of a matrix with terms in its rows are listed output by output.
            scale, zero = scale.T, zero.T
    scale, zero = scale.reshape(-1), zero.reshape(-1)
    # Ranges may lack values of the width, as -127 to 127 do: the others are never used.
    first = -(2 ** (form.bits - 1)) if form.qmin < 0 else 0
    return {
        **kind,
        "dtype": "INT",
        "bw": form.bits,
        "is_sym": symmetric,
        "scale": [float(s) for s in scale],
        "offset": [int(first - z) for z in zero],
    }
