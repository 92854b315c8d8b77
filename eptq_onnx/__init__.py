"""eptq-onnx: post-training quantization of ONNX models with Hessian-guided network-wise rounding (EPTQ)."""

from eptq_onnx.config import Config
from eptq_onnx.errors import (
    ConfigError,
    DataError,
    EptqError,
    GradientError,
    InstallError,
    ModelError,
    OutputError,
)

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "EptqError",
    "GradientError",
    "InstallError",
    "ModelError",
    "OutputError",
    "Report",
    "Result",
    "__version__",
    "quantize",
]

from eptq_onnx.pipeline import Result, quantize
from eptq_onnx.report import Report
