"""Rounding a matrix so that its products keep, in closed form. Pure numpy, no ONNX.

With second moments ``A = E[x_q x_qᵀ]`` of the inputs that a layer gets in the quantized network, and
``C = E[x_q yᵀ]`` with the outputs ``y = W x_f`` of the float network, the weights that come closest to these outputs are
``W* = Cᵀ A⁻¹`` (input-error correction), and integers Q cost ``tr((sQ - W*) A (sQ - W*)ᵀ)``. That is minimised element by
element, each rounding error being made up for by the elements that follow (OBQ, Frantar & Alistarh 2022; GPTQ,
Frantar et al. 2023), and then by coordinate descent.

That treats every output alike. With ``G = E[g gᵀ]`` of the network outputs' Hessian factor ``g = Jᵀ v`` (paper section
3.1) the error's effect on the network outputs is ``tr(G (sQ - W*) A (sQ - W*)ᵀ)``, to Kronecker's approximation (K-FAC,
Martens and Grosse 2015): outputs make up for each other's errors where the rest of the network adds them up.

Everywhere the first axis is the group: weights (n_groups, n_outputs, n_terms), moments (n_groups, n_terms, n_terms),
scales (n_groups, n_outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.linear import LinearForm
from eptq_onnx.numerics.types import Array
from eptq_onnx.parallel import ordered_map

Float64 = NDArray[np.float64]
Limits: TypeAlias = tuple[Array, Array]
"""Least and largest integer of each row of a weight, both of shape (n_groups, n_outputs)."""

_MOST_GAIN = 1.1
"""Largest correction of an output's slope: where almost nothing of the float output is left, a gain would amplify noise."""

_SCALE_DAMPING, _MOST_REFIT = 1e-3, 2.0
"""How reluctantly scales are refitted together, in units of their curvature, and how far at most."""

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1000.0)
"""What `best_damping` tries."""

_VALUES_AT_ONCE = 2**20
"""Of rows that are gathered before they are added to the second moments: large products are fast while they stay in the cache."""

_SEEN_SHARE = 0.95
"""How much the slope of the function that reads an output decides what a row counts for it; the rest all have in common."""

_STEP, _LEAST_STEP = 0.25, 1e-3
"""What errors these slopes are taken over, in units of each output's deviation: about those of 4 bits. Not less than a
thousandth of the largest."""

_BLOCK = 64
"""Columns that are corrected one by one before the rest is, in one matrix product."""


Covariances = tuple[Float64, Float64, Float64]
"""A = E[x_q x_qᵀ], C = E[x_q yᵀ] and V = E[y²], of shapes (n_groups, n_terms, n_terms), (n_groups, n_terms,
n_outputs) and (n_groups, n_outputs)."""


_Rows: TypeAlias = tuple[Array, Array, Array]
"""Outputs, inputs and shares of some rows."""


@dataclass(frozen=True)
class Reader:
    """The function of each output alone through which a layer acts on the rest of the network.

    Parameters
    ----------
    function : callable
        Of outputs of shape (n_groups, n_rows, n_outputs), bias included.
    bias : ndarray of shape (n_groups, n_outputs)
    """

    function: Callable[[Array], Array]
    bias: Array

    def slopes(self, outputs: Array, steps: Array) -> Array:
        """Of the function at each output (without bias), over steps of shape (n_groups, 1, n_outputs); 0 where it has none."""
        z = outputs + self.bias[:, None, :]
        with np.errstate(invalid="ignore", over="ignore"):
            slope = (self.function(z + steps) - self.function(z - steps)) / (2 * steps)
        return np.where(np.isfinite(slope), slope, 0).astype(np.float32)


