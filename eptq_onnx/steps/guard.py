"""Step 4b: which activations must stay float, because their quantization would spoil the outputs.

To first order the noise of one quantizer adds sum g^2 e^2 to the squared error of the outputs, with e the rounding
and clipping error of each value and g^2 = (J^T v)^2 its Hessian score. Outputs are scored in units of their spread,
so that this sum over the number of output elements is a noise-to-signal ratio.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx import quant_math
from eptq_onnx.config import Config
from eptq_onnx.data import Samples
from eptq_onnx.graph.blocks import blocks_of, observe
from eptq_onnx.types import Calibration, Plan, Scores

_SAMPLES = 16
_OUTLIER = 10.0
"""A quantizer is not singled out unless it is so many times noisier than the average: low bit widths are noisy all over."""


def sensitive_activations(
    model: ModelProto,
    plan: Plan,
    samples: Samples,
    indices: NDArray[np.int64],
    calibration: Calibration,
    scores: Scores,
    config: Config,
) -> dict[str, float]:
    """Tensors that must stay float for the others to keep within ``config.max_noise``, with the noise-to-signal ratio of each.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    samples : Samples
    indices : ndarray of shape (n_samples,)
        The scored samples: rows of the tables of ``scores.channels``; the first 16 are looked at.
    calibration : Calibration
    scores : Scores
    config : Config
    """
    quantizers = {q.name: q for q in plan.activations if q.name in scores.channels}
    if not quantizers or config.max_noise == 0:
        return {}
    size = samples.micro_batch()
    noise = dict.fromkeys(quantizers, 0.0)
    parts = list(samples.parts(indices[:_SAMPLES], size))
    blocks = blocks_of(model, samples.two_batches(size), config.block_bytes)
    for k, values in observe(blocks, (samples.take(indices[part]) for part in parts), list(quantizers)):
        part = parts[k]
        for name, value in values.items():
            quantizer, x = quantizers[name], np.asarray(value, np.float32)
            error = np.square(quant_math.fake_quantize(x, calibration.activations[name], quantizer.spec) - x)
            axis = quantizer.channel_axis
            others = tuple(i for i in range(x.ndim) if i != axis)
            table = scores.channels[name][part]
            if x.shape[axis] != table.shape[1]:
                # The axis has as many places as the batch has samples, or the samples are of other sizes.
                noise[name] += float(error.sum() * table.mean())
            elif axis == 0 or len(x) != len(part):
                noise[name] += float((error.sum(axis=others) * table.mean(axis=0)).sum())
            else:
                noise[name] += float((error.sum(axis=others[1:]) * table).sum())
    seen = max(sum(map(len, parts)), 1)
    ratio = {name: n / seen / scores.output_size for name, n in noise.items()}
    return {tensor: ratio[name] for name in _spoilers(ratio, config.max_noise) for tensor in quantizers[name].tensors}


def _spoilers(ratio: dict[str, float], most: float) -> list[str]:
    """The noisiest quantizers, until the rest stay within ``most`` together or nothing stands out any more."""
    left, ordinary = sum(ratio.values()), _OUTLIER * float(np.median(list(ratio.values())))
    found: list[str] = []
    for name in sorted(ratio, key=lambda n: (-ratio[n], n)):
        if left <= most or ratio[name] <= ordinary:
            break
        found.append(name)
        left -= ratio[name]
    return found
