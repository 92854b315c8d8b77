"""Workers to which everything is sent as to other processes, in this one."""

from __future__ import annotations

import itertools
import pickle

import pytest

from eptq_onnx import workers
from eptq_onnx.parallel import Workers
from eptq_onnx.workers.base import Backend
from eptq_onnx.workers.packing import Kept, Packer, unpacked

cloudpickle = pytest.importorskip("cloudpickle", reason="functions are not sent without cloudpickle")


class Copying(Workers):
    """Sends functions, items and results through messages; what arrives is read-only."""

    distant = True

    def __init__(self) -> None:
        self.packer = Packer(cloudpickle.Pickler, self.put)
        self.maps = 0

    def put(self, arrays):
        return [b"", *self.copied(arrays)]

    @staticmethod
    def copied(arrays):
        found = pickle.loads(pickle.dumps(list(arrays), protocol=5))
        for array in found:
            array.flags.writeable = False
        return found

    def received(self, value, kept):
        message = self.packer.packed(value, kept)
        return unpacked(message.head, [message.entries[e][k + 1] for e, k in message.places])

    def map(self, function, items):
        self.maps += 1
        return self.sent(function, iter(items))

    def sent(self, function, items):
        kept = Kept(lasting=False)
        there = self.received(function, kept)
        # As with other workers, several are on their way.
        while drawn := list(itertools.islice(items, 3)):
            for item in drawn:
                head, arrays = self.packer.split(there(self.received(item, kept)))
                entry = [b"", *self.copied(arrays)]
                yield self.packer.joined(head, entry[1:], entry)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Copying:
    """The workers of the name "copying"."""
    made = Copying()

    class CopyingBackend(Backend):
        name = "copying"
        about = "for tests"

        def start(self):
            return made

    monkeypatch.setitem(workers.registered(), "copying", CopyingBackend)
    return made
