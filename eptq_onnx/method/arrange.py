"""Decide how samples are batched by running a few, and record the network's random draws and choices.

Samples are batched only if a batch of two gives the same outputs as two single runs. Where it does not (a
batch size hard-coded in a Reshape, statistics or attention across the batch), samples run one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from eptq_onnx.crashes import survives
from eptq_onnx.data.layouts import Column
from eptq_onnx.data.samples import Samples
from eptq_onnx.errors import DataError, ModelError
from eptq_onnx.graph import replay
from eptq_onnx.graph.replay import Place, Replay
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.ops import recorded
from eptq_onnx.parallel import ordered_map
from eptq_onnx.proto.bodies import all_nodes
from eptq_onnx.runtime import Session

_SIZES = (2, 4, 8, 16, 32, 64)
"""Batch sizes to try if single samples do not run: some models hard-code their batch size."""
_PADDED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
_CLOSE = 1e-6
"""Noise-to-signal power ratio below which values are equal: float summation order depends on the batch."""


class _CrashError(ModelError):
    """onnxruntime crashes, whatever is taken for the batch axis."""


@dataclass(frozen=True)
class Arranged:
    """Samples as they will be batched.

    Parameters
    ----------
    samples : Samples
    notes : tuple of str
        The decisions, with their reasons.
    """

    samples: Samples
    notes: tuple[str, ...] = ()


def arrange(model: ModelProto, candidates: Sequence[Samples], seed: int) -> Arranged:
    """Return the interpretation of the calibration data that the model runs, with its batching.

    Parameters
    ----------
    model : ModelProto
        Normalized, as far as that is possible without samples.
    candidates : sequence of Samples
        Possible interpretations of the data, most likely first.
    seed : int
        Seed of random numbers.

    Raises
    ------
    DataError
        If onnxruntime runs the model on none of the candidates.
    """
    places = replay.places_of(model, recorded)
    probe = _Probe(model, tuple(p for p in places if p.draws), seed)
    errors: list[tuple[Samples, ModelError]] = []
    alone: Samples | None = None
    why = ""
    for samples in candidates:
        if alone is not None and samples.count == 1:
            # Taking all arrays as a single run is the last resort.
            break
        try:
            fits = probe.fits(samples)
        except _CrashError:
            raise
        except ModelError as e:
            errors.append((samples, e))
            continue
        if fits:
            return Arranged(samples, _notes(probe.random(samples)))
        if alone is None:
            alone, why = samples, probe.why
    if alone is not None:
        size = alone.fixed_batch or 1
        samples = alone.grouped(size) if size > 1 else alone.in_batches_of(1)
        what = (
            f"{size} samples, as many as the model prescribes, are run"
            if size > 1
            else "samples run one at a time"
        )
        return Arranged(samples, (f"{what}: {why}", *_notes(probe.random(alone))))
    for samples, _ in errors:
        for size in _SIZES if samples.fixed_batch is None and samples.count > 1 else ():
            grouped = probe.grouped(samples, size)
            if grouped is not None:
                note = (
                    f"samples run {size} at a time: the model takes batches of that size only, "
                    "though its inputs leave it open"
                )
                return Arranged(grouped, (note, *_notes(probe.random(grouped))))
    samples, error = errors[0]
    unit = "batch" if (samples.fixed_batch or 1) > 1 else "sample"
    shapes = ", ".join(f"{name}: {value.shape}" for name, value in probe.first(samples).items())
    raise DataError(
        f"the model does not run on one {unit} of the calibration data ({shapes}); if the wrong axis was "
        "taken for the batch axis, say --batch-axis NAME=AXIS or NAME=none, or give feeds, what the model "
        f"takes in one run. {error}"
    ) from error


def _notes(random: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        f"two runs of the float model on the same sample differ in {name}: figures for it include that"
        for name in random
    )


class _Probe:
    """Runs the model on a few samples, one at a time and in batches."""

    def __init__(self, model: ModelProto, draws: tuple[Place, ...], seed: int) -> None:
        self._model, self._draws = model, draws
        self._recorder: tuple[Session, list[str]] | None = None
        if draws:
            recording, names = replay.recording(model, draws, seed)
            self._recorder = Session(recording), names
        self._session: Session | None = None
        self._memory: dict[tuple[Samples | int, ...], Feeds] = {}
        self.why = ""

    def first(self, samples: Samples) -> Feeds:
        """Return the feeds of the first run."""
        return samples.take(samples.alike()[: samples.fixed_batch or 1])

    def fits(self, samples: Samples) -> bool:
        """Return True if samples can be batched; otherwise `why` holds the reason.

        Raises
        ------
        ModelError
            If not even a single sample runs.
        """
        alike = samples.alike()
        size = samples.fixed_batch or 1
        if size > 1:
            return self._permutes(samples, alike[:size])
        pair = self._two_different(samples, alike)
        first = self._run(samples, pair[:1])
        if samples.fixed_batch == 1 or len(pair) < 2:
            return True
        second = self._run(samples, pair[1:])
        try:
            both = self._run(samples, pair)
        except ModelError:
            self.why = "two in one batch do not run"
            return False
        return self._same(first, second, both)

    def random(self, samples: Samples) -> list[str]:
        """Return the outputs that differ between two runs on the same samples with the same draws."""
        places = samples.alike()[: samples.fixed_batch or 1]
        first, second = (self._run(samples, places) for _ in range(2))
        return [name for name, value in first.items() if _is_array(value) and not agree(value, second[name])]

    def grouped(self, samples: Samples, size: int) -> Samples | None:
        """Return the samples in batches of ``size`` if the model runs them, else None."""
        places = samples.alike()[:size]
        if len(places) < size or len(samples.alike()) < 2 * size:
            return None
        fixed = samples.in_batches_of(size)
        try:
            fits = self._permutes(fixed, places)
        except ModelError:
            return None
        return fixed if fits else samples.grouped(size)

    def _two_different(self, samples: Samples, alike: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices of the first sample and of the first one that differs from it."""
        first = samples.take(alike[:1])
        for k in alike[1:]:
            if any(not np.array_equal(value, samples.take([k])[name]) for name, value in first.items()):
                return np.array([alike[0], k])
        return alike[:1]

    def _permutes(self, samples: Samples, places: NDArray[np.int64]) -> bool:
        """Return True if reversing a batch reverses its outputs."""
        forward, backward = self._run(samples, places), self._run(samples, places[::-1].copy())
        for name, value in forward.items():
            axes = [k for k in range(np.ndim(value)) if value.shape[k] == len(places)]
            if _is_array(value) and not any(agree(np.flip(value, axis), backward[name]) for axis in axes):
                self.why = f"in another order they give another {name}"
                return False
        return True

    def _same(self, first: Feeds, second: Feeds, both: Feeds) -> bool:
        for name, value in both.items():
            if _is_array(value) and stacked_axis(first[name], second[name], value) is None:
                self.why = f"two in one batch give another {name} than two runs"
                return False
        return True

    def _run(self, samples: Samples, places: NDArray[np.int64]) -> Feeds:
        feeds = {**samples.take(places), **self._drawn(samples, places)}
        if self._session is None:
            types = {
                n: (helper.np_dtype_to_tensor_dtype(feeds[n].dtype), feeds[n].ndim)
                for n in (p.name for p in self._draws)
            }
            replayed = Replay(self._draws, types)(self._model, recorded)
            cropping = next(_cropping(self._model), None)
            if cropping is not None and not survives(replayed, feeds):
                node = cropping.name or cropping.op_type
                raise _CrashError(
                    f"onnxruntime crashes when it runs the model, probably in node {node}, whose pads are "
                    "negative: crop its input with a Slice instead."
                )
            self._session = Session(replayed)
        return self._session.run(self._session.taken(feeds))

    def _drawn(self, samples: Samples, places: NDArray[np.int64]) -> Feeds:
        """Return the random numbers of these samples, the same in every call."""
        if self._recorder is None:
            return {}
        session, names = self._recorder

        def draw(chosen: NDArray[np.int64]) -> Feeds:
            values = session.run(session.taken(samples.take(chosen)))
            return {p.name: values[name] for p, name in zip(self._draws, names, strict=True)}

        # Where the model prescribes the batch size, draws belong to the whole batch.
        runs = [places] if samples.fixed_batch else [places[k : k + 1] for k in range(len(places))]
        keys = [(samples, *run.tolist()) for run in runs]
        for key, run in zip(keys, runs, strict=True):
            if key not in self._memory:
                self._memory[key] = draw(run)
        parts = [self._memory[key] for key in keys]
        if len(parts) == 1:
            return parts[0]
        together = draw(places)
        axes = {
            n: stacked_axis(parts[0][n], parts[1][n], value, values=False) for n, value in together.items()
        }
        return {
            n: together[n] if axis is None else np.concatenate([p[n] for p in parts], axis)
            for n, axis in axes.items()
        }


