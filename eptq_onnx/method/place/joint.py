"""Join the program of regions and that of the weights that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from eptq_onnx.program import Program, Shared


def joined(regions: Program, weights: Program, users: Sequence[Sequence[int]]) -> Program:
    """Return one program for regions and for the weights that they read, which come behind the regions.

    A weight is on integers if and only if a region that reads it is.

    Parameters
    ----------
    regions : Program
    weights : Program
        Without tensors; its options on integers are widths.
    users : sequence of sequence of int
        The regions that read each weight.
    """
    first = len(regions.options)
    pairs = [(first + w, tuple(own)) for w, own in enumerate(users)]
    return replace(
        regions,
        options=regions.options + weights.options,
        needs=(*regions.needs, *pairs, *((k, (weight,)) for weight, own in pairs for k in own)),
        shared=(
            *regions.shared,
            *(Shared(tuple((first + w, o) for w, o in s.options), s.costs) for s in weights.shared),
        ),
    )


def without_floats(weights: Program) -> Program:
    """Return a program of weights without their float values, where these have widths to be stored at."""
    kept = [
        [o for o, x in enumerate(own) if x.bits or not any(y.bits and not y.on_integers for y in own)]
        for own in weights.options
    ]
    place = {(k, o): (k, new) for k, own in enumerate(kept) for new, o in enumerate(own)}
    return replace(
        weights,
        options=tuple(tuple(own[o] for o in left) for own, left in zip(weights.options, kept, strict=True)),
        shared=tuple(
            Shared(tuple(place[u] for u in s.options if u in place), s.costs) for s in weights.shared
        ),
    )
