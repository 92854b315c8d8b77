"""eptq-onnx: post-training quantization of ONNX models with Hessian-guided network-wise rounding (EPTQ)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eptq_onnx._version import __version__
from eptq_onnx.errors import (
    CapabilityError,
    ConfigError,
    DataError,
    EptqError,
    GradientError,
    InstallError,
    ModelError,
    OutputError,
)

if TYPE_CHECKING:
    from eptq_onnx.api import Result, bench, compare, inspect, lint, quantize, samples, sensitivity, verify
    from eptq_onnx.comparison import Compared, Sample
    from eptq_onnx.config import (
        Accuracy,
        ActivationRange,
        Attention,
        Budget,
        BudgetUnit,
        Config,
        FloatType,
        Gate,
        Objective,
        Optimizer,
        Preset,
        RoundingVariable,
        Start,
        WeightRange,
        WeightStorage,
    )
    from eptq_onnx.data.placing import Placed
    from eptq_onnx.data.readers import Data
    from eptq_onnx.gate import Verified
    from eptq_onnx.inspection import Inspection
    from eptq_onnx.passes.base import Progress
    from eptq_onnx.report import Report
    from eptq_onnx.rules import Finding, Lint, Severity
    from eptq_onnx.runtimes.bench import Bench
    from eptq_onnx.scoring import Runnable
    from eptq_onnx.sensitivities import Sensitivity
    from eptq_onnx.trail import Trail

__all__ = [
    "Accuracy",
    "ActivationRange",
    "Attention",
    "Bench",
    "Budget",
    "BudgetUnit",
    "CapabilityError",
    "Compared",
    "Config",
    "ConfigError",
    "Data",
    "DataError",
    "EptqError",
    "Finding",
    "FloatType",
    "Gate",
    "GradientError",
    "Inspection",
    "InstallError",
    "Lint",
    "ModelError",
    "Objective",
    "Optimizer",
    "OutputError",
    "Placed",
    "Preset",
    "Progress",
    "Report",
    "Result",
    "RoundingVariable",
    "Runnable",
    "Sample",
    "Sensitivity",
    "Severity",
    "Start",
    "Trail",
    "Verified",
    "WeightRange",
    "WeightStorage",
    "__version__",
    "bench",
    "compare",
    "inspect",
    "lint",
    "quantize",
    "samples",
    "sensitivity",
    "verify",
]

_PLACES = {
    "Bench": "runtimes.bench",
    "Compared": "comparison",
    "Data": "data.readers",
    "Finding": "rules",
    "Inspection": "inspection",
    "Lint": "rules",
    "Placed": "data.placing",
    "Progress": "passes.base",
    "Report": "report",
    "Result": "api",
    "Runnable": "scoring",
    "Sample": "comparison",
    "Sensitivity": "sensitivities",
    "Severity": "rules",
    "Trail": "trail",
    "Verified": "gate",
    "bench": "api",
    "compare": "api",
    "inspect": "api",
    "lint": "api",
    "quantize": "api",
    "samples": "api",
    "sensitivity": "api",
    "verify": "api",
}
"""Modules of what is imported when it is asked for, other than `eptq_onnx.config`: the command has to handle
signals before the seconds that this takes."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES.get(name, 'config')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
