"""Augment samples: distillation needs no labels, so any input on which the networks can differ will do.

A network-wise optimization soon overfits a few hundred samples (ResNet-20, W2A8, 230 samples: the training
loss falls to a tenth while the held-out error stays). Pure numpy, no ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eptq_onnx.numerics.types import Array, Feeds

_LEAST_EXTENT = 8
"""Smallest extent of an image; smaller maps are not augmented."""
_REACH = 8
"""Images shift by at most their extent divided by this."""


def moved(feeds: Feeds, axes: Mapping[str, int], rng: np.random.Generator) -> Feeds:
    """Mirror and shift images (float inputs of rank 4), sample by sample; other inputs stay unchanged.

    Parameters
    ----------
    feeds : Feeds
        A batch, samples along the first axis.
    axes : mapping of str to int
        The channel axis of each input; height and width are the other two.
    rng : Generator
    """
    result = {}
    for name, value in feeds.items():
        spatial = [a for a in (1, 2, 3) if a != axes.get(name)]
        result[name] = _moved(value, spatial, rng) if _is_image(value, spatial) else value
    return result


def can_mix(feeds: Feeds, size: int) -> bool:
    """Return True if every input is float and has ``size`` samples along its first axis.

    Mixtures of integers, such as token ids, are meaningless.
    """
    return all(value.dtype.kind == "f" and value.ndim > 1 and len(value) == size for value in feeds.values())


def mixed(feeds: Feeds, others: Feeds, share: Array) -> Feeds:
    """Return ``share * feeds + (1 - share) * others`` (mixup, Zhang et al. 2018).

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


def _is_image(value: Array, spatial: Sequence[int]) -> bool:
    floats = value.dtype.kind == "f" and value.ndim == 4 and len(spatial) == 2
    return floats and min(value.shape[a] for a in spatial) >= _LEAST_EXTENT


def _moved(value: Array, spatial: Sequence[int], rng: np.random.Generator) -> Array:
    result = np.empty_like(value)
    axes = [a - 1 for a in spatial]
    for n, sample in enumerate(value):
        image = np.flip(sample, axes[1]) if rng.random() < 0.5 else sample
        for axis in axes:
            most = image.shape[axis] // _REACH
            widths = [(most, most) if a == axis else (0, 0) for a in range(3)]
            begin = int(rng.integers(0, 2 * most + 1))
            image = np.take(
                np.pad(image, widths, mode="reflect"), range(begin, begin + image.shape[axis]), axis
            )
        result[n] = image
    return result
