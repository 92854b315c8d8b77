"""Mix channels so that the rows of all weights around them can be rounded finely.

Where only linear operators lie between layers (`eptq_onnx.graph.spaces`), any invertible matrix T may be
merged into the rows of the layers in front, ``T W``, and its inverse into the terms of those behind, ``W
T⁻¹``; the float model computes the same. With one grid per row, whose step follows the largest element, the
squared errors are, to first order and relative to the output of each layer,

    sum_front   n b sum_i |T W|_i² / (levels² tr W Wᵀ G)
    + sum_behind  e sum_o |W T⁻¹|_o² / (levels² tr W S Wᵀ),

with ``|.|_i`` the largest magnitude of a row, n its terms, b the mean importance of the mixed channels and e
their power. S, the squared rows of all layers in front, stands for the power of each unmixed channel, and G,
the squared columns of all layers behind, for its importance. T is a diagonal that balances the two (as in
cross-layer equalization, Nagel et al. 2019) followed by a rotation (SpinQuant, Liu et al. 2024, learns
rotations from gradients of the network). L-BFGS over its Cayley parameters minimizes the errors, with a
smooth norm in place of the largest magnitudes. Weights end up evenly spread over their range. No data are
needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from scipy.optimize import minimize

from eptq_onnx.config import Config
from eptq_onnx.graph import edit
from eptq_onnx.graph.channels import Absorber
from eptq_onnx.graph.spaces import Matrix, Spaces
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import channels_of
from eptq_onnx.records import Plan

_ITERATIONS = 40
"""L-BFGS iterations: enough for nine tenths of the gain of hundreds."""
_OPERATIONS_AN_ELEMENT, _OPERATIONS_A_CUBE = 300, 14
"""Time of the powers of an element, and per cube of the number of members for the inverse and the products of
a rotation in double precision, in multiplications of a large matrix product.
"""
_EVALUATIONS = 1.25
"""Evaluations in an iteration."""
_MOST = 2048
"""Largest number of members of a space: an evaluation inverts a matrix of that size."""
_LEAST_SHARE = 1e-3
"""Smallest weight of a channel relative to the mean: dead channels have no power or no importance."""
_WORTH = 0.8
"""Ratio of predicted errors after and before, above which a space is left unmixed.

