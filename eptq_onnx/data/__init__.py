"""Calibration samples: from arrays, feeds, files or functions to batches."""

from eptq_onnx.data.samples import Samples, candidates, read, spread

__all__ = ["Samples", "candidates", "read", "spread"]
