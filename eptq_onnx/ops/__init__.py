"""The operator table, one row per operator, and queries that are answered from it."""

from eptq_onnx.ops.queries import (
    channel_axes_of,
    channels_of,
    check_roles,
    executed,
    is_elementwise,
    operators_by_field,
    output_channels,
    output_parts,
    pointwise,
    recorded,
    without_gradient,
)
from eptq_onnx.ops.spec import Bounds, Gradient, OpSpec, Role
from eptq_onnx.ops.table import (
    LOWERINGS,
    LSQ_DOMAIN,
    QUANTIZERS,
    TABLE,
    UNKNOWN,
    is_known,
    linear_form,
    spec_of,
)

__all__ = [
    "LOWERINGS",
    "LSQ_DOMAIN",
    "QUANTIZERS",
    "TABLE",
    "UNKNOWN",
    "Bounds",
    "Gradient",
    "OpSpec",
    "Role",
    "channel_axes_of",
    "channels_of",
    "check_roles",
    "executed",
    "is_elementwise",
    "is_known",
    "linear_form",
    "operators_by_field",
    "output_channels",
    "output_parts",
    "pointwise",
    "recorded",
    "spec_of",
    "without_gradient",
]