class Moments:
    """Streaming second moments of a layer's quantized inputs and float outputs, of two halves of the batches apart.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
        Makes the float outputs of the float inputs; without a bias.
    centred : bool
        True if a bias takes up the means: errors in them then count nothing.
    reader : Reader, optional
        Rows then count, for each output, by how steep its function is there: errors where it is flat are not seen. As no
        two outputs have the same moments, each is a group of its own.
    """

    def __init__(self, weight: Array, centred: bool = True, reader: Reader | None = None) -> None:
        self._centred = centred
        self._reader = reader
        self._steps: Array | None = None
        self._steepest = 1.0
        self.apart = weight.shape[1] if reader is not None else 1
        """Outputs of each group that stand apart from each other."""
        self._turned = np.ascontiguousarray(weight.swapaxes(1, 2))
        self._batches = 0
        self._shifts: tuple[Array, Array] | None = None
        self._waiting: tuple[list[_Rows], list[_Rows]] = [], []
        self._halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    def add(self, exact: Array, quantized: Array, weights: Array | None = None) -> None:
        """Take rows of inputs of both networks, of shape (n_groups, n_rows, n_terms); each counts ``weights`` times."""
        outputs = np.matmul(exact, self._turned)
        if self._shifts is None:
            # Sums of values whose mean is far from 0 would lose the variance to float32.
            shifts = outputs.mean(axis=1), quantized.mean(axis=1)
            self._shifts = shifts if self._centred else (np.zeros_like(shifts[0]), np.zeros_like(shifts[1]))
        y, q = (x - shift[:, None, :] for x, shift in zip((outputs, quantized), self._shifts, strict=True))
        half = self._batches % 2
        shares = np.ones((1, q.shape[1], 1), np.float32) if weights is None else weights[None, :, None]
        self._waiting[half].append((y, q, shares if self._reader is None else shares * self._seen(self._reader, outputs)))
        self._batches += 1
        if sum(q.size for _, q, _ in self._waiting[half]) >= _VALUES_AT_ONCE:
            self._settle(half)

    def _seen(self, reader: Reader, outputs: Array) -> Array:
        """How much errors of each output count; shape (n_groups, n_rows, n_outputs)."""
        if self._steps is None:
            # One row alone has no deviation.
            steps = np.float32(_STEP) * (outputs.std(axis=1, keepdims=True) if outputs.shape[1] > 1 else np.abs(outputs))
            largest = float(steps.max())
            self._steps = np.maximum(steps, _LEAST_STEP * largest) if largest > 0 else np.ones_like(steps)
            self._steepest = float(np.abs(reader.slopes(outputs, self._steps)).max()) or 1.0
        relative = reader.slopes(outputs, self._steps) / np.float32(self._steepest)
        return np.asarray((1 - _SEEN_SHARE) + np.float32(_SEEN_SHARE) * np.square(relative), np.float32)

    def _settle(self, half: int) -> None:
        """Add the rows that wait to the sums."""
        if not self._waiting[half]:
            return
        y, q, shares = (np.concatenate(parts, axis=1) for parts in zip(*self._waiting[half], strict=True))
        self._waiting[half].clear()
        if self.apart == 1:
            sums = _sums(y, q, shares)
        else:
            each = [_sums(y[:, :, k : k + 1], q, shares[:, :, k : k + 1]) for k in range(self.apart)]
            sums = {name: np.stack([s[name] for s in each], axis=1).reshape(-1, *value.shape[1:]) for name, value in each[0].items()}
        known = self._halves[half]
        for name, value in sums.items():
            if name in known:
                known[name] += value
            else:
                known[name] = np.asarray(value, np.float64)

    @property
    def is_empty(self) -> bool:
        """True if there was no row of numbers."""
        return not self._batches

    @property
    def means(self) -> tuple[Float64, Float64]:
        """Mean float outputs (n_groups, n_outputs) and mean quantized inputs (n_groups, n_terms)."""
        rows, y, q = (self._total(name) for name in ("rows", "y", "q"))
        shift_y, shift_q = self._shifts or (np.zeros_like(y), np.zeros_like(q))
        return y / rows + shift_y.reshape(y.shape), q / rows + np.repeat(shift_q, len(q) // len(shift_q), axis=0)

    def mean_error(self, rows: Array) -> Array:
        """Mean float outputs less those of a rounded weight of such rows: what the bias must take up; of shape (n_channels,)."""
        outputs, inputs = self.means
        return np.asarray((outputs - np.einsum("gnt,gt->gn", rows, inputs)).reshape(-1), np.float32)

    @property
    def covariances(self) -> Covariances:
        """Of all rows."""
        return self._covariances({name: self._total(name) for name in self._settled()[0]})

    @property
    def halves(self) -> tuple[Covariances, ...]:
        """Of each half of the batches; empty where there is one batch only.

        Where outputs stand apart, those of a group have the mean of their A.
        """
        return tuple(self._pooled(*self._covariances(sums)) for sums in self._settled()) if self._batches > 1 else ()

    def _pooled(self, moment: Float64, cross: Float64, power: Float64) -> Covariances:
        if self.apart == 1:
            return moment, cross, power
        groups, terms = len(moment) // self.apart, moment.shape[1]
        own = moment.reshape(groups, self.apart, terms, terms).mean(axis=1)
        return own, cross.reshape(groups, self.apart, terms).swapaxes(1, 2), power.reshape(groups, self.apart)

    def _settled(self) -> tuple[dict[str, Any], dict[str, Any]]:
        for half in range(2):
            self._settle(half)
        return self._halves

    def _total(self, name: str) -> Any:
        first, second = self._settled()
        return first[name] + second.get(name, 0.0)

    def _covariances(self, sums: dict[str, Any]) -> Covariances:
        rows, share = sums["rows"], float(self._centred)
        y, q = share * sums["y"] / rows, share * sums["q"] / rows
        return (
            sums["qq"] / rows[:, :, None] - q[:, :, None] * q[:, None, :],
            sums["qy"] / rows[:, :, None] - q[:, :, None] * y[:, None, :],
            sums["yy"] / rows - np.square(y),
        )


def _sums(y: Array, q: Array, shares: Array) -> dict[str, Any]:
    """Sums over rows of products of outputs (n_groups, n_rows, n_outputs) and inputs (n_groups, n_rows, n_terms).

    Each row counts by ``shares`` of shape (n_groups or 1, n_rows, 1).
    """
    share = shares.swapaxes(1, 2)
    turned = q.swapaxes(1, 2) * share
    return {
        "qq": np.matmul(turned, q),
        "qy": np.matmul(turned, y),
        "yy": np.matmul(share, np.square(y))[:, 0].astype(np.float64),
        "q": turned.sum(axis=2, dtype=np.float64),
        "y": np.matmul(share, y)[:, 0].astype(np.float64),
        "rows": share.sum(axis=2, dtype=np.float64),
    }


def sampled_moments(
    form: LinearForm,
    weight: Array,
    exact: Sequence[NDArray[Any]],
    quantized: Sequence[NDArray[Any]],
    wanted: int,
    rng: np.random.Generator,
    *,
    centred: bool = True,
    importance: Sequence[Array | None] | None = None,
    reader: Reader | None = None,
) -> Moments:
    """Moments of about ``wanted`` random rows of a layer's inputs, of the same positions in both networks.

    Parameters
    ----------
    form : LinearForm
    weight : ndarray
        The float weight.
    exact, quantized : sequence of ndarray
        The layer's input in the float and in the quantized network, batch by batch; not all are empty.
    wanted : int
    rng : Generator
    centred : bool
        See `Moments`.
    importance : sequence of (ndarray of shape (n_positions,) or None), optional
        How much each position counts, batch by batch, about 1 on average; by default all count the same. Positions that
        count more are drawn more often.
    reader : Reader, optional
        See `Moments`.
    """
    moments = Moments(form.weight_rows(weight), centred, reader)
    # Of rows that are chosen by value there may be none.
    some = [k for k, x in enumerate(exact) if x.size]
    exact, quantized = [exact[k] for k in some], [quantized[k] for k in some]
    importance = None if importance is None else [importance[k] for k in some]
    total = sum(form.positions(x.shape) for x in exact)

    def places() -> Iterator[tuple[NDArray[np.int64], Array]]:
        for k, x in enumerate(exact):
            available = form.positions(x.shape)
            counts = importance[k] if importance is not None else None
            goal = (np.ones(available) if counts is None else counts) * min(1.0, wanted / max(total, 1))
            chance = np.minimum(goal, 1.0)
            chosen = np.flatnonzero(rng.random(available) < chance)
            if not len(chosen) and available:
                chosen = np.array([chance.argmax()])
            yield chosen, (goal[chosen] / chance[chosen]).astype(np.float32)

    def rows(batch: tuple[NDArray[Any], NDArray[Any], tuple[NDArray[np.int64], Array]]) -> tuple[Array, Array, Array]:
        x_f, x_q, (chosen, weights) = batch
        return form.input_rows(np.asarray(x_f, np.float32), chosen), form.input_rows(np.asarray(x_q, np.float32), chosen), weights

    for parts in ordered_map(rows, zip(exact, quantized, places(), strict=True)):
        known = _numbers(*parts)
        if known[0].shape[1]:
            moments.add(*known)
    return moments


def _numbers(exact: Array, quantized: Array, weights: Array) -> tuple[Array, Array, Array]:
    """The rows (n_groups, n_rows, n_terms) that are finite in both networks."""
    finite = np.isfinite(exact) & np.isfinite(quantized)
    if finite.all():
        return exact, quantized, weights
    known = finite.all(axis=(0, 2))
    return exact[:, known], quantized[:, known], weights[known]


def _ridge(moment: Float64, damping: float | Float64) -> Float64:
    """``damping * mean(diag A) I``; the identity where A is 0 (inputs that never vary)."""
    mean = np.einsum("gii->gi", moment).mean(axis=1)
    return np.where(mean > 0, damping * mean, 1.0)[:, None, None] * np.eye(moment.shape[1])


def damped(moment: Float64, damping: float) -> Float64:
    """``A + damping * mean(diag A) I``, with a diagonal that is nowhere 0."""
    return moment + _ridge(moment, damping)


def corrected_target(weight: Array, moment: Float64, cross: Float64, power: Float64, damping: float | Float64) -> Array:
    """The weights that, on the quantized inputs, come closest to the float outputs without shrinking them.

    ``W* = g (C + mu Wᵀ)ᵀ (A + mu I)⁻¹`` with mu a share of A's mean diagonal: the larger, the closer to W. Least squares
    shrinks what it predicts from noisy inputs, layer after layer, and rare strong responses (objects, rare classes)
    suffer first. The gain g of each output makes up for that: the slope of the corrected output over the float one is 1.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
    moment, cross, power : ndarray
        A, C and V of `Moments.covariances`.
    damping : float or ndarray of shape (n_groups,)
    """
    ridge = _ridge(moment, damping)
    pull = cross + np.einsum("gii->gi", ridge)[:, :, None] * weight.swapaxes(1, 2)
    target = np.linalg.solve(moment + ridge, pull).swapaxes(1, 2)
    reached = (target * cross.swapaxes(1, 2)).sum(axis=2)
    gain = np.where(reached > 0, power / np.where(reached > 0, reached, 1), 1.0)
    return np.asarray(target * np.clip(gain, 1 / _MOST_GAIN, _MOST_GAIN)[:, :, None], np.float32)


def best_damping(weight: Array, halves: Sequence[Covariances]) -> Float64:
    """The damping of `corrected_target` that serves each group best on the half of the inputs that it was not fitted to.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
    halves : sequence of Covariances
        Two, or none: then the middle one of those that are tried.

    Returns
    -------
    ndarray of shape (n_groups,)
    """
    if not halves:
        return np.full(len(weight), DAMPINGS[len(DAMPINGS) // 2])
    errors = np.zeros((len(DAMPINGS), len(weight)))
    for fitted, (moment, cross, power) in zip(halves, reversed(halves), strict=True):
        for k, damping in enumerate(DAMPINGS):
            target = corrected_target(weight, *fitted, damping)
            explained = (target * cross.swapaxes(1, 2)).sum(axis=(1, 2))
            errors[k] += cost(target, moment).sum(axis=1) - 2 * explained + power.sum(axis=1)
    chosen: Float64 = np.asarray(DAMPINGS, np.float64)[errors.argmin(axis=0)]
    return chosen


@dataclass(frozen=True)
class Comparison:
    """A layer's outputs in the float and in the quantized network, summed over the positions of every sample.

    Where samples and positions share the first axis, every position counts as a sample.

    Parameters
    ----------
    positions : ndarray of shape (n_samples, 1)
        Their number.
    exact, rough : ndarray of shape (n_samples, n_channels)
        Sums of float and of quantized values.
    power, product : ndarray of shape (n_samples, n_channels)
        Sums of the squared float values, and of their products with the quantized.
    """

    positions: Float64
    exact: Float64
    rough: Float64
    power: Float64
    product: Float64

    @classmethod
    def of(cls, exact: Array, rough: Array) -> Comparison:
        """From the outputs of a batch, channels along the last axis."""
        x, y = (v.reshape(len(v), -1, v.shape[-1]).astype(np.float64) for v in (exact, rough))
        return cls(np.full((len(x), 1), float(x.shape[1])), x.sum(axis=1), y.sum(axis=1), np.square(x).sum(axis=1), (x * y).sum(axis=1))

    @classmethod
    def joined(cls, parts: Sequence[Comparison], share: float) -> Comparison:
        """The first of all samples, this share of them."""
        kept = round(share * sum(len(p.power) for p in parts))
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts])[:kept] for f in fields(cls)))

    @property
    def means(self) -> tuple[Float64, Float64]:
        """Of the float and of the quantized values of each channel."""
        return self.exact.sum(axis=0) / self.positions.sum(), self.rough.sum(axis=0) / self.positions.sum()

    @property
    def gains(self) -> Float64:
        """What each channel's quantized values lack to have the slope 1 over the float values, near 1.

        Slopes of channels that differ by no more than the samples disagree are taken to be the same (James and Stein 1961).
        """
        mean, other = self.means
        power = self.power - mean * (2 * self.exact - self.positions * mean)
        product = self.product - mean * self.rough - other * (self.exact - self.positions * mean)
        total = power.sum(axis=0)
        varies = total > 0
        if not varies.any():
            return np.ones(len(total))
        total = np.where(varies, total, 1)
        common = product.sum() / power.sum()
        slope = np.where(varies, product.sum(axis=0) / total, common)
        count = len(power)
        doubt = np.square(product - slope * power).sum(axis=0) / np.square(total) * count / max(count - 1, 1)
        spread = max(0.0, float((np.square(slope - common) - doubt)[varies].mean())) if count > 1 else 0.0
        slope = common + spread / np.maximum(spread + doubt, 1e-30) * (slope - common)
        return np.asarray(1 / np.clip(slope, 1 / _MOST_GAIN, _MOST_GAIN))


