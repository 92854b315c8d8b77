"""Calibration samples: read from arrays, feeds, files or functions, and batched."""

from eptq_onnx.data.reading import Candidates, load, read
from eptq_onnx.data.samples import Samples, spread

__all__ = ["Candidates", "Samples", "load", "read", "spread"]
