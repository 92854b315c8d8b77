"""Array types."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.integer[Any]]
Values: TypeAlias = NDArray[np.integer[Any] | np.floating[Any]]
"""Values of a number format, in units of the scale: integers, or numbers of a floating-point format."""
Feeds: TypeAlias = dict[str, NDArray[Any]]