def cost(error: Array, moment: Float64) -> Float64:
    """``e A eᵀ`` of each row: mean squared error of each output; shape (n_groups, n_outputs)."""
    return np.asarray((np.matmul(error, moment.astype(np.float32)) * error).sum(axis=2, dtype=np.float64))


@dataclass(frozen=True)
class Feedback:
    """How the error of a term is spread over the terms that are rounded after it; the same for all scales and widths.

    Parameters
    ----------
    order : ndarray of int, shape (n_groups, n_terms)
        The largest second moments first: the others are left to make up for them.
    weights : ndarray of shape (n_groups, n_terms, n_terms)
        Row i: what each later term (in that order) takes of the error of term i.
    """

    order: NDArray[np.int64]
    weights: Array

    @classmethod
    def of(cls, moment: Float64) -> Feedback:
        """From a positive definite moment: the rows of the upper Cholesky factor of A⁻¹, over its diagonal."""
        order = np.argsort(-np.einsum("gii->gi", moment), axis=1, kind="stable")
        ordered = np.take_along_axis(np.take_along_axis(moment, order[:, :, None], 1), order[:, None, :], 2)
        factor = np.linalg.cholesky(np.linalg.inv(ordered)).swapaxes(1, 2)
        return cls(order, (factor / np.einsum("gii->gi", factor)[:, :, None]).astype(np.float32))


