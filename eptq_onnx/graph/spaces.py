"""Analysis of which channels may be mixed by a matrix without changing what the model computes.

If only linear operators that treat all channels alike lie between layers (the ends of inverted residuals,
sums of them, pooling, resizing, concatenation), any invertible matrix can be merged into the rows of the
layers upstream, and its inverse into the terms of the layers downstream. For transformers this is rotation
(QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024). The slots of `eptq_onnx.graph.channels`, computed
with the rules of linear operators only, tell which channels are tied. A *space* is a set of channels that
always occur together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.graph.channels import Absorber, Channels, Slots
from eptq_onnx.numerics.linear import row_shape
from eptq_onnx.numerics.types import Array

Matrix = NDArray[np.float64]
Places = NDArray[np.int64]


class Spaces:
    """The spaces of a graph.

    Parameters
    ----------
    channels : Channels
        Computed with the rules of linear operators only.
    """

    def __init__(self, channels: Channels) -> None:
        self.absorbers = channels.absorbers
        _, self._sets = channels.classes()
        vectors = [v for a in self.absorbers for v in (a.times, a.over) if v is not None]
        vectors += channels.tensors().values()
        fixed = np.concatenate(
            [self._sets[:1], *(self._sets[a.slots] for a in self.absorbers if _grouped(channels, a))]
        )
        labels = _refined([self._sets[v] for v in vectors], int(self._sets.max(initial=0)) + 1)
        labels[fixed] = -1
        order = np.argsort(labels, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        self.members: list[Slots] = [g for g in groups if len(g) > 1 and labels[g[0]] > 0]
        """The channels of each space, as sets of tied slots."""

    def places(self, slots: Slots | None, space: int) -> Places:
        """Return the positions of the members of a space among slots, of shape (n_copies, n_members)."""
        members = self.members[space]
        sets = self._sets[slots] if slots is not None else np.zeros(0, np.int64)
        index = np.searchsorted(members, sets).clip(max=len(members) - 1)
        found = np.flatnonzero(members[index] == sets)
        return found[np.argsort(index[found], kind="stable")].reshape(len(members), -1).T

    def mixed(self, absorber: Absorber, value: Array, space: int, matrix: Matrix, inverse: Matrix) -> Array:
        """Return the value of a constant after the channels of a space are multiplied by a matrix.

        Parameters
        ----------
        absorber : Absorber
        value : ndarray
        space : int
        matrix, inverse : ndarray of shape (n_members, n_members)
        """
        if absorber.form is None:
            moved = np.moveaxis(value.astype(np.float64), absorber.axis, 0)
            for copy in self.places(absorber.times, space):
                moved[copy] = np.tensordot(matrix, moved[copy], 1)
            return np.ascontiguousarray(np.moveaxis(moved, 0, absorber.axis), np.float32)
        rows = absorber.form.weight_rows(value)[0].astype(np.float64)
        for copy in self.places(absorber.times, space):
            rows[copy] = matrix @ rows[copy]
        terms = rows.reshape(len(rows), -1, absorber.form.taps)
        for copy in self.places(absorber.over, space):
            terms[:, copy] = np.swapaxes(np.tensordot(terms[:, copy], inverse, (1, 0)), 1, 2)
        return np.ascontiguousarray(absorber.form.weight_from_rows(rows[None]), np.float32)


def _grouped(channels: Channels, absorber: Absorber) -> bool:
    """Return True for the weight of a grouped layer, whose outputs do not read all channels."""
    return (
        absorber.form is not None
        and row_shape(absorber.form, channels.view.constant_shape(absorber.constant))[0] > 1
    )


def _refined(vectors: Sequence[Slots], count: int) -> NDArray[np.int64]:
    """Return labels that are equal for sets that occur in the same vectors equally often; 0 if in none."""
    labels, used = np.zeros(count, np.int64), 0
    for vector in vectors:
        sets, times = np.unique(vector, return_counts=True)
        pairs = np.stack([labels[sets], times], axis=1)
        kinds, kind = np.unique(pairs, axis=0, return_inverse=True)
        labels[sets] = used + 1 + kind.reshape(-1)
        used += len(kinds)
    return labels
