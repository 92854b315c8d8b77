"""onnxruntime's quantization functions, with its signatures: each argument acts, or an error says why not.

A script that calls ``onnxruntime.quantization.quantize_static`` needs another import alone::

    from eptq_onnx.compat import quantize_static

Enumerations are taken from onnxruntime or by name (``"QInt8"``). Further keywords are options of
`eptq_onnx.Config`, such as ``preset="fast"``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto
from typing_extensions import Unpack

from eptq_onnx import scratch, targets
from eptq_onnx.api import quantize
from eptq_onnx.config import Config
from eptq_onnx.config.options import Options
from eptq_onnx.errors import CapabilityError, ConfigError
from eptq_onnx.graph import io
from eptq_onnx.graph.patterns import exactly
from eptq_onnx.report import Report

_METHODS = {"MinMax": "minmax", "Percentile": "percentile"}
_ACTIVATIONS = {
    "QInt8": ("int8", 8),
    "QUInt8": ("uint8", 8),
    "QInt16": ("int8", 16),
    "QUInt16": ("uint8", 16),
}
"""Type of onnxruntime to the container of a target, and the bits."""
_WEIGHTS = {"QInt8": 8, "QInt4": 4}
_AS_HERE = {
    "WeightSymmetric": True, "EnableSubgraph": False, "ForceQuantizeNoInputCheck": False,
    "MatMulConstBOnly": True, "AddQDQPairToWeight": False, "DedicatedQDQPair": False,
    "CalibTensorRangeSymmetric": False, "CalibMovingAverage": False, "SmoothQuant": True,
    "UseQDQContribOps": False, "QDQKeepRemovableActivations": False, "extra.Sigmoid.nnapi": False,
    "QDQDisableWeightAdjustForInt32Bias": False, "OpTypesToExcludeOutputQuantization": [],
    "QDQOpTypePerChannelSupportToAxis": {}, "TensorQuantOverrides": {}, "CalibStridedMinMax": None,
}  # fmt: skip
"""Extra options whose effect is fixed here, and the values with which they ask for it."""
_INSTEAD = {
    "WeightSymmetric": "integer kernels need weights with the zero point 0",
    "SmoothQuant": "channels are balanced by the option equalize; pass equalize=False to leave that out",
    "TensorQuantOverrides": "the option encodings of eptq_onnx.Config fixes ranges, and bits sets widths",
    "CalibStridedMinMax": "all samples count; pass fewer of them",
    "CalibMaxIntermediateOutputs": "the option max_memory of eptq_onnx.Config limits memory",
    "OpTypesToExcludeOutputQuantization": "a target file says so of each operator",
    "QDQOpTypePerChannelSupportToAxis": "the target says so of each operator",
}
"""What to do instead."""


def quantize_static(  # noqa: PLR0913 - the signature is onnxruntime's
    model_input: str | os.PathLike[str] | ModelProto,
    model_output: str | os.PathLike[str],
    calibration_data_reader: Any = None,
    quant_format: Any = "QDQ",
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    activation_type: Any = "QInt8",
    weight_type: Any = "QInt8",
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    calibrate_method: Any = "MinMax",
    calibration_providers: Sequence[Any] | None = None,
    extra_options: Mapping[str, Any] | None = None,
    calibration_cache_path: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> Report:
    """Quantize as ``onnxruntime.quantization.quantize_static`` is called, with the method of this package.

    Types and ranges are those that the arguments ask for; weights are rounded by `eptq_onnx.quantize`.
    Where products of 8-bit weights saturate on this machine, weights have 7 bits whatever ``reduce_range``
    says. 16-bit weights, QOperator, entropy and distribution calibration, and extra options that would change
    anything not listed below raise an error.

    Parameters
    ----------
    model_input, model_output, calibration_data_reader
        As onnxruntime's; the reader may be any data that `eptq_onnx.quantize` takes.
    quant_format
        ``QDQ`` alone.
    op_types_to_quantize, nodes_to_quantize, nodes_to_exclude : sequence of str, optional
    per_channel, reduce_range : bool
    activation_type
        ``QInt8``, ``QUInt8``, ``QInt16`` or ``QUInt16``.
    weight_type
        ``QInt8`` or ``QInt4``, which is packed.
    use_external_data_format : bool
        Only False: weights that do not fit into the file go beside it by themselves.
    calibrate_method
        ``MinMax`` or ``Percentile``.
    calibration_providers, calibration_cache_path
        None.
    extra_options : mapping, optional
        ``ActivationSymmetric``, ``MinimumRealRange`` and ``CalibPercentile`` act.
    **options
        Options of `eptq_onnx.Config`; they count more than the arguments.

    Returns
    -------
    Report

    Raises
    ------
    ConfigError
        If an argument asks for what this package does not do.
    EptqError
        From `eptq_onnx.quantize`.
    """
    if _name(quant_format) != "QDQ":
        raise _refused(
            "quant_format", quant_format, "files are QDQ, which onnxruntime fuses into the same kernels"
        )
    if calibration_data_reader is None:
        raise _refused("calibration_data_reader", None, "give calibration data")
    for name, value, instead in (
        (
            "use_external_data_format",
            use_external_data_format,
            "large weights go beside the file by themselves",
        ),
        ("calibration_providers", calibration_providers, "calibration runs on the CPU"),
        (
            "calibration_cache_path",
            calibration_cache_path,
            "the option workdir of eptq_onnx.Config keeps results",
        ),
    ):
        if value:
            raise _refused(name, value, instead)
    container, bits = _known("activation_type", activation_type, _ACTIVATIONS)
    rest = dict(extra_options or {})
    activation: dict[str, Any] = {
        "container": container,
        "symmetric": bool(rest.pop("ActivationSymmetric", False)),
    }
    if (least := rest.pop("MinimumRealRange", None)) is not None:
        activation["least_range"] = float(least)
    if activation["symmetric"] and container == "uint8":
        raise _refused("ActivationSymmetric", True, "symmetric activations are QInt8 or QInt16")
    own: dict[str, Any] = {
        "activation_range": _known("calibrate_method", calibrate_method, _METHODS),
        "activation_bits": bits,
        "weight_bits": _known("weight_type", weight_type, _WEIGHTS),
        "edge_bits": _known("weight_type", weight_type, _WEIGHTS),
        "exclude": _excluded(model_input, nodes_to_quantize, nodes_to_exclude),
    }
    if (percentile := rest.pop("CalibPercentile", None)) is not None:
        own["percentile"] = float(percentile)
    _check_rest(rest)
    weight: dict[str, Any] = {"per_channel": per_channel}
    if reduce_range:
        weight |= {"range_8_bits": [-64, 63], "depthwise_range_8_bits": [-64, 63]}
    with scratch.folder() as folder:
        if "target" not in options and (text := _target(activation, weight, op_types_to_quantize)):
            path = Path(folder) / "target.toml"
            path.write_text(text, encoding="utf-8")
            own["target"] = str(path)
        result = quantize(model_input, calibration_data_reader, Config(**{**own, **options}))
    result.save(model_output)
    return result.report


def quantize_dynamic(  # noqa: PLR0913 - the signature is onnxruntime's
    model_input: str | os.PathLike[str] | ModelProto,
    model_output: str | os.PathLike[str],
    op_types_to_quantize: Sequence[str] | None = None,
    per_channel: bool = False,
    reduce_range: bool = False,
    weight_type: Any = "QInt8",
    nodes_to_quantize: Sequence[str] | None = None,
    nodes_to_exclude: Sequence[str] | None = None,
    use_external_data_format: bool = False,
    extra_options: Mapping[str, Any] | None = None,
) -> Report:
    """Refuse to quantize as ``onnxruntime.quantization.quantize_dynamic`` does, and say what to do instead.

    Raises
    ------
    CapabilityError
        Always: activations are not quantized while the model runs.
    """
    raise CapabilityError(
        f"{model_input if isinstance(model_input, (str, os.PathLike)) else 'the model'} is not quantized: "
        "activations get their ranges from calibration data here, not while the model runs. Use "
        "quantize_static with samples, or eptq_onnx.quantize with bits='w8a32', which stores weights alone "
        "as integers."
    )


def _target(activation: Mapping[str, Any], weight: Mapping[str, Any], operators: Sequence[str] | None) -> str:
    """Return a target file for onnxruntime on this machine with other rules; empty if they are its own."""
    base = targets.load(targets.AUTO)
    lines = [f"{key} = {json.dumps(base.name)}" for key in ("name", "title", "extends")]
    head = len(lines)
    for section, values in (("weight", weight), ("activation", activation)):
        known = getattr(base, section).model_dump(mode="json")
        if changed := {key: value for key, value in values.items() if value != known[key]}:
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in changed.items())]
    if operators is not None:
        lines += [f'[operators.{op}]\nruns = "float"' for op in base.operators if op not in operators]
    return "\n".join(lines) + "\n" if len(lines) > head else ""


def _excluded(
    model: str | os.PathLike[str] | ModelProto,
    wanted: Sequence[str] | None,
    unwanted: Sequence[str] | None,
) -> list[str]:
    """Return the patterns of nodes that stay float."""
    found = [exactly(name) for name in unwanted or ()]
    if wanted:
        others = {n.name for n in io.load(model).graph.node} - set(wanted)
        if others:
            found.append(f"re:(?!(?:{'|'.join(map(re.escape, wanted))})$).*")
    return found


def _check_rest(rest: Mapping[str, Any]) -> None:
    for name, value in rest.items():
        if name not in _AS_HERE or value != _AS_HERE[name]:
            instead = _INSTEAD.get(name, "this package has nothing of the kind: leave it out")
            raise _refused(f"extra_options[{name!r}]", value, instead)


def _known(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    if _name(value) not in known:
        raise _refused(name, value, f"choose one of {', '.join(known)}")
    return known[_name(value)]


def _name(value: Any) -> str:
    """Return the name of a member of an enumeration, or a string."""
    return str(getattr(value, "name", value))


def _refused(name: str, value: Any, instead: str) -> ConfigError:
    return ConfigError(f"{name}={_name(value)} is not possible here: {instead}.")
