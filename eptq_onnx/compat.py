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
from eptq_onnx.errors import ConfigError
from eptq_onnx.graph import io
from eptq_onnx.graph.patterns import exactly
from eptq_onnx.method.normalize import normalize
from eptq_onnx.ops import spec_of
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
_PRODUCTS = {"Gemm", "MatMul"}
"""One operator here: a MatMul becomes a Gemm with the bias behind it."""
_AS_HERE = {
    "WeightSymmetric": True, "EnableSubgraph": False, "ForceQuantizeNoInputCheck": False,
    "MatMulConstBOnly": True, "AddQDQPairToWeight": False, "DedicatedQDQPair": False,
    "CalibTensorRangeSymmetric": False, "CalibMovingAverage": False, "SmoothQuant": True,
    "UseQDQContribOps": False, "QDQKeepRemovableActivations": False, "extra.Sigmoid.nnapi": False,
    "QDQDisableWeightAdjustForInt32Bias": False, "OpTypesToExcludeOutputQuantization": [],
    "QDQOpTypePerChannelSupportToAxis": {}, "TensorQuantOverrides": {}, "CalibStridedMinMax": None,
}  # fmt: skip
"""Extra options whose effect is fixed here, and the values with which they ask for it."""
_AS_LEFT_OUT = {
    "ActivationRestrictedAsymmetric": False, "BlockSize": 0, "CalibMaxIntermediateOutputs": None,
    "CalibMovingAverageConstant": 0.01, "MatMulConstBOnly": False, "SmoothQuant": False,
    "SmoothQuantAlpha": 0.5, "SmoothQuantFolding": True, "WeightSymmetric": None,
}  # fmt: skip
"""Other defaults of quantize_static: to give one of them is to leave the option out."""
_AS_HERE_DYNAMIC = {
    name: _AS_HERE[name]
    for name in ("WeightSymmetric", "EnableSubgraph", "ForceQuantizeNoInputCheck", "MatMulConstBOnly",
                 "extra.Sigmoid.nnapi")
} | {"ActivationSymmetric": False}  # fmt: skip
"""The same where ranges are found in every run."""
_INSTEAD = {
    "WeightSymmetric": "integer kernels need weights with the zero point 0",
    "ActivationSymmetric": "DynamicQuantizeLinear chooses a zero point; leave it out",
    "EnableSubgraph": "the bodies of Loop and Scan stay float; branches that all samples take are quantized",
    "BlockSize": "the option block of eptq_onnx.Config sets it",
    "CalibMovingAverage": "ranges are those of all samples",
    "CalibTensorRangeSymmetric": "ActivationSymmetric makes ranges symmetric",
    "ForceQuantizeNoInputCheck": "MaxPool and Transpose follow what they read; leave it out",
    "MatMulConstBOnly": "products of two activations stay float; leave it out",
    "SmoothQuant": "channels are balanced by the option equalize; pass equalize=False to leave that out",
    "TensorQuantOverrides": "the option encodings of eptq_onnx.Config fixes ranges, and bits sets widths",
    "CalibStridedMinMax": "all samples count; pass fewer of them",
    "CalibMaxIntermediateOutputs": "the option max_memory of eptq_onnx.Config limits memory",
    "OpTypesToExcludeOutputQuantization": "a target file says so of each operator",
    "QDQOpTypePerChannelSupportToAxis": "the target says so of each operator",
}
"""What to do instead."""

