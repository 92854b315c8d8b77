"""Find problems of the calibration samples, with advice: too few, constant, all zero, or duplicated."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.samples import Samples
from eptq_onnx.numerics.types import Feeds

FEWEST = 32
"""Number of samples below which ranges and rounding overfit."""


def sample_notes(samples: Samples) -> list[str]:
    """Check all samples for problems.

    Parameters
    ----------
    samples : Samples

    Returns
    -------
    list of str
        One sentence per problem.
    """
    notes = []
    if samples.count < FEWEST:
        notes.append(
            f"{samples.count} sample{'s' * (samples.count > 1)}: ranges and rounding follow so few closely; "
            f"give {FEWEST} at least, better 100 to 500, of all kinds that the model will see"
        )
    owned = [name for name in samples.names if samples.has_samples(name)]
    first_of: dict[bytes, int] = {}
    zero, constant, repeated, never_varies = (
        list[int](),
        list[int](),
        list[tuple[int, int]](),
        dict.fromkeys(owned, True),
    )
    for k in range(samples.count):
        feeds = samples.take([k])
        own = {name: feeds[name] for name in owned}
        if (first := first_of.setdefault(_digest(feeds), k)) != k:
            repeated.append((k, first))
        # A constant mask next to varying tokens is fine, so a sample is constant only if all of its inputs
        # are.
        varies = {name: _varies(value) for name, value in own.items()}
        for name, found in varies.items():
            never_varies[name] &= not found and _gets_range(own[name])
        if any(value.size > 1 for value in own.values()) and not any(varies.values()):
            (constant if any(value.any() for value in own.values() if value.size > 1) else zero).append(k)
    if zero:
        notes.append(f"{_places(zero, samples.count)} all zero: check how they are read, or leave them out")
    if constant:
        notes.append(
            f"{_places(constant, samples.count)} constant (one value everywhere in each input): "
            "check how they are read, or leave them out"
        )
    everywhere = len(zero) + len(constant) == samples.count
    for name in [] if everywhere else [n for n, never in never_varies.items() if never]:
        notes.append(
            f"input {name!r} is constant in every sample: ranges are made for that; "
            "give values as they will come in use"
        )
    if repeated:
        notes.append(
            f"{_places([k for k, _ in repeated], samples.count, 'copies of others')} "
            f"(sample {repeated[0][0]} is sample {repeated[0][1]} again): they tell nothing new, "
            "and what is measured on held-out samples looks better than it is; give each sample once"
        )
    return notes


def _gets_range(value: NDArray[Any]) -> bool:
    """Return True for an array of several floats: only such an input gets a range from its values."""
    return value.size > 1 and value.dtype.kind not in "biuOSU"


def _varies(value: NDArray[Any]) -> bool:
    """Return True if an array has two different values."""
    return value.size > 1 and bool((value != value.flat[0]).any())


def _digest(feeds: Feeds) -> bytes:
    """Return a hash of a sample's inputs, bytes, types and shapes."""
    state = blake2b(digest_size=16)
    for name, value in feeds.items():
        state.update(f"{name} {value.dtype} {value.shape} ".encode())
        state.update(
            repr(value.tolist()).encode()
            if value.dtype.kind == "O"
            else np.ascontiguousarray(value).tobytes()
        )
    return state.digest()


def _places(places: Sequence[int], count: int, what: str = "") -> str:
    """Return a phrase such as ``3 of 40 samples (the first: sample 7) are``."""
    first = "" if what else f" (the first: sample {places[0]})"
    verb = "is" if len(places) == 1 else "are"
    return f"{len(places)} of {count} samples{first} {verb}{' ' if what else ''}{what}"