def compensated_rounding(target: Array, scale: Array, feedback: Feedback, limits: Limits) -> Array:
    """Round column by column, the later columns making up for the errors of the earlier.

    Parameters
    ----------
    target : ndarray of shape (n_groups, n_outputs, n_terms)
    scale : ndarray of shape (n_groups, n_outputs)
    feedback : Feedback
    limits : tuple of ndarray
        Least and largest integer of each row, of shape (n_groups, n_outputs).

    Returns
    -------
    ndarray of float32
        Integers, in the shape of ``target``.
    """
    order, spread = feedback.order, feedback.weights
    rest = np.take_along_axis(target, order[:, None, :], 2) / scale[:, :, None]
    result = np.empty_like(rest)
    terms = rest.shape[2]
    for begin in range(0, terms, _BLOCK):
        end = min(begin + _BLOCK, terms)
        block = rest[:, :, begin:end]
        errors = np.empty_like(block)
        for i in range(end - begin):
            q = np.clip(np.rint(block[:, :, i]), *limits)
            result[:, :, begin + i] = q
            errors[:, :, i] = block[:, :, i] - q
            block[:, :, i + 1 :] -= errors[:, :, i, None] * spread[:, None, begin + i, begin + i + 1 : end]
        if end < terms:
            rest[:, :, end:] -= np.matmul(errors, spread[:, begin:end, end:])
    back = np.argsort(order, axis=1, kind="stable")
    return np.take_along_axis(result, back[:, None, :], 2)


