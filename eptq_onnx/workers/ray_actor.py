"""What runs in a process of Ray: one on each node, with as many threads as the node has cores."""

from __future__ import annotations

import os
import pickle
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

from eptq_onnx._version import __version__
from eptq_onnx.parallel import owned_threads
from eptq_onnx.runtime import load
from eptq_onnx.workers.packing import Message, Packer, unpacked

_MOST = 8
"""Functions that a process keeps, those used last."""


class Call(NamedTuple):
    """The function of one map.

    Parameters
    ----------
    number : int
        Tells it from the functions of other maps.
    message : Message or object
        The function, or a reference to its message if that is large.
    """

    number: int
    message: Any


class Part(NamedTuple):
    """An item, without the entries that hold its arrays."""

    head: bytes
    places: Sequence[tuple[int, int]]


def versions() -> dict[str, str]:
    """Return the versions that must be the same everywhere for results to be."""
    return {"eptq-onnx": __version__, "numpy": metadata.version("numpy"), "onnxruntime": load().__version__}


class Actor:
    """Processes items."""

    def __init__(self) -> None:
        threadpool_limits(1, "blas")
        self._pickler = import_module("cloudpickle")
        self._packer = Packer(self._pickler.Pickler, _cannot_put)
        self._functions: OrderedDict[int, Any] = OrderedDict()
        self._guard = threading.Lock()

    def ready(self) -> tuple[dict[str, str], int]:
        """Return the versions and the process."""
        return versions(), os.getpid()

    def run(self, call: Call, part: Part, *entries: list[Any]) -> list[Any]:
        """Apply a function to an item.

        Returns a list: the pickle of (True, result, seconds) or (False, exception, text), and its arrays.
        """
        try:
            with owned_threads(1):
                function = self._function(call)
                item = unpacked(part.head, [entries[e][k + 1] for e, k in part.places])
                began = time.perf_counter()
                result = function(item)
                seconds = time.perf_counter() - began
            head, arrays = self._packer.split((True, result, seconds))
        except Exception as e:
            return [_failure(e, self._pickler.dumps)]
        return [head, *arrays]

    def _function(self, call: Call) -> Any:
        with self._guard:
            if call.number not in self._functions:
                message = call.message
                if not isinstance(message, Message):
                    message = _got([message])[0]
                entries = _got(message.entries)
                arrays = [entries[e][k + 1] for e, k in message.places]
                self._functions[call.number] = unpacked(message.head, arrays)
                while len(self._functions) > _MOST:
                    self._functions.popitem(last=False)
            self._functions.move_to_end(call.number)
            return self._functions[call.number]


def _got(references: list[Any]) -> list[Any]:
    return list(import_module("ray").get(references))


def _cannot_put(arrays: list[Any]) -> Any:
    raise NotImplementedError("results carry their arrays themselves")


def _failure(error: Exception, dumps: Callable[..., bytes]) -> bytes:
    """Return an exception as a result; one that cannot travel becomes its text."""
    text = traceback.format_exc()
    try:
        head = dumps((False, error, text), protocol=5)
        pickle.loads(head)
    except Exception:
        head = dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text), protocol=5)
    return head