def record(model: ModelProto, samples: Samples, seed: int) -> tuple[Samples, Replay, tuple[str, ...]]:
    """Record the float network's random draws and choices for every sample, as additional inputs.

    Parameters
    ----------
    model : ModelProto
        The executed float model.
    samples : Samples
    seed : int
        Seed of random numbers.

    Returns
    -------
    Samples
        Samples with the recorded tensors; one per batch if the recorded tensors cannot be batched.
    Replay
        Turns the recorded tensors into inputs of any version of the model.
    tuple of str
        Notes.
    """
    notes = tuple(
        f"random numbers are drawn inside {name}: they differ from run to run, in the float network, too"
        for name in replay.draws_inside_bodies(model, recorded)
    )
    places = replay.places_of(model, recorded)
    if not places:
        return samples, Replay(), notes
    recording, names = replay.recording(model, places, seed)
    session = Session(recording)
    size = samples.fixed_batch or 1
    every = range(samples.count)
    parts = [np.array([k]) for k in every] if size == 1 else list(samples.batches(every, size))
    draws = any(p.draws for p in places)

    def run(part: NDArray[np.int64]) -> Feeds:
        return session.run(session.taken(samples.take(part)), list(dict.fromkeys(names)))

    # Draws come from one sequential stream, so their order must not depend on the workers.
    runs: Iterable[Feeds] = map(run, parts) if draws else ordered_map(run, parts)
    values = list(runs)
    columns: dict[str, Column] = {}
    for place, name in zip(places, names, strict=True):
        rows = [v[name] for v in values]
        axis = _batch_axis(session, samples, rows, name, place.draws) if samples.fixed_batch is None else None
        columns[place.name] = Column(rows, axis)
    kinds = {
        n: (helper.np_dtype_to_tensor_dtype(c.values[0].dtype), c.values[0].ndim) for n, c in columns.items()
    }
    found = Replay(places, kinds, replay.decisive(model, places))
    if size > 1:
        return samples.grouped(size).with_columns(columns), found, notes
    if any(c.axis is None for c in columns.values()):
        one = {n: Column(c.values) for n, c in columns.items()}
        if samples.fixed_batch is None:
            notes = (
                *notes,
                f"samples run one at a time: what {_listing(places, columns)} chooses depends on the others "
                "in a batch",
            )
        return samples.in_batches_of(1).with_columns(one), found, notes
    squeezed = {n: Column([np.squeeze(v, c.axis) for v in c.values], c.axis) for n, c in columns.items()}
    return samples.with_columns(squeezed), found, notes


