"""How many samples run at once where all tensors of a network are kept for its gradients."""

from __future__ import annotations

from onnx import ModelProto

from eptq_onnx.data.samples import Samples
from eptq_onnx.execute.blocks import tensor_bytes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.parallel import worker_count

_COPIES = 3
"""Copies of each tensor: float network, quantized network, and gradient."""
_MEMORY = 3 * 2**28
"""Most bytes of the tensors of all batches in progress, where fewer samples at once help."""


def gradient_bytes(model: ModelProto, samples: Samples, size: int) -> int:
    """Return the bytes of the tensors of all batches in progress, ``size`` samples each."""
    return _COPIES * tensor_bytes(specialize(model, samples.two_batches(size))) * worker_count()


def micro_batch(model: ModelProto, samples: Samples, wanted: int | None = None) -> int:
    """Return the number of samples per run: fewer than elsewhere if their tensors take much memory.

    Parameters
    ----------
    model : ModelProto
    samples : Samples
    wanted : int, optional
        As in `Samples.micro_batch`.
    """
    size = samples.micro_batch(wanted)
    if samples.fixed_batch is None:
        needed = gradient_bytes(model, samples, size)
        while size > 1 and needed > _MEMORY:
            needed, size = needed * (size // 2) // size, size // 2
    return size
