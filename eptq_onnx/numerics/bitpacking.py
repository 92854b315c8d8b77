"""Pack integers of 2 to 6 bits into bytes.

A group of values forms one index, with the first value in the lowest bits. The low 8 bits of an index are a
byte of the first plane; if it has more bits, these share bytes of a second plane.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.types import IntArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How values of one width are arranged in bytes.

    Parameters
    ----------
    bits : int
        Width of a value.
    group : int
        Number of values in one index.
    """

    bits: int
    group: int

    @property
    def rows(self) -> int:
        """Return the number of possible indices."""
        return int(2 ** (self.bits * self.group))

    @property
    def above(self) -> int:
        """Return the number of bits of an index beyond the low 8."""
        return self.bits * self.group - 8

    @property
    def indices_at_once(self) -> int:
        """Return the number of indices whose upper bits share a byte; 1 without a second plane."""
        return 8 // self.above if self.above else 1

    def indices(self, count: int) -> int:
        """Return the number of indices in a row of ``count`` values, with padding."""
        step = self.group * self.indices_at_once
        return -(-count // step) * self.indices_at_once

    def row_bytes(self, count: int) -> int:
        """Return the bytes of a row of ``count`` values in both planes."""
        return self.indices(count) * (8 + self.above) // 8

    def pack(self, rows: IntArray) -> tuple[Bytes, Bytes | None]:
        """Pack rows of values.

        Parameters
        ----------
        rows : ndarray of shape (n_rows, n_values)
            Integers from 0 to ``2**bits - 1``.

        Returns
        -------
        ndarray of uint8, shape (n_rows, n_indices)
            The low 8 bits of each index; a row is padded with zeros.
        ndarray of uint8, shape (n_rows, n_indices // indices_at_once), or None
            The bits above them.
        """
        count, size = rows.shape
        padded = np.zeros((count, self.indices(size) * self.group), np.uint8)
        padded[:, :size] = rows
        index = _joined(padded, self.group, self.bits)
        low = (index & 255).astype(np.uint8)
        if not self.above:
            return low, None
        return low, _joined(index >> 8, self.indices_at_once, self.above).astype(np.uint8)


LAYOUTS = {bits: Layout(bits, group) for bits, group in ((2, 4), (3, 4), (4, 2), (5, 2), (6, 2))}
"""Width to layout.

4 values of 2 bits take 1 byte, 8 of 3 bits 3 bytes, 2 of 4 bits 1, 8 of 5 bits 5, and 4 of 6 bits 3.
"""


def _joined(values: IntArray, group: int, bits: int) -> NDArray[np.uint16]:
    """Join groups of adjacent values in each row, the first in the lowest bits."""
    parts = values.reshape(len(values), -1, group)
    joined = np.zeros(parts.shape[:2], np.uint16)
    for k in range(group):
        joined |= parts[:, :, k].astype(np.uint16) << np.uint16(bits * k)
    return joined


def offsets(rows: IntArray) -> tuple[int, NDArray[np.int16]]:
    """Return the bits that integers need after an offset is subtracted from each row, and the offsets.

    If several offsets are possible, the one nearest to that of a signed integer is returned.

    Parameters
    ----------
    rows : ndarray of int8, shape (n_rows, n_values)

    Returns
    -------
    int
        At least 2, and at most 8.
    ndarray of int16, shape (n_rows,)
    """
    least, most = rows.min(axis=1).astype(np.int16), rows.max(axis=1).astype(np.int16)
    bits = max(min(LAYOUTS), int((most - least).max()).bit_length())
    signed = np.full(len(rows), -(2 ** (bits - 1)), np.int16)
    return bits, np.clip(signed, most - np.int16(2**bits - 1), least)
