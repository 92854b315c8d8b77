"""Rows in free order: outputs of networks that choose by value are compared after the rows of one are laid
beside those of the other.

What TopK or NonMaxSuppression chooses comes in an order, and often in a number, that a small error changes,
and that nobody who reads the outputs relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from eptq_onnx.numerics.types import Feeds

_MOST = 4096
"""Rows, at most: matching takes their cube."""

Pair = tuple[NDArray[Any], NDArray[Any]]


def laid_beside(expected: Feeds, got: Feeds, axes: Mapping[str, int]) -> dict[str, Pair]:
    """Both networks' outputs with matching rows beside each other; a row without a counterpart stands beside
    zeros.

    Outputs that have as many rows as each other, in each network, are matched together: boxes with their
    scores.

    Parameters
    ----------
    expected, got : mapping of str to ndarray
        Outputs of the float network and of another.
    axes : mapping of str to int
        Axis of the rows of each output that has any.
    """
    result: dict[str, Pair] = {name: (value, got[name]) for name, value in expected.items()}
    groups: dict[tuple[int, int], list[str]] = {}
    for name, axis in axes.items():
        value, other = result[name]
        if value.ndim == other.ndim and value.ndim > axis and _rest(value, axis) == _rest(other, axis):
            groups.setdefault((value.shape[axis], other.shape[axis]), []).append(name)
    for (count, others), names in groups.items():
        if max(count, others) > _MOST or (count == others and count < 2):
            continue
        rows = [(_rows(result[n][0], axes[n]), _rows(result[n][1], axes[n])) for n in names]
        first, second = _assignment(rows, count, others)
        for name in names:
            axis = axes[name]
            result[name] = tuple(  # type: ignore[assignment]  # two
                _arranged(value, axis, places, max(count, others))
                for value, places in zip(result[name], (first, second), strict=True)
            )
    return result


def rows_axis(value: NDArray[Any], counts: set[int]) -> int | None:
    """The axis of an output along which there are as many rows as some choice made; None if there is none.

    Parameters
    ----------
    value : ndarray
    counts : set of int
        Numbers of rows that the network chose.
    """
    # The first axis may be that of the batch.
    order = [*range(1, value.ndim), 0] if value.ndim else []
    return next((k for k in order if value.shape[k] in counts), None)


def _rest(value: NDArray[Any], axis: int) -> tuple[int, ...]:
    return value.shape[:axis] + value.shape[axis + 1 :]


def _rows(value: NDArray[Any], axis: int) -> NDArray[np.float64]:
    moved = np.moveaxis(value, axis, 0)
    size = int(np.prod(moved.shape[1:], dtype=np.int64))
    return np.nan_to_num(moved.reshape(len(moved), size).astype(np.float64), posinf=0.0, neginf=0.0)


def _assignment(
    rows: list[tuple[NDArray[np.float64], NDArray[np.float64]]], count: int, others: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the rows of both sides in the common order; those without a counterpart last."""
    cost = np.zeros((count, others))
    for ours, theirs in rows:
        unit = float(np.square(ours).mean()) if ours.size else 0.0
        distance = np.square(ours).sum(1)[:, None] + np.square(theirs).sum(1) - 2 * ours @ theirs.T
        cost += distance / (unit or 1.0)
    # In exact ties the order stays.
    cost += 1e-9 * np.abs(np.arange(count)[:, None] - np.arange(others))
    matched = [np.asarray(places, np.int64) for places in linear_sum_assignment(cost)]
    alone = [np.setdiff1d(np.arange(n), m) for n, m in zip((count, others), matched, strict=True)]
    return np.concatenate([matched[0], alone[0]]), np.concatenate([matched[1], alone[1]])


def _arranged(value: NDArray[Any], axis: int, places: NDArray[np.int64], count: int) -> NDArray[Any]:
    taken = np.take(value, places, axis)
    widths = [(0, count - len(places) if k == axis else 0) for k in range(value.ndim)]
    return np.pad(taken, widths)
