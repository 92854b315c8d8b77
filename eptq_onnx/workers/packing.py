"""Values on their way to other processes: a small message, and large arrays beside it, each sent once.

A message is a pickle in which every large array is a number. The arrays themselves lie in a store that all
processes reach, several to an entry, and travel by reference. An array that is in the store already, because
it came from there or was sent before, is not written again.

Arrays keep the order of their axes in memory: numpy adds numbers up in that order, so that results would
differ in the last bits.
"""

from __future__ import annotations

import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Axes = tuple[int, ...] | None
LEAST = 2**15
"""Bytes from which an array travels beside the message."""


@dataclass(frozen=True)
class Message:
    """A value, ready to be sent.

    Parameters
    ----------
    head : bytes
        The pickle.
    entries : list of object
        References to the entries of the store that hold its arrays.
    places : list of (int, int)
        For each array, its entry and its place in there.
    """

    head: bytes
    entries: list[Any] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


class Kept:
    """Arrays that are in the store, with the places where they lie.

    Parameters
    ----------
    lasting : bool
        True to hold the arrays weakly, until nobody else does; only for arrays that nobody changes. False to
        keep them alive, for the time of one map.
    """

    def __init__(self, *, lasting: bool) -> None:
        self._lasting = lasting
        self._known: dict[int, tuple[Any, Any, int]] = {}

    def find(self, array: NDArray[Any]) -> tuple[Any, int] | None:
        """Return the entry and the place of an array, or None."""
        found = self._known.get(id(array))
        return None if found is None else found[1:]

    def add(self, array: NDArray[Any], entry: Any, place: int) -> None:
        """Remember where an array lies."""
        key = id(array)
        held = weakref.ref(array, lambda _: self._known.pop(key, None)) if self._lasting else array
        self._known[key] = held, entry, place

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


class Packer:
    """Turns values into messages.

    Parameters
    ----------
    pickler : type
        A pickler that takes functions defined anywhere, such as cloudpickle's.
    put : callable
        Writes a list of arrays to the store, and returns a reference to the entry.
    """

    def __init__(self, pickler: type[pickle.Pickler], put: Callable[[list[NDArray[Any]]], Any]) -> None:
        self._put = put
        self._lasting = Kept(lasting=True)
        self._guard = threading.RLock()

        self._of_data, self._of_functions = _leaving_arrays(pickle.Pickler), _leaving_arrays(pickler)

    def packed(self, value: object, kept: Kept) -> Message:
        """Return the message of a value; ``kept`` holds what was sent before in the same map."""
        with self._guard:
            head, arrays = self._split(value)
            fresh = [a for a in arrays if self._where(a, kept) is None]
            if fresh:
                entry = self._put([dense(a) for a in fresh])
                for place, array in enumerate(fresh):
                    # What may be written to may be other numbers by the next map.
                    (self._lasting if _is_final(array) else kept).add(array, entry, place)
            entries: list[Any] = []
            numbers: dict[int, int] = {}
            places = []
            for array in arrays:
                entry, place = self._where(array, kept) or (None, 0)
                if numbers.setdefault(id(entry), len(entries)) == len(entries):
                    entries.append(entry)
                places.append((numbers[id(entry)], place))
            return Message(head, entries, places)

    def split(self, value: object) -> tuple[bytes, list[NDArray[Any]]]:
        """Return the pickle of a result, and its large arrays, dense, in the order of their numbers."""
        head, arrays = self._split(value)
        return head, [dense(a) for a in arrays]

    def joined(self, head: bytes, arrays: Sequence[NDArray[Any]], entry: Any) -> Any:
        """Return the value that `split` took apart; arrays that nobody can change are known from now on."""
        reader = _Reader(head, arrays)
        value = reader.load()
        self._know(reader.read, entry)
        return value

    def known(self, arrays: Sequence[NDArray[Any]], entry: Any) -> None:
        """Remember the arrays of an entry, in their order."""
        self._know(list(enumerate(arrays)), entry)

    def _know(self, arrays: Iterable[tuple[int, NDArray[Any]]], entry: Any) -> None:
        with self._guard:
            for place, array in arrays:
                if _is_final(array):
                    self._lasting.add(array, entry, place)

    def forget(self) -> None:
        """Send everything again from now on: the store has lost entries."""
        with self._guard:
            self._lasting.clear()

    def _where(self, array: NDArray[Any], kept: Kept) -> tuple[Any, int] | None:
        return kept.find(array) or self._lasting.find(array)

    def _split(self, value: object) -> tuple[bytes, list[NDArray[Any]]]:
        if not callable(value):
            # Several times as fast as picklers that take functions.
            with suppress(pickle.PicklingError, AttributeError, TypeError):
                return self._dumped(self._of_data, value)
        return self._dumped(self._of_functions, value)

    @staticmethod
    def _dumped(kind: Any, value: object) -> tuple[bytes, list[NDArray[Any]]]:
        file = io.BytesIO()
        pickler = kind(file)
        pickler.dump(value)
        return file.getvalue(), [array for _, array in pickler.arrays.values()]


def _leaving_arrays(pickler: Any) -> Any:
    """Return a pickler that leaves out large arrays."""

    class Leaving(pickler):  # type: ignore[misc]
        def __init__(self, file: io.BytesIO) -> None:
            super().__init__(file, protocol=5)
            self.arrays: dict[int, tuple[int, NDArray[Any]]] = {}

        def persistent_id(self, obj: Any) -> tuple[int, Axes] | None:
            if not isinstance(obj, np.ndarray) or obj.dtype.hasobject:
                return None
            if obj.nbytes < LEAST and (obj.flags.c_contiguous or obj.flags.f_contiguous):
                return None
            return self.arrays.setdefault(id(obj), (len(self.arrays), obj))[0], _axes(obj)

    return Leaving


def _axes(array: NDArray[Any]) -> Axes:
    """Return the axes from the outermost to the innermost in memory; None if that is their order."""
    if array.flags.c_contiguous:
        return None
    return tuple(sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis])))


def dense(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array with its axes in the order that they have in memory, without gaps."""
    axes = _axes(array)
    laid = np.ascontiguousarray(array if axes is None else array.transpose(axes))
    # Without the class of a mapped file.
    found: NDArray[Any] = np.asarray(laid)
    return found


def _is_final(array: NDArray[Any]) -> bool:
    """Return True if nobody can change an array, nor what it is a view of."""
    whole: Any = array
    while isinstance(whole, np.ndarray):
        if whole.flags.writeable:
            return False
        whole = whole.base
    return not isinstance(whole, bytearray)


class _Reader(pickle.Unpickler):
    """Puts the arrays back."""

    def __init__(self, head: bytes, arrays: Sequence[NDArray[Any]]) -> None:
        super().__init__(io.BytesIO(head))
        self._arrays = arrays
        self.read: list[tuple[int, NDArray[Any]]] = []

    def persistent_load(self, pid: Any) -> NDArray[Any]:
        number, axes = pid
        array: NDArray[Any] = self._arrays[number]
        if axes is not None:
            array = array.transpose(np.argsort(axes))
        self.read.append((number, array))
        return array


def unpacked(head: bytes, arrays: Sequence[NDArray[Any]]) -> Any:
    """Return the value of a message, given its arrays."""
    return _Reader(head, arrays).load()
