"""Items of loaders, data sets and generators: what they hold for a model, and how their axes are meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.inputs import Input, names
from eptq_onnx.data.layouts import fits
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.pictures import Sight, pillow, sight_of
from eptq_onnx.data.readers.base import Feed, Opened, Request
from eptq_onnx.data.shelf import Shelf
from eptq_onnx.data.tensors import as_array, is_tensor
from eptq_onnx.errors import DataError

_LABEL = "the calibration data"


class Unit(str, Enum):
    """What one item is."""

    SAMPLE = "sample"
    """Without a batch axis."""
    BATCH = "batch"
    """Samples along the first axis of every array."""
    RUN = "run"
    """What the model takes in one run, which is never cut up."""


def gathered(items: Iterable[Any], request: Request, *, named: Unit, streamed: bool) -> Opened:
    """Read items one after the other.

    An item is a mapping by input, a tuple with the inputs in front, or one tensor. Arrays with one axis less
    than the inputs are samples; tensors and tuples with as many are batches.

    Parameters
    ----------
    items : iterable
    request : Request
    named : Unit
        What mappings are whose arrays have as many axes as the inputs.
    streamed : bool
        True if items come one by one, so that no more than one is held in memory and ``--samples`` takes the
        first ones.

    Raises
    ------
    DataError
        If an item holds no arrays, or there are no items.
    """
    gather = _Gather(request, named, streamed)
    limit = request.reading.samples
    source = iter(items)
    for k, item in enumerate(source):
        gather.add(item, k)
        if streamed and limit is not None and gather.count >= limit:
            left = next(source, None) is not None
            note = f"--samples {limit}: the first ones, because the data comes one by one"
            return gather.opened((note,) if left else ())
    return gather.opened(())


@dataclass
class _Gather:
    """Arrays by input, as items come in."""

    request: Request
    named: Unit
    streamed: bool
    unit: Unit | None = None
    shelves: dict[str, Shelf] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    """What items hold beside inputs, with its type and shape."""
    taken: dict[str, str] = field(default_factory=dict)
    """Names of arrays that were taken for an input of another name."""
    sight: Sight | None = None

    @property
    def count(self) -> int:
        """Return the number of samples or runs so far."""
        return min(map(len, self.shelves.values()), default=0)

    def add(self, item: Any, k: int) -> None:
        """Take what one item holds for the model."""
        label = f"{_LABEL}: item {k}"
        mapping = isinstance(item, Mapping)
        feed = self._feed(item, label)
        if self.unit is None:
            self.unit = self._unit_of(feed, mapping)
        if self.unit is Unit.BATCH:
            sizes = {len(v) if v.ndim else 0 for v in feed.values()}
            if len(sizes) != 1:
                shapes = ", ".join(f"{name}: {v.shape}" for name, v in feed.items())
                raise DataError(f"{label} is no batch: its arrays have different first axes ({shapes}).")
        for name, value in feed.items():
            shelf = self.shelves.setdefault(name, Shelf(filed=self.streamed))
            for row in value if self.unit is Unit.BATCH else [value]:
                shelf.add(np.asarray(row))

    def opened(self, notes: Sequence[str]) -> Opened:
        """Return what came in."""
        if not self.count:
            raise DataError(f"{_LABEL} has no samples.")
        more = [
            f"{name!r} ({kind}) of the items is left out: the model takes {names(self.request.inputs)}"
            for name, kind in self.ignored.items()
        ] + [
            f"the array {name!r} was taken for the model's only input, {own!r}"
            for name, own in self.taken.items()
        ]
        sight = self.sight
        origin = Origin(
            _LABEL,
            {} if sight is None else {"image": str(sight.recipe)},
            () if sight is None else sight.guessed,
            (*notes, *more, *(() if sight is None else sight.notes)),
        )
        if self.unit is not Unit.RUN:
            return Opened({name: shelf.values() for name, shelf in self.shelves.items()}, origin)
        columns = {name: shelf.entries() for name, shelf in self.shelves.items()}
        feeds: list[Feed] = [
            dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
        ]
        return Opened(feeds, origin)

    def _feed(self, item: Any, label: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of an item by input."""
        inputs = self.request.inputs
        given = self._renamed(_parts(item, inputs, label))
        missing = [i for i in inputs if i.name not in given]
        if missing:
            came = "; ".join(f"{name!r} {_kind(v)}" for name, v in given.items()) or "nothing"
            raise DataError(
                f"{label} has no array for the model input {missing[0].name!r}: the model takes "
                f"{'; '.join(map(str, inputs))}, and the item has {came}."
            )
        known = {i.name for i in inputs}
        for name, value in given.items():
            if name not in known:
                self.ignored.setdefault(str(name), _kind(value))
        return {i.name: self._array(given[i.name], i, f"{label}, {i.name!r},") for i in inputs}

    def _renamed(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the item with the name of the model's only input for the only array that fits it."""
        if len(self.request.inputs) != 1 or self.request.inputs[0].name in given:
            return given
        [info] = self.request.inputs
        fitting = [name for name, value in given.items() if len(given) == 1 or _fits(value, info)]
        if len(fitting) != 1:
            return given
        self.taken[fitting[0]] = info.name
        return {info.name if name == fitting[0] else name: value for name, value in given.items()}

    def _array(self, value: Any, info: Input, label: str) -> NDArray[Any]:
        if not _is_picture(value):
            return as_array(value, label, info)
        with pillow():
            if self.sight is None:
                self.sight = sight_of(self.request.model, self.request.inputs, self.request.reading.image)
            return self.sight(value)

    def _unit_of(self, feed: Feed, mapping: bool) -> Unit:
        ranks = {i.name: len(i.dims) for i in self.request.inputs if i.dims}
        if ranks and all(feed[name].ndim == rank - 1 for name, rank in ranks.items()):
            return Unit.SAMPLE
        if len(ranks) < len(feed) or any(feed[name].ndim != rank for name, rank in ranks.items()):
            return Unit.RUN
        return self.named if mapping else Unit.BATCH


def _parts(item: Any, inputs: Sequence[Input], label: str) -> dict[str, Any]:
    """Return what an item holds by name: its own, those of the inputs in order, or a number for the rest.

    Raises
    ------
    DataError
        If it holds nothing.
    """
    if isinstance(item, Mapping):
        return {str(name): value for name, value in item.items()}
    grouped = isinstance(item, tuple) or (
        isinstance(item, list) and bool(item) and not isinstance(item[0], (int, float, list))
    )
    if not grouped:
        if is_tensor(item) or _is_picture(item) or isinstance(item, list):
            return {inputs[0].name: item}
        raise DataError(
            f"{label} is a {type(item).__name__}, not a mapping from input name to array, "
            "a tuple or an array."
        )
    first, *rest = item or [()]
    if isinstance(first, Mapping):
        return {**_parts(first, inputs, label), **{f"part {k}": v for k, v in enumerate(rest, 1)}}
    parts = [*first, *rest] if isinstance(first, tuple) else [first, *rest]
    keys = [i.name for i in inputs] + [f"part {k}" for k in range(len(inputs), len(parts))]
    return dict(zip(keys, parts, strict=False))


def _fits(value: Any, info: Input) -> bool:
    """Return True if a value has the type of an input, and its shape or that of a sample."""
    if _is_picture(value):
        return info.dims is not None and len(info.dims) in (3, 4)
    if isinstance(value, list):
        with suppress(DataError):
            value = as_array(value, "", info)
    if not is_tensor(value) or info.dims is None:
        return False
    shape = tuple(value.shape)
    same_type = info.dtype is None or str(value.dtype).rpartition(".")[2] == info.dtype.name
    return same_type and (fits(shape, [None, *info.dims[1:]]) or fits(shape, info.dims[1:]))


def _is_picture(value: object) -> bool:
    """Return True for pictures of Pillow."""
    return hasattr(value, "getexif") and hasattr(value, "convert")


def _kind(value: Any) -> str:
    if is_tensor(value):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