def _listing(places: Sequence[Place], columns: dict[str, Column]) -> str:
    return ", ".join(dict.fromkeys(p.node for p in places if columns[p.name].axis is None))


def _batch_axis(
    session: Session, samples: Samples, rows: Sequence[NDArray[Any]], name: str, draws: bool
) -> int | None:
    """Return the size-1 axis along which a recorded tensor can be batched, or None."""
    alike = samples.alike()
    if len(alike) < 2:
        return None
    pair = np.array([alike[0], alike[-1]])
    first, second = (rows[int(k)] for k in pair)
    both = session.run(session.taken(samples.take(pair)), [name])[name]
    axis = stacked_axis(first, second, both, values=not draws)
    return (
        axis if axis is not None and all(r.ndim == first.ndim and r.shape[axis] == 1 for r in rows) else None
    )


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "OSU"


def stacked_axis(
    first: NDArray[Any], second: NDArray[Any], both: NDArray[Any], *, values: bool = True
) -> int | None:
    """Return the axis along which a batch of two concatenates the results of two runs, or None.

    Parameters
    ----------
    first, second, both : ndarray
    values : bool
        If False, only shapes are compared.
    """
    for axis in range(both.ndim):
        if first.ndim != both.ndim or second.ndim != both.ndim:
            return None
        rest = [s[:axis] + s[axis + 1 :] for s in (first.shape, second.shape, both.shape)]
        if len(set(rest)) > 1 or both.shape[axis] != first.shape[axis] + second.shape[axis]:
            continue
        if not values or agree(np.concatenate([first, second], axis), both):
            return axis
    return None


def agree(expected: NDArray[Any], found: NDArray[Any]) -> bool:
    """Return True if two arrays are equal: floats to 60 dB, other types in 99 % of the elements."""
    if expected.shape != found.shape or expected.dtype.kind != found.dtype.kind:
        return False
    if not expected.size:
        return True
    if expected.dtype.kind not in "fV":
        return bool(np.mean(expected == found) >= 0.99)
    ours, theirs = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return False
    finite = np.isfinite(ours) & ~same
    largest = float(np.abs(ours[np.isfinite(ours)]).max(initial=0.0)) or 1.0
    error = np.square((ours[finite] - theirs[finite]) / largest).sum()
    power = np.square(ours[np.isfinite(ours)] / largest).sum()
    return bool(same[~np.isfinite(ours)].all() and error <= _CLOSE * power)


def _cropping(model: ModelProto) -> Iterator[NodeProto]:
    """Yield the convolutions and pools with negative pads, on which some versions of onnxruntime crash."""
    for node in all_nodes(model.graph):
        pads = next((a.ints for a in node.attribute if a.name == "pads"), ())
        if node.op_type in _PADDED and any(pad < 0 for pad in pads):
            yield node
