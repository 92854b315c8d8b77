"""Comparison of the outputs of two versions of a network, with rows matched that are chosen by value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.data.samples import Samples
from eptq_onnx.graph.branches import flattened
from eptq_onnx.graph.outputs import numbers, readable
from eptq_onnx.graph.replay import Replay
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.rows import Pair, laid_beside, rows_axis
from eptq_onnx.numerics.statistics import Comparison, Meaning
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.ops import recorded
from eptq_onnx.parallel import ordered_map
from eptq_onnx.runtime import Session

_MOST_BYTES = 2**29
"""Default memory limit of the outputs of one network that are kept while the other runs, in bytes."""


class Pairing:
    """Runs versions of a network and pairs their outputs with those of the float network.

    Parameters
    ----------
    whole : ModelProto
        The normalized float model.
    samples : Samples
    parts : sequence of ndarray
        Indices of the samples of each run.
    found : Replay
        Random draws and choices recorded from the float network.
    """

    def __init__(
        self, whole: ModelProto, samples: Samples, parts: Sequence[NDArray[np.int64]], found: Replay
    ) -> None:
        self._samples, self._parts, self._found = samples, parts, found
        self._free = _in_free_order(whole, found)

    def outputs(
        self, model: ModelProto, count: int | None = None, *, integers: bool = True
    ) -> Iterator[Feeds]:
        """Yield the floating-point outputs of each run.

        Parameters
        ----------
        model : ModelProto
        count : int, optional
            Most runs.
        integers : bool
            False to compute in float between quantizers, as the ONNX operators are defined.
        """
        model, names = readable(model)
        session, samples = Session(model, integers=integers), self._samples

        def run(part: NDArray[np.int64]) -> Feeds:
            values = session.run(session.taken(samples.take(part)))
            return {name: numbers(values[source]) for name, source in names.items()}

        return ordered_map(run, self._parts[:count])

    def samples_of(self, count: int) -> int:
        """Return the number of samples in the first runs."""
        return sum(map(len, self._parts[:count]))

    def pairs(self, reference: Iterable[Feeds], others: Iterable[Feeds]) -> Iterator[dict[str, Pair]]:
        """Yield output name to the values of both for each run, with rows matched if chosen by value."""
        for part, expected, got in zip(self._parts, reference, others, strict=False):
            counts = self._chosen(part)
            axes = {
                name: axis
                for name in self._free
                if name in expected and (axis := rows_axis(expected[name], counts)) is not None
            }
            yield laid_beside(expected, got, axes)

    def _chosen(self, part: NDArray[np.int64]) -> set[int]:
        """Return the numbers of rows that the float network chose in one run."""
        feeds = self._samples.take(part) if self._found.places else {}
        return {n for p in self._found.places if not p.draws for n in feeds[p.name].shape}


def comparisons(
    runs: Iterable[dict[str, Pair]], meanings: Mapping[str, Meaning] | None = None
) -> dict[str, Comparison]:
    """Return the statistics of each output pair, collected over all runs.

    Parameters
    ----------
    runs : iterable of dict
        Output to the values of both models, for each run.
    meanings : mapping of str to Meaning, optional
        What the outputs are; by default, all are scores.
    """
    known = meanings or {}
    found: dict[str, Comparison] = {}
    for pairs in runs:
        for name, pair in pairs.items():
            if name not in found:
                found[name] = Comparison(known.get(name, Meaning.SCORES))
            found[name].add(*pair)
    return found


def within_bytes(runs: Iterable[Feeds], most: int = _MOST_BYTES) -> list[Feeds]:
    """Return the first runs, up to and including the one that exceeds ``most`` bytes in total."""
    kept: list[Feeds] = []
    size = 0
    for values in runs:
        kept.append(values)
        size += sum(v.nbytes for v in values.values())
        if size > most:
            break
    return kept


def _in_free_order(model: ModelProto, found: Replay) -> list[str]:
    """Return the outputs whose order of rows is chosen by value."""
    view = GraphView(flattened(model))
    nodes = {n.name: n for n in view.nodes}
    chosen = [
        nodes[p.node] for p in found.places if (rule := recorded(nodes[p.node])) is not None and rule.orders
    ]
    behind = view.downstream(o for n in chosen for o in n.output if o)
    return [o for o in view.outputs if o in behind]