def coordinate_descent(target: Array, integers: Array, scale: Array, moment: Float64, limits: Limits, passes: int) -> Array:
    """Move integers one at a time to where the cost is least, all others fixed.

    Returns
    -------
    ndarray of float32
        Integers of no higher cost.
    """
    a = moment.astype(np.float32)
    diagonal = np.einsum("gii->gi", a)
    q = integers.copy()
    terms = q.shape[2]
    for _ in range(passes):
        # In integer steps: remaining error, and its product with A.
        pull = np.matmul(target / scale[:, :, None] - q, a)
        moved = False
        for begin in range(0, terms, _BLOCK):
            end = min(begin + _BLOCK, terms)
            steps = np.zeros_like(q[:, :, begin:end])
            local = pull[:, :, begin:end]
            for i in range(end - begin):
                column = q[:, :, begin + i]
                wanted = np.clip(np.rint(column + local[:, :, i] / diagonal[:, None, begin + i]), *limits)
                step = wanted - column
                if step.any():
                    q[:, :, begin + i] = wanted
                    steps[:, :, i] = step
                    local -= step[:, :, None] * a[:, None, begin + i, begin:end]
            if steps.any():
                moved = True
                if end < terms:
                    pull[:, :, end:] -= np.matmul(steps, a[:, begin:end, end:])
        if not moved:
            break
    return q