The prediction ignores the effect of mixing on the ranges of activations.
"""
_FLOATS_A_TERM = 6
"""Floats held per element of a weight while it is processed."""


@dataclass(frozen=True)
class _Side:
    """A weight's part in a space.

    Parameters
    ----------
    levels : int
        Steps in its range; 0 for a weight that stays float.
    rows : ndarray
        For a producer, of shape (n_members, n_copies * n_terms), copies one after the other. For a consumer,
        of shape (n_outputs * n, n_members), with the n places that each member has in a row one after the
        other.
    count : int
        Number of copies, or of places.
    beyond : ndarray of shape (n_outputs, 1) or None
        For a consumer, the norm of each row's elements that read channels outside the space.
    """

    levels: int
    rows: Array
    count: int
    beyond: Array | None = None

    @property
    def squares(self) -> NDArray[np.float64]:
        """Return the sum of squares of each member."""
        return np.asarray(
            np.square(self.rows, dtype=np.float64).sum(axis=0 if self.beyond is not None else 1)
        )

    @property
    def terms(self) -> int:
        """Return the number of terms of a producer's rows."""
        return int(self.rows.shape[1] // self.count)

    def whole(self, rows: Array) -> tuple[Array, Array | None]:
        """Return the rows of the weight, made from ``rows``, and the norm of their other elements.

        ``rows`` is laid out like the attribute of that name.
        """
        count = len(rows) * self.count if self.beyond is None else len(rows) // self.count
        return rows.reshape(count, -1), self.beyond

    def unit(self, weights: NDArray[np.float64]) -> float:
        """Return the weight of a squared range of 1, relative to the weighted squares of all members."""
        return 1 / (self.levels**2 * max(float(self.squares @ weights), 1e-30))


def needed_bytes(model: ModelProto) -> int:
    """Return the approximate memory that `rotate` needs besides the model, in bytes.

    Parameters
    ----------
    model : ModelProto
        The whole normalized model.
    """
    view = GraphView(model)
    spaces = Spaces(channels_of(view, linear=True))
    sizes = [
        sum(int(np.prod(view.constant_shape(a.constant))) for a in _touched(spaces, k))
        for k in range(len(spaces.members))
    ]
    return 4 * (_FLOATS_A_TERM * max(sizes, default=0) + sum(sizes))


def rotate(
    model: ModelProto, plan: Plan, config: Config, progress: Callable[[int, int], None]
) -> tuple[ModelProto, dict[str, int], list[str]]:
    """Mix channels, in the constants of the layers around them.

    Parameters
    ----------
    model : ModelProto
        The whole normalized model; it is not changed.
    plan : Plan
    config : Config
        ``rotate`` and ``seed``.
    progress : callable
        Called with the number of spaces done and the total.

    Returns
    -------
    ModelProto
        Computes the same outputs, up to float rounding.
    dict of str to int
        The tensors whose channels were mixed, and how many are mixed together.
    list of str
        What was left unchanged, and why.
    """
    if not config.rotate:
        return model, {}, []
    view = GraphView(model)
    channels = channels_of(view, linear=True)
    spaces = Spaces(channels)
    levels = {name: spec.qmax - spec.qmin for name, spec in plan.weight_specs.items()}
    values: dict[str, Array] = {}
    mixed: list[int] = []
    notes = []
    for k, members in enumerate(spaces.members):
        progress(k, len(spaces.members))
        touched = _touched(spaces, k)
        if not any(a.constant in levels for a in touched):
            continue
        if len(members) > _MOST:
            notes.append(f"{len(members)} channels that could be mixed are left unmixed: the most is {_MOST}")
            continue
        held = {a.constant: values.get(a.constant, view.constant(a.constant)) for a in touched}
        matrix = _matrix(*_sides(spaces, k, touched, held, levels), np.random.default_rng([config.seed, k]))
        if matrix is not None:
            inverse = np.asarray(np.linalg.inv(matrix), np.float64)
            values |= {a.constant: spaces.mixed(a, held[a.constant], k, matrix, inverse) for a in touched}
            mixed.append(k)
    if not values:
        return model, {}, notes
    progress(len(spaces.members), len(spaces.members))
    counts = {
        name: max((len(spaces.members[k]) for k in mixed if spaces.places(slots, k).size), default=0)
        for name, slots in channels.tensors().items()
    }  # fmt: skip
    return edit.with_constants(model, values), {name: n for name, n in counts.items() if n}, notes


def operations(model: ModelProto, plan: Plan) -> float:
    """Return the approximate multiplications of `rotate`, at the speed of large matrix products.

    Parameters
    ----------
    model : ModelProto
    plan : Plan
    """
    view = GraphView(model)
    spaces = Spaces(channels_of(view, linear=True))
    weights = plan.weight_specs.keys()
    total = 0.0
    for k, members in enumerate(spaces.members):
        touched = {a.constant for a in _touched(spaces, k)}
        if touched & weights and len(members) <= _MOST:
            size = sum(math.prod(view.constant_shape(name)) for name in touched)
            products = size * (2 * len(members) + _OPERATIONS_AN_ELEMENT)
            total += _EVALUATIONS * _ITERATIONS * (products + _OPERATIONS_A_CUBE * len(members) ** 3)
    return total


def _touched(spaces: Spaces, space: int) -> list[Absorber]:
    return [a for a in spaces.absorbers if spaces.places(a.slots, space).size]


def _sides(
    spaces: Spaces, space: int, touched: Sequence[Absorber], held: dict[str, Array], levels: dict[str, int]
) -> tuple[list[_Side], list[_Side]]:
    """Return the producers' and the consumers' parts in a space."""
    producers, consumers = [], []
    for a in touched:
        if a.form is None:
            continue
        rows = a.form.weight_rows(held[a.constant])[0].astype(np.float32)
        steps = levels.get(a.constant, 0)
        made, read = spaces.places(a.times, space), spaces.places(a.over, space)
        if made.size:
            producers.append(
                _Side(steps, np.swapaxes(rows[made], 0, 1).reshape(made.shape[1], -1), len(made))
            )
        if read.size:
            terms = rows.reshape(len(rows), -1, a.form.taps)
            others = np.delete(terms, read.reshape(-1), axis=1).reshape(len(rows), -1)
            own = terms[:, read].transpose(0, 1, 3, 2).reshape(-1, read.shape[1])
            consumers.append(_Side(steps, own, len(own) // len(rows), _norms(others)))
    return producers, consumers


def _matrix(
    producers: Sequence[_Side], consumers: Sequence[_Side], rng: np.random.Generator
) -> Matrix | None:
    """Return the mixing matrix with the least errors found, or None if it hardly helps."""
    if not producers or not consumers:
        return None
    count = len(producers[0].rows)
    power = _shares([side.squares for side in producers])
    importance = _shares([side.squares for side in consumers])
    diagonal = (importance / power) ** 0.25
    start = np.asarray(np.linalg.qr(rng.standard_normal((count, count)))[0], np.float64)
    rotation, least = _descended(_Cost(producers, consumers, power, importance, diagonal), start)
    return rotation * diagonal if least < _WORTH * _plain(producers, consumers, power, importance) else None


def _shares(squares: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return each channel's share of a layer's total, averaged over layers."""
    shares = np.mean([s / max(float(s.sum()), 1e-30) for s in squares], axis=0)
    return np.asarray(np.maximum(shares, _LEAST_SHARE / len(shares)))


def _plain(
    producers: Sequence[_Side],
    consumers: Sequence[_Side],
    power: NDArray[np.float64],
    importance: NDArray[np.float64],
) -> float:
    """Return the errors without mixing, where every channel has its own grid and importance."""
    total = 0.0
    for side in filter(lambda s: s.levels, producers):
        norms = _norms(side.whole(side.rows)[0]).reshape(len(importance), -1)
        total += side.terms * side.unit(importance) * float(importance @ np.square(norms).sum(axis=1))
    for side in filter(lambda s: s.levels, consumers):
        total += float(power.sum()) * side.unit(power) * _squares(*side.whole(side.rows))[0]
    return total


class _Cost:
    """The errors as a function of the rotation.

    Parameters
    ----------
    producers, consumers : sequence of _Side
    power, importance : ndarray of shape (n_members,)
        S and G.
    diagonal : ndarray of shape (n_members,)
        Factors that scale the channels before the rotation.
    """

    def __init__(
        self,
        producers: Sequence[_Side],
        consumers: Sequence[_Side],
        power: NDArray[np.float64],
        importance: NDArray[np.float64],
        diagonal: NDArray[np.float64],
    ) -> None:
        scale = diagonal.astype(np.float32)
        mean, energy = float((importance / diagonal**2).mean()), float((power * diagonal**2).sum())
        self._producers = [
            (replace(s, rows=s.rows * scale[:, None]), mean * s.terms * s.unit(importance))
            for s in producers
            if s.levels
        ]
        self._consumers = [
            (replace(s, rows=s.rows / scale), energy * s.unit(power)) for s in consumers if s.levels
        ]

    def __call__(self, rotation: Array) -> tuple[float, Matrix]:
        """Return the errors and their gradient for the elements of a rotation."""
        total, slope = 0.0, np.zeros(rotation.shape)
        for side, weight in self._producers:
            value, pull = _squares(*side.whole(np.asarray(rotation @ side.rows)))
            total += weight * value
            slope += weight * (pull.reshape(side.rows.shape) @ side.rows.T)
        for side, weight in self._consumers:
            value, pull = _squares(*side.whole(np.asarray(side.rows @ rotation.T)))
            total += weight * value
            slope += weight * (pull.reshape(side.rows.shape).T @ side.rows)
        return total, slope


def _norms(rows: Array) -> Array:
    """Return the 8-norm of every row, of shape (n_rows, 1): a smooth largest magnitude."""
    most = np.abs(rows).max(axis=1, keepdims=True, initial=1e-30)
    return np.asarray(
        most * np.square(np.square(np.square(rows / most))).sum(axis=1, keepdims=True) ** 0.125, np.float32
    )


def _squares(rows: Array, beyond: Array | None = None) -> tuple[float, Array]:
    """Return the sum of the squared 8-norms of rows, and its gradient.

    ``beyond`` holds the norms of elements of each row that are not in ``rows``.
    """
    most = np.abs(rows).max(axis=1, keepdims=True)
    most = np.maximum(most, 1e-30 if beyond is None else np.maximum(beyond, 1e-30))
    parts = rows / most
    fourth = np.square(np.square(parts))
    total = np.square(fourth).sum(axis=1, keepdims=True)
    if beyond is not None:
        total += (beyond / most) ** 8
    root = np.asarray(np.maximum(total, 1e-30) ** 0.25, np.float32)
    slope = parts * np.square(parts) * fourth * (2 * most * root / np.maximum(total, 1e-30))
    return float((np.square(most, dtype=np.float64) * root).sum()), slope


def _descended(cost: Callable[[Array], tuple[float, Matrix]], start: Matrix) -> tuple[Matrix, float]:
    """Return the rotation with the least cost, and that cost.

    Rotations are ``(I + A / 2)⁻¹ (I - A / 2) start`` with A skew-symmetric.
    """
    one, upper = np.eye(len(start)), np.triu_indices(len(start), 1)

    def cayley(values: NDArray[np.float64]) -> tuple[Matrix, Matrix]:
        skew = np.zeros_like(start)
        skew[upper] = values
        skew -= skew.T
        inverse = np.asarray(np.linalg.inv(one + skew / 2), np.float64)
        return inverse, inverse @ (one - skew / 2) @ start

    def function(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        inverse, rotation = cayley(values)
        value, slope = cost(rotation.astype(np.float32))
        pull = -0.5 * inverse.T @ slope @ (rotation + start).T
        return float(np.log(max(value, 1e-300))), (pull - pull.T)[upper] / max(value, 1e-300)

    found = minimize(
        function, np.zeros(len(upper[0])), jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}
    )
    return cayley(found.x)[1], float(np.exp(found.fun))
