"""Count the bytes of a quantized file for any choice of weight widths, without writing it each time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from onnx import ModelProto, TensorProto

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.message_sizes import field_bytes, file_bytes, tensor_bytes
from eptq_onnx.graph.packing import as_packing, weights_of
from eptq_onnx.graph.unfolding import Packing, bytes_saved, own_bytes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.bitpacking import LAYOUTS

Widths = Mapping[str, int]
"""Weight to its bits."""


@dataclass(frozen=True)
class FileSizes:
    """The bytes of the parts of the written file, as an integer program can add them up.

    Parameters
    ----------
    rest : int
        All but the weights.
    weights : mapping of str to mapping of int to int
        Weight to bit width to bytes.
    shared : mapping of int to int
        Bit width to the bytes that all weights of this width share.
    """

    rest: int
    weights: Mapping[str, Mapping[int, int]]
    shared: Mapping[int, int]

    def total(self, widths: Widths) -> int:
        """Return the bytes of a file."""
        used = sum(self.shared.get(bits, 0) for bits in set(widths.values()))
        return self.rest + used + sum(self.weights[name][bits] for name, bits in widths.items())


@dataclass(frozen=True)
class Storing:
    """How weights are stored.

    Parameters
    ----------
    storage : WeightStorage
    types : sequence of int
        Widths of the ONNX types below 8 bits, for native storage.
    zero_points : mapping of str to mapping of int to bool
        Weight to candidate width to whether its zero points may differ from 0.
    """

    storage: WeightStorage
    types: Sequence[int]
    zero_points: Mapping[str, Mapping[int, bool]]


class FileCount:
    """Counts the bytes of a file.

    Parameters
    ----------
    written : ModelProto
        The file with all weights in int8.
    names : mapping of str to str
        Weight to the name of its integers in the file.
    storing : Storing
    """

    def __init__(self, written: ModelProto, names: Mapping[str, str], storing: Storing) -> None:
        view = GraphView(written)
        self._names, self._storing = names, storing
        self._axes = weights_of(view)
        self._shapes = {name: view.constant_shape(name) for name in self._axes}
        self._readers = {name: view.consumers[name] for name in self._axes}
        self._in_float = {
            n for n, nodes in self._readers.items() if any(r.op_type != "DequantizeLinear" for r in nodes)
        }
        self._scales = {
            name: view.constant_shape(nodes[0].input[1])
            for name, nodes in self._readers.items()
            if name not in self._in_float
        }
        self._written, self._more = written, 0
        own = set(names.values())
        self._others: dict[str, tuple[Packing, bool]] = {}
        for name, axis in self._axes.items() if storing.storage is WeightStorage.PACKED else ():
            found = as_packing(name, view.constant(name), axis) if name not in own else None
            if found is not None:
                self._others[name] = found[0], bool((found[1] != -(2 ** (found[0].bits - 1))).any())

    def bytes(self, widths: Widths) -> int:
        """Return the bytes of the file with weights of these widths."""
        return file_bytes(self._written, self._change(widths)) + self._more

    def _change(self, widths: Widths) -> int:
        """Return the bytes that the graph grows by, from weights in int8."""
        if self._storing.storage is WeightStorage.PACKED:
            return -self._saved(widths)
        return sum(self._weight(name, bits) - self._weight(name, 8) for name, bits in widths.items())

    def corrected(self, more: int) -> FileCount:
        """Return a count of files that are ``more`` bytes larger."""
        result = copy(self)
        result._more += more
        return result

    def sizes(self, widths: Widths) -> FileSizes:
        """Return the sizes of parts, which add up to the bytes for these widths, and about so for others."""
        packed = self._storing.storage is WeightStorage.PACKED
        parts = {
            name: {bits: self._weight(name, bits) for bits in (8, *candidates)}
            for name, candidates in self._storing.zero_points.items()
        }
        shared = {}
        for bits in LAYOUTS if packed else ():
            of_width = {n: b for n, b in widths.items() if b == bits}
            if not of_width:
                # No weight has this width: what all would share.
                of_width = {n: bits for n in parts if bits in parts[n]}
            own = sum(parts[n][bits] - parts[n][8] for n in of_width)
            shared[bits] = max(0, self._change({n: of_width.get(n, 8) for n in parts}) - own)
        rest = self.bytes({}) - sum(of[8] for of in parts.values())
        found = FileSizes(rest, parts, shared)
        return FileSizes(rest + self.bytes(widths) - found.total(widths), parts, shared) if widths else found

    def _weight(self, weight: str, bits: int) -> int:
        """Return the bytes of a weight without those that it shares."""
        name = self._names[weight]
        shape, storing = self._shapes[name], self._storing
        whole = tensor_bytes(TensorProto(name=name, data_type=TensorProto.INT8, dims=shape), math.prod(shape))
        if storing.storage is WeightStorage.NATIVE:
            width = min((w for w in storing.types if w >= bits), default=8)
            if width == 8 or name in self._in_float:
                return whole
            zero = TensorProto(name=f"{name}_zero_point", data_type=TensorProto.INT4, dims=self._scales[name])
            counts = math.prod(shape), math.prod(self._scales[name])
            held = [-(-count * width // 8) for count in counts]
            bare = TensorProto(name=name, data_type=TensorProto.INT4, dims=shape)
            added = tensor_bytes(zero, held[1]) + field_bytes(len(zero.name.encode()))
            given = [sum(field_bytes(len(i.encode())) for i in n.input[2:]) for n in self._readers[name]]
            return tensor_bytes(bare, held[0]) + sum(added - bytes_given for bytes_given in given)
        if storing.storage is WeightStorage.INT8 or bits not in LAYOUTS or len(shape) < 2:
            return whole
        return min(whole, own_bytes(self._packing(weight, bits), storing.zero_points[weight][bits]))

    def _packing(self, weight: str, bits: int) -> Packing:
        name = self._names[weight]
        return Packing(name, self._shapes[name], bits, self._axes[name] or 0)

    def _saved(self, widths: Widths) -> int:
        """Return the bytes that packing saves, counted as `eptq_onnx.graph.packing` packs."""
        bits_of = {self._names[n]: (n, bits) for n, bits in widths.items()}
        weights: list[Packing] = []
        differ: dict[int, bool] = {}
        for name, shape in self._shapes.items():
            found = self._others.get(name)
            if name in bits_of and bits_of[name][1] in LAYOUTS and len(shape) > 1:
                weight, bits = bits_of[name]
                found = self._packing(weight, bits), self._storing.zero_points[weight][bits]
            if found is not None:
                weights.append(found[0])
                differ[found[0].bits] = differ.get(found[0].bits, False) or found[1]
        return bytes_saved(weights, differ)