def refitted_scale(target: Array, integers: Array, scale: Array, moment: Float64, owners: NDArray[np.int64]) -> Array:
    """Scales of the least cost for given integers.

    Parameters
    ----------
    target, integers : ndarray of shape (n_groups, n_outputs, n_terms)
    scale : ndarray of shape (n_scales,)
        Kept where no positive scale fits (a row of zeros).
    moment : ndarray of shape (n_groups, n_terms, n_terms)
        A.
    owners : ndarray of int, shape (n_groups, n_outputs)
        The place of each row's scale.
    """
    product = np.matmul(integers, moment.astype(np.float32))
    right, curvature = np.zeros(scale.size), np.zeros(scale.size)
    np.add.at(right, owners, (product * target).sum(axis=2, dtype=np.float64))
    np.add.at(curvature, owners, (product * integers).sum(axis=2, dtype=np.float64))
    fits = (curvature > 0) & (right > 0)
    return np.where(fits, right / np.where(fits, curvature, 1), scale).astype(np.float32)


def jointly_refitted_scale(
    target: Array, integers: Array, scale: Array, moment: Float64, output_moment: Float64, owners: NDArray[np.int64]
) -> Array:
    """Scales of the least effect on the network outputs for given integers.

    Parameters
    ----------
    target, integers, moment, output_moment : ndarray
        As in `joint_descent`.
    scale : ndarray of shape (n_scales,)
    owners : ndarray of int, shape (n_groups, n_outputs)
        The place of each row's scale.
    """
    system, right = np.zeros((scale.size, scale.size)), np.zeros(scale.size)
    for wanted, q, inputs, outputs, owner in zip(target, integers.astype(np.float64), moment, output_moment, owners, strict=True):
        product = q @ inputs
        np.add.at(system, (owner[:, None], owner[None, :]), outputs * (product @ q.T))
        np.add.at(right, owner, ((outputs @ wanted) * product).sum(axis=1))
    # Scales that hardly matter stay where they are, and none goes far.
    diagonal = np.diag(system)
    ridge = np.where(diagonal > 0, _SCALE_DAMPING * diagonal, 1.0)
    fitted = np.linalg.solve(system + np.diag(ridge), right + ridge * scale)
    return np.clip(fitted, scale / _MOST_REFIT, scale * _MOST_REFIT).astype(np.float32)


