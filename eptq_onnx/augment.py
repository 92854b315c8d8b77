"""More samples than there are: distillation needs no labels, so that any input will do on which the networks can differ.

A few hundred samples are soon learned by heart by a network-wise optimization (ResNet-20, W2A8, 230 samples: the training
loss falls to a tenth while the held-out error stays). Pure numpy, no ONNX.
"""

from __future__ import annotations

import numpy as np

from eptq_onnx.types import Array, Feeds

_LEAST_EXTENT = 8
"""Smaller maps are no images."""
_REACH = 8
"""Images shift by at most one part in so many of their extent."""
_MOST_CHANNELS = 4


def moved(feeds: Feeds, rng: np.random.Generator) -> Feeds:
    """Mirror and shift images: float inputs of rank 4, sample by sample; the others stay as they are."""
    return {name: _moved(value, rng) if _is_image(value) else value for name, value in feeds.items()}


def can_mix(feeds: Feeds, size: int) -> bool:
    """True if every input is float and has ``size`` samples along its first axis: a mixture of token numbers means nothing."""
    return all(value.dtype.kind == "f" and value.ndim > 1 and len(value) == size for value in feeds.values())


def mixed(feeds: Feeds, others: Feeds, share: Array) -> Feeds:
    """``share * feeds + (1 - share) * others`` (mixup, Zhang et al. 2018).

    Parameters
    ----------
    feeds, others : Feeds
        Two batches of the same shapes.
    share : ndarray of float32, shape (n_samples,)
    """
    result = {}
    for name, value in feeds.items():
        weight = share.reshape(-1, *[1] * (value.ndim - 1)).astype(value.dtype)
        result[name] = weight * value + (1 - weight) * others[name]
    return result


def _is_image(value: Array) -> bool:
    return value.dtype.kind == "f" and value.ndim == 4 and min(value.shape[a] for a in _spatial(value)) >= _LEAST_EXTENT


def _spatial(value: Array) -> tuple[int, int]:
    """Axes of height and width: the last two, or those before a last axis of a few channels."""
    return (1, 2) if value.shape[3] <= _MOST_CHANNELS < value.shape[1] else (2, 3)


def _moved(value: Array, rng: np.random.Generator) -> Array:
    result = np.empty_like(value)
    axes = [a - 1 for a in _spatial(value)]
    for n, sample in enumerate(value):
        image = np.flip(sample, axes[1]) if rng.random() < 0.5 else sample
        for axis in axes:
            most = image.shape[axis] // _REACH
            widths = [(most, most) if a == axis else (0, 0) for a in range(3)]
            begin = int(rng.integers(0, 2 * most + 1))
            image = np.take(np.pad(image, widths, mode="reflect"), range(begin, begin + image.shape[axis]), axis)
        result[n] = image
    return result
