"""Versions of a network walked side by side, by as many batches as memory holds at each place.

The first tensors of a network are often its largest. There, few batches have more positions than a layer
needs; where tensors are smaller, further batches are brought there by running the nodes so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.execute.walk import Walk, live_bytes, walks_memory
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.memory import release_freed
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto import store

_AHEAD = 8
"""Batches join if the next so many places have room for them."""
_WORTH = 2
"""Batches join if there are so many times as many then, or all."""


@dataclass(frozen=True)
class Reached:
    """The values of a tensor in the first network and in the last, batch by batch.

    Parameters
    ----------
    exact, quantized : sequence of ndarray
    batches : sequence of ndarray
        Indices of the samples of each batch.
    """

    exact: Sequence[NDArray[Any]]
    quantized: Sequence[NDArray[Any]]
    batches: Sequence[NDArray[np.int64]]


class Walkers:
    """Versions of a network, walked side by side.

    Parameters
    ----------
    models : sequence of ModelProto
        The float network, and others.
    batches : sequence of ndarray
        Indices of the samples of each batch.
    take : callable
        Returns the inputs of a batch.
    counts : sequence of int
        How many batches there are at each place; see `batches_at`.
    """

    def __init__(
        self,
        models: Sequence[ModelProto],
        batches: Sequence[NDArray[np.int64]],
        take: Callable[[NDArray[np.int64]], Feeds],
        counts: Sequence[int],
    ) -> None:
        self._counts, self._take = counts, take
        self.batches = list(batches)
        """All batches, in the order in which they join."""
        if min(counts, default=len(batches)) < len(batches):
            # However many there are, they are spread over all samples.
            turns = np.arange(len(batches)) * ((np.sqrt(5) - 1) / 2) % 1
            self.batches = [batches[k] for k in np.argsort(turns, kind="stable")]
        self._now = counts[0] if counts else len(batches)
        grows = any(later > former for former, later in itertools.pairwise(counts))
        first = [take(part) for part in self.batches[: self._now]]
        self._walks = [Walk(model, first, grows=grows) for model in models]

    def set_constant(self, name: str, value: NDArray[Any]) -> None:
        """Use a new value for a constant of the last network from now on."""
        self._walks[-1].set_constant(name, value)

    def reach(self, place: int, *names: str) -> Reached:
        """Run the networks up to a tensor, with as many batches as the place has.

        Parameters
        ----------
        place : int
            In the order of ``counts``.
        *names : str
            The tensor's name in each of them.
        """
        wanted = self._counts[place]
        for walk in self._walks:
            if wanted < self._now:
                walk.leave(wanted)
            elif wanted > self._now:
                walk.join(self._take(part) for part in self.batches[self._now : wanted])
        self._now = wanted
        found = []
        for walk, name in zip(self._walks, names, strict=True):
            # Freed memory lies between what is kept, where larger tensors do not fit.
            release_freed()
            found.append(walk.reach(name))
        return Reached(found[0], found[-1], self.batches[:wanted])


def batches_on_the_way(
    model: ModelProto,
    shapes: tuple[Feeds, Feeds],
    tensors: Sequence[str],
    total: int,
    versions: int,
    max_memory: int | None,
) -> list[int]:
    """Return how many batches to walk with to each of some tensors; see `batches_at`.

    Parameters
    ----------
    model : ModelProto
    shapes : tuple of Feeds
        Two batches, as `Samples.two_batches` returns them.
    tensors : sequence of str
        In the order in which they are reached.
    total : int
        Number of batches.
    versions : int
        Number of networks that are walked side by side.
    max_memory : int or None
        Memory limit in bytes.
    """
    needs = [versions * need for need in live_bytes(specialize(model, shapes), tensors)]
    # To bring a batch somewhere takes all weights so far.
    return batches_at(needs, total, walks_memory(max_memory), grows=not store.is_large(model))


def batches_at(needs: Sequence[int], total: int, limit: int, *, grows: bool = True) -> list[int]:
    """Return how many batches to walk with at each place.

    Parameters
    ----------
    needs : sequence of int
        Bytes that a batch takes at each place.
    total : int
        Number of batches.
    limit : int
        Limit on the bytes of all batches; one batch is walked with in any case.
    grows : bool
        False if batches must not join on the way.
    """
    room = [min(total, max(1, limit // max(1, need))) for need in needs]
    return list(_growing(room, total)) if grows else [min(room, default=total)] * len(room)


def _growing(room: Sequence[int], total: int) -> Iterator[int]:
    now = 0
    for k, most in enumerate(room):
        ahead = min(room[k : k + _AHEAD])
        if now > most:
            now = most
        elif ahead >= _WORTH * now or ahead == total:
            now = ahead
        yield now
