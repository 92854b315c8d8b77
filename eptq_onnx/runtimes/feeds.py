"""Inputs for models that are measured: a real sample, or synthetic values if there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data import load
from eptq_onnx.data.inputs import plausible
from eptq_onnx.data.readers import Data, Source
from eptq_onnx.errors import DataError, ModelError
from eptq_onnx.graph.io import read_file
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtimes.base import Port, Verifier, graph_of, ports_of

_MOST_READ = 256
"""Samples that are read to run the first of them: more than any model takes at once."""


@dataclass(frozen=True)
class Inputs:
    """Inputs that two models are run on.

    Parameters
    ----------
    feeds : dict of str to ndarray
    shapes : dict of str to str
        Shape of each input, as text.
    samples : int
        Number of samples per run.
    notes : tuple of str
        Defaults that were chosen for the user.
    """

    feeds: Feeds
    shapes: dict[str, str]
    samples: int
    notes: tuple[str, ...]


def inputs_of(verifier: Verifier, pair: tuple[Path, Path], source: Source | None) -> Inputs:
    """Return the first sample of the data, or synthetic values if there is no data.

    Parameters
    ----------
    verifier : Verifier
        Runtime to try interpretations of the data's axes in, if there are several.
    pair : tuple of two paths
        Two files that take the same inputs.
    source : Source or None

    Raises
    ------
    ModelError
        If the inputs differ.
    DataError
        If the data does not fit, or if an input's type has no synthetic values.
    """
    ports, others = (ports_of(graph_of(path)) for path in pair)
    if (names := {p.name for p in ports}) != {p.name for p in others}:
        raise ModelError(
            f"{pair[1]} has the inputs {', '.join(p.name for p in others) or 'none'}, {pair[0]} has "
            f"{', '.join(sorted(names)) or 'none'}: give two files of the same model."
        )
    notes: tuple[str, ...] = ()
    samples = 1
    if source is None:
        feeds = default_feeds(ports)
        chosen = open_sizes(ports, feeds)
        notes = ("inputs are made up: give samples with --data for real ones",)
        notes += (f"sizes that the model leaves open: {chosen}",) if chosen else ()
    else:
        feeds, samples, notes = _first_sample(verifier, pair[0], source)
    return Inputs(feeds, {name: shape_text(v.shape) for name, v in feeds.items()}, samples, notes)


def _few(source: Source) -> Source:
    """Return the data with a limit on its samples: folders may be large, and few of them are run."""
    data = source if isinstance(source, Data) else Data(source)
    return data if data.reading.samples else data.limited(_MOST_READ)


def _first_sample(verifier: Verifier, path: Path, source: Source) -> tuple[Feeds, int, tuple[str, ...]]:
    """Return the feeds of one run on the first samples, the number of these samples, and notes on them."""
    found = load(_few(source), read_file(path))
    notes = found.origin.told
    taken = []
    for samples in found.samples:
        part = next(samples.parts(range(samples.count), samples.fixed_batch or 1), None)
        if part is not None:
            taken.append((samples.take(part), len(part), notes))
    if not taken:
        raise DataError(
            f"the data has fewer samples than one run needs ({found.samples[0].fixed_batch}): give more."
        )
    if len(taken) > 1:
        with verifier.load(path) as loaded:
            for first in taken:
                with suppress(ModelError):
                    loaded.run(first[0])
                    return first
    return taken[0]


def default_feeds(ports: Sequence[Port]) -> Feeds:
    """Return synthetic inputs of plausible shapes: random floats, and ones for integers and booleans.

    A dynamic axis gets size 1 if it is the first axis, 224 if it is one of the last two of a four-axis input
    (an image), and 128 otherwise. Axes of the same name get the same size.

    Parameters
    ----------
    ports : sequence of Port

    Raises
    ------
    DataError
        If an input is neither numeric nor boolean, such as text.
    """
    named: dict[str, int] = {}
    random = np.random.default_rng(0)
    return {port.name: _values(port, plausible(port.shape, named), random) for port in ports}


def open_sizes(ports: Sequence[Port], feeds: Mapping[str, NDArray[np.generic]]) -> str:
    """Return the inputs whose sizes `default_feeds` chose, as ``x: 1×3×224×224, ...``; empty if there are
    none."""
    chosen = [p.name for p in ports if not all(isinstance(size, int) and size > 0 for size in p.shape)]
    return ", ".join(f"{name}: {shape_text(feeds[name].shape)}" for name in chosen)


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as ``1×3×224×224``."""
    return "×".join(map(str, shape)) or "scalar"


def _values(port: Port, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.generic]:
    if port.dtype.kind not in "fiub":
        raise DataError(f"no values can be made up for the input {port.name}: give samples with --data.")
    if port.dtype.kind == "f":
        return random.standard_normal(shape).astype(port.dtype)
    return np.ones(shape, port.dtype)
