"""onnxruntime's own quantizers, as peers for the benchmarks."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quantize import load_model_with_shape_infer
from onnxruntime.quantization.quantize import quantize_dynamic as dynamic
from onnxruntime.quantization.registry import QDQRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from eptq_onnx.data.samples import Samples
from eptq_onnx.graph.view import opset_of
from eptq_onnx.numerics.types import Feeds

_OPSET = 13
_BATCHES_AT_ONCE = 4
"""The calibrators hold the activations of so many batches."""


@dataclass(frozen=True)
class Setting:
    """Options of ``quantize_static``; weights are int8, per channel, and symmetric in all of them.

    Parameters
    ----------
    calibration : CalibrationMethod
    reduce_range : bool
        Weights of 7 bits.
    symmetric : bool
        Symmetric int8 activations instead of uint8.
    """

    calibration: CalibrationMethod
    reduce_range: bool
    symmetric: bool = False

    def __str__(self) -> str:
        kind, bits = "s8s8" if self.symmetric else "u8s8", 7 if self.reduce_range else 8
        return f"{kind} {bits} bits {self.calibration.name.lower()}"


CALIBRATIONS = (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy)
ALL = tuple(Setting(c, r, s) for c in CALIBRATIONS for r in (True, False) for s in (False, True))


USUAL = (Setting(CalibrationMethod.MinMax, True), Setting(CalibrationMethod.Percentile, True))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds samples to onnxruntime's calibrators, in the batches that the model takes."""

    def __init__(self, samples: Samples) -> None:
        size = samples.micro_batch()
        # The calibrators want batches of one size.
        self._batches = [
            samples.take(part) for part in samples.batches(range(samples.count), size) if len(part) == size
        ]
        self._left: Iterator[Feeds] = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with these batches."""
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> Feeds | None:
        """The next batch, or None."""
        return next(self._left, None)


def quantize_static(
    model: Path, samples: Samples, settings: tuple[Setting, ...], folder: Path
) -> Iterator[tuple[Setting, Path]]:
    """Quantize with every setting, as ``onnxruntime.quantization.quantize_static`` does, but calibrate once a
    method.

    Parameters
    ----------
    model : path
    samples : Samples
    settings : tuple of Setting
    folder : path
        For the files; it must exist.

    Yields
    ------
    Setting
    path
        The QDQ file.
    """
    prepared = folder / "prepared.onnx"
    logging.disable(logging.WARNING)
    with redirect_stdout(sys.stderr):  # the calibrators print what they do
        quant_pre_process(_readable(model, folder), prepared, skip_symbolic_shape=True)
        loaded = load_model_with_shape_infer(prepared)
        operators = list(QDQRegistry)
        for method in dict.fromkeys(s.calibration for s in settings):
            calibrator = create_calibrator(
                prepared, operators, str(folder / "augmented.onnx"), calibrate_method=method
            )
            reader = Reader(samples)
            for start in range(0, len(reader), _BATCHES_AT_ONCE):
                reader.set_range(start, start + _BATCHES_AT_ONCE)
                calibrator.collect_data(reader)
            ranges = calibrator.compute_data()
            for setting in (s for s in settings if s.calibration is method):
                private = onnx.ModelProto()
                private.CopyFrom(loaded)
                activation = QuantType.QInt8 if setting.symmetric else QuantType.QUInt8
                options = {"ActivationSymmetric": setting.symmetric}
                quantizer = QDQQuantizer(
                    private,
                    True,
                    setting.reduce_range,
                    QuantType.QInt8,
                    activation,
                    copy.deepcopy(ranges),
                    [],
                    [],
                    operators,
                    options,
                )
                quantizer.quantize_model()
                path = folder / f"{str(setting).replace(' ', '_')}.onnx"
                quantizer.model.save_model_to_file(str(path))
                yield setting, path


DYNAMIC = tuple(
    (weights, per_channel, operators)
    for operators in (("MatMul", "Gemm", "Gather", "LSTM"), ())
    for weights, per_channel in ((QuantType.QInt8, True), (QuantType.QInt8, False), (QuantType.QUInt8, False))
)
"""Settings of ``quantize_dynamic``: type of weights, scales per channel, operators (all if none)."""


def quantize_dynamic(model: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Quantize with every setting of ``onnxruntime.quantization.quantize_dynamic``.

    Parameters
    ----------
    model : path
    folder : path
        For the files; it must exist.

    Yields
    ------
    str
        What the setting is.
    path
        The file; onnxruntime has no kernels for some of them.
    """
    prepared = folder / "prepared_dynamic.onnx"
    logging.disable(logging.WARNING)
    with redirect_stdout(sys.stderr):
        quant_pre_process(_readable(model, folder), prepared, skip_symbolic_shape=True)
        for k, (weights, per_channel, operators) in enumerate(DYNAMIC):
            path = folder / f"dynamic_{k}.onnx"
            dynamic(
                prepared,
                path,
                weight_type=weights,
                per_channel=per_channel,
                op_types_to_quantize=list(operators) or None,
            )
            scales = "per channel" if per_channel else "per tensor"
            yield f"{weights.name[1:].lower()} {scales}{'' if operators else ', all operators'}", path


def weights_in_blocks(method: str, model: Path, samples: Samples, sizes: tuple[int, int], path: Path) -> None:
    """Write the file of onnxruntime's quantizer of weights in blocks; it needs the package onnx-ir.

    Parameters
    ----------
    method : str
        ``"default"``, ``"hqq"`` (with PyTorch) or ``"gptq"``.
    model : path
    samples : Samples
        For GPTQ.
    sizes : tuple of int
        Bits, and terms of a block.
    path : path
    """
    from onnxruntime.quantization import matmul_nbits_quantizer as theirs

    bits, block = sizes
    configs: dict[str, Callable[[], Any]] = {
        "default": lambda: theirs.DefaultWeightOnlyQuantConfig(block, accuracy_level=4, bits=bits),
        "hqq": lambda: theirs.HQQWeightOnlyQuantConfig(block, bits),
        "gptq": lambda: theirs.GPTQWeightOnlyQuantConfig(Reader(samples), block_size=block),
    }
    with redirect_stdout(sys.stderr):
        quantizer = theirs.MatMulNBitsQuantizer(
            onnx.load(model), block, is_symmetric=False, accuracy_level=4, algo_config=configs[method]()
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))


def _readable(model: Path, folder: Path) -> Path:
    """The model at an opset that has scales per channel: 13, which onnxruntime's quantizer asks its users to
    convert to."""
    loaded = onnx.load(model)
    if opset_of(loaded) >= _OPSET:
        return model
    path = folder / "converted.onnx"
    onnx.save(onnx.version_converter.convert_version(loaded, _OPSET), path)
    return path