def joint_descent(
    target: Array, integers: Array, scale: Array, moment: Float64, output_moment: Float64, limits: Limits, passes: int
) -> Array:
    """Coordinate descent on the effect of each group's errors on the network outputs, ``tr(G E A Eᵀ)``.

    Parameters
    ----------
    target, integers : ndarray of shape (n_groups, n_outputs, n_terms)
    scale : ndarray of shape (n_groups, n_outputs)
    moment : ndarray of shape (n_groups, n_terms, n_terms)
        A.
    output_moment : ndarray of shape (n_groups, n_outputs, n_outputs)
        G.
    limits : tuple of ndarray
        Least and largest integer of each row, of shape (n_groups, n_outputs).
    passes : int

    Returns
    -------
    ndarray of float32
        Integers of no higher cost.
    """
    least, most = limits
    groups = zip(target, integers, scale, moment, output_moment, least, most, strict=True)
    return np.stack([_joint_descent(w, q, s, a, g, (low, high), passes) for w, q, s, a, g, low, high in groups])


def _joint_descent(
    target: Array, integers: Array, scale: Array, moment: Float64, output_moment: Float64, limits: Limits, passes: int
) -> Array:
    """`joint_descent` of one group."""
    q, s = integers.astype(np.float64), scale.astype(np.float64)
    terms = q.shape[1]
    for _ in range(passes):
        pull = output_moment @ (target - s[:, None] * q) @ moment
        moved = False
        for begin in range(0, terms, _BLOCK):
            end = min(begin + _BLOCK, terms)
            effects = np.zeros((len(q), end - begin))
            local = pull[:, begin:end]
            for i in range(end - begin):
                t = begin + i
                effect = _descend_column(q[:, t], s, local[:, i], moment[t, t], output_moment, limits)
                if effect is not None:
                    effects[:, i] = effect
                    local[:, i + 1 :] -= np.outer(effect, moment[t, t + 1 : end])
            if effects.any():
                moved = True
                pull[:, end:] -= effects @ moment[begin:end, end:]
        if not moved:
            break
    return q.astype(np.float32)


def _descend_column(
    column: Float64, scale: Float64, pull: Float64, variance: float, output_moment: Float64, limits: Limits
) -> Float64 | None:
    """Move integers of one column, the most useful move first, in place; returns G times the moves, None if there are none."""
    curvature = scale * np.diag(output_moment) * variance
    effect: Float64 | None = None
    for _ in range(2 * len(column)):
        wanted = np.clip(np.rint(column + pull / curvature), *limits) - column
        gain = scale * wanted * (2 * pull - wanted * curvature)
        best = int(np.argmax(gain))
        if gain[best] <= 1e-9 * curvature[best] * scale[best]:
            break
        step = scale[best] * wanted[best]
        column[best] += wanted[best]
        push = step * output_moment[best]
        pull -= push * variance
        effect = push if effect is None else effect + push
    return effect
