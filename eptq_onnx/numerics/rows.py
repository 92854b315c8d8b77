"""Match the rows of outputs whose order is arbitrary, before two networks are compared.

TopK and NonMaxSuppression return rows in an order, and often in a number, that small errors change and that
no reader of the outputs relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from eptq_onnx.numerics.types import Feeds

_MOST = 4096
"""Largest number of rows to match: the cost of matching grows with its cube."""

Pair = tuple[NDArray[Any], NDArray[Any]]


def laid_beside(expected: Feeds, got: Feeds, axes: Mapping[str, int]) -> dict[str, Pair]:
    """Return both networks' outputs with matching rows side by side; unmatched rows are paired with zeros.

    Outputs with equal numbers of rows, in each network, are matched together: boxes with their scores.

    Parameters
    ----------
    expected, got : mapping of str to ndarray
        Outputs of the float network and of another.
    axes : mapping of str to int
        Row axis of each output that has rows.
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
    """Return the axis of an output whose size is the number of rows of some choice; None if there is none.

    Parameters
    ----------
    value : ndarray
    counts : set of int
        Numbers of rows that the network chose.
    """
    # The first axis comes last, because it may be the batch.
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
    """Return the indices of both sides' rows in a common order, unmatched rows last."""
    cost = np.zeros((count, others))
    for ours, theirs in rows:
        unit = float(np.square(ours).mean()) if ours.size else 0.0
        distance = np.square(ours).sum(1)[:, None] + np.square(theirs).sum(1) - 2 * ours @ theirs.T
        cost += distance / (unit or 1.0)
    # Keep the order in exact ties.
    cost += 1e-9 * np.abs(np.arange(count)[:, None] - np.arange(others))
    matched = [np.asarray(places, np.int64) for places in linear_sum_assignment(cost)]
    alone = [np.setdiff1d(np.arange(n), m) for n, m in zip((count, others), matched, strict=True)]
    return np.concatenate([matched[0], alone[0]]), np.concatenate([matched[1], alone[1]])


def _arranged(value: NDArray[Any], axis: int, places: NDArray[np.int64], count: int) -> NDArray[Any]:
    taken = np.take(value, places, axis)
    widths = [(0, count - len(places) if k == axis else 0) for k in range(value.ndim)]
    return np.pad(taken, widths)