_BY_ITSELF = {
    "use_external_data_format": "large weights go beside the file by themselves",
    "calibration_providers": "calibration runs on the CPU",
    "calibration_cache_path": "the option workdir of eptq_onnx.Config keeps results",
}
"""Why arguments have nothing to do."""


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
        ``ActivationSymmetric``, ``MinimumRealRange``, ``CalibPercentile`` and ``QuantizeBias`` act;
        onnxruntime's defaults may be given.
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
    _check_left_out(
        use_external_data_format=use_external_data_format,
        calibration_providers=calibration_providers,
        calibration_cache_path=calibration_cache_path,
    )
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
    bias = {"integer": bool(rest.pop("QuantizeBias"))} if "QuantizeBias" in rest else {}
    own: dict[str, Any] = {
        "activation_range": _known("calibrate_method", calibrate_method, _METHODS),
        "activation_bits": bits,
        "weight_bits": _known("weight_type", weight_type, _WEIGHTS),
        "edge_bits": _known("weight_type", weight_type, _WEIGHTS),
    }
    if (percentile := rest.pop("CalibPercentile", None)) is not None:
        own["percentile"] = float(percentile)
    _check_rest(rest, _AS_HERE, _AS_LEFT_OUT)
    rules = {"weight": _weight_rules(per_channel, reduce_range), "activation": activation, "bias": bias}
    with scratch.folder() as folder:
        own["exclude"] = _excluded(
            model_input, folder, (op_types_to_quantize, nodes_to_quantize, nodes_to_exclude)
        )
        own |= _target(Path(folder) / "target.toml", options, rules)
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
    **options: Unpack[Options],
) -> Report:
    """Quantize as ``onnxruntime.quantization.quantize_dynamic`` is called, without data.

    Matrix products with constant weights quantize their inputs in every run. The weights of all other
    operators that are chosen are stored as integers, and they compute in float: Conv, which onnxruntime makes
    a ConvInteger, tables that Gather reads, and recurrent layers. Weights are rounded to nearest, in the
    ranges with the least squared error. With samples, ``eptq_onnx.quantize(model, data,
    Config(activations="dynamic"))`` rounds them better.

    Parameters
    ----------
    model_input, model_output
        As onnxruntime's.
    op_types_to_quantize, nodes_to_quantize, nodes_to_exclude : sequence of str, optional
        Gemm and MatMul count as one operator.
    per_channel, reduce_range : bool
    weight_type
        ``QInt8`` or ``QInt4``, which is packed.
    use_external_data_format : bool
        Only False: weights that do not fit into the file go beside it by themselves.
    extra_options : mapping, optional
        Only values that change nothing.
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
    _check_left_out(use_external_data_format=use_external_data_format)
    _check_rest(extra_options or {}, _AS_HERE_DYNAMIC)
    bits = _known("weight_type", weight_type, _WEIGHTS)
    own: dict[str, Any] = {"activations": "dynamic", "weight_bits": bits, "edge_bits": bits}
    with scratch.folder() as folder:
        own["exclude"] = _excluded(
            model_input, folder, (op_types_to_quantize, nodes_to_quantize, nodes_to_exclude)
        )
        rules = {"weight": _weight_rules(per_channel, reduce_range)}
        own |= _target(Path(folder) / "target.toml", options, rules)
        result = quantize(model_input, None, Config(**{**own, **options}))
    result.save(model_output)
    return result.report


def _weight_rules(per_channel: bool, reduce_range: bool) -> dict[str, Any]:
    rules: dict[str, Any] = {"per_channel": per_channel}
    return rules | ({"range_8_bits": [-64, 64], "depthwise_range_8_bits": [-64, 64]} if reduce_range else {})


def _target(path: Path, options: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the option of a target for onnxruntime on this machine with other rules, which is written.

    Empty if the rules are its own, or if the user names a target.
    """
    base = targets.load(targets.AUTO)
    lines = [f"{key} = {json.dumps(base.name)}" for key in ("name", "title", "extends")]
    head = len(lines)
    for section, values in rules.items():
        known = getattr(base, section).model_dump(mode="json")
        if changed := {key: value for key, value in values.items() if value != known[key]}:
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in changed.items())]
    if "target" in options or len(lines) == head:
        return {}
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"target": str(path)}


def _excluded(
    model: str | os.PathLike[str] | ModelProto,
    folder: str,
    chosen: tuple[Sequence[str] | None, Sequence[str] | None, Sequence[str] | None],
) -> list[str]:
    """Return the patterns of nodes that stay float, their weights included.

    Parameters
    ----------
    model : path or ModelProto
    folder : str
        Temporary folder for the weights of a large model.
    chosen : tuple of three sequences of str, or None
        Operators and nodes that are quantized, and nodes that are not.
    """
    kinds, wanted, unwanted = chosen
    if not (kinds or wanted or unwanted):
        return []
    given = io.load(model, folder)
    # Its nodes are what patterns match: batch normalizations, for one, are parts of their layers there.
    target = targets.load(targets.AUTO)
    normal = normalize(given, target.min_opset).graph.node
    names, gone = {n.name for n in normal}, {n.name for n in given.graph.node}
    found = [exactly(name) for name in unwanted or () if name in names or name not in gone]
    if wanted and names - set(wanted):
        found.append(f"re:(?!(?:{'|'.join(map(re.escape, wanted))})$).*")
    if kinds:
        own = {*kinds, *(_PRODUCTS if _PRODUCTS & set(kinds) else ())}
        there = {n.op_type for n in normal if n.op_type in target.operators or spec_of(n).held}
        found += [f"op:{kind}" for kind in sorted(there - own)]
    return found


def _check_left_out(**values: Any) -> None:
    for name, value in values.items():
        if value:
            raise _refused(name, value, _BY_ITSELF[name])


def _check_rest(rest: Mapping[str, Any], *accepted: Mapping[str, Any]) -> None:
    for name, value in rest.items():
        if not any(name in known and value == known[name] for known in accepted):
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
