"""Calibration samples: read from arrays, feeds, files or functions, and batched."""

from eptq_onnx.data.reading import candidates, read
from eptq_onnx.data.samples import Samples, spread

__all__ = ["Samples", "candidates", "read", "spread"]
