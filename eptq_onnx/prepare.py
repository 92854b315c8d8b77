"""Before the passes: read model and samples, normalize the model, and record draws and choices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from eptq_onnx.config import Config, FloatType
from eptq_onnx.config.encodings import Encodings
from eptq_onnx.data import load
from eptq_onnx.data.notes import sample_notes
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers import Data, Source
from eptq_onnx.data.samples import Samples
from eptq_onnx.errors import ConfigError
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import flattened
from eptq_onnx.graph.opsets import restored
from eptq_onnx.graph.replay import Replay
from eptq_onnx.graph.unquantize import Quantization
from eptq_onnx.graph.view import opset_of
from eptq_onnx.graph.widen import other_float_types
from eptq_onnx.method.arrange import arrange, record
from eptq_onnx.method.normalize import normalize, settle
from eptq_onnx.numerics.scales import GivenScales
from eptq_onnx.probes import newest_readable
from eptq_onnx.proto import store
from eptq_onnx.records import Plan
from eptq_onnx.runtime import Session
from eptq_onnx.targets import Target


@dataclass(frozen=True)
class Prepared:
    """A normalized model with its samples, and facts about the original.

    Parameters
    ----------
    model : ModelProto
        The whole model, normalized.
    samples : Samples
    origin : Origin
        Where the samples come from, and what was done to them.
    reading : dict of str to object
        Options on reading them that were given.
    found : Replay
        Recorded random draws and choices of the float network.
    name : str
        Path or graph name of the original.
    opset, ir_version : int
        Those of the original.
    float_bytes : int
        Size of the original.
    notes : tuple of str
    rest : FloatType
        Type of what stays float.
    names : tuple of str
        Names of the samples, if each is a file.
    quantization : Quantization
        How the original is quantized.
    """

    model: ModelProto
    samples: Samples
    origin: Origin
    reading: Mapping[str, object]
    found: Replay
    name: str
    opset: int
    ir_version: int
    float_bytes: int
    notes: tuple[str, ...]
    rest: FloatType
    names: tuple[str, ...] = ()
    quantization: Quantization = field(default_factory=Quantization)

    def name_of(self, sample: int) -> str:
        """Return the name of a sample, or its number if it has none."""
        return self.names[sample] if self.names else str(sample)


def prepare(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    target: Target,
    config: Config,
    folder: str,
) -> Prepared:
    """Read and normalize the model, and read the samples.

    Parameters
    ----------
    model : path, bytes or ModelProto
    data : Source
    target : Target
    config : Config
    folder : str
        Temporary folder for the weights of a large model.

    Raises
    ------
    ModelError, DataError
        If the model or the samples cannot be used.
    """
    original, float_form, quantization = io.load_with_quantization(model, folder, blocks=config.requantize)
    read = load(data, original, config.batch_axes)
    rest = target.rest_for(config.rest, other_float_types(original))
    plain = normalize(float_form, target.opset_for(config.most_activation_bits, config.storage, config.block))
    arranged = arrange(plain, read.samples, config.seed)
    whole = settle(plain, arranged.samples)
    samples, found, left = record(flattened(whole), arranged.samples, config.seed)
    notes = [
        *read.origin.notes,
        *([] if read.origin.made_up else sample_notes(arranged.samples)),
        *_type_notes(original, config, target, rest),
        *_opset_notes(original, whole),
        *arranged.notes,
        *left,
    ]
    size = store.model_bytes(original)
    return Prepared(
        model=whole,
        samples=samples,
        origin=read.origin,
        reading=data.reading.given() if isinstance(data, Data) else {},
        found=found,
        name=name_of(model, original),
        opset=opset_of(original),
        ir_version=original.ir_version,
        float_bytes=size,
        notes=tuple(notes),
        rest=rest,
        # Samples that are grouped into runs have no single name.
        names=read.names if len(read.names) == samples.count else (),
        quantization=quantization,
    )


def keeping(config: Config, found: Quantization) -> Config:
    """Return the options with the ranges and scales of a quantized model; the user's own count more."""
    own, theirs = config.encodings or Encodings(ranges={}), Quantization() if config.requantize else found
    # A budget chooses the widths of weights, to which no given scale fits.
    scales = {} if config.chooses_widths else {**theirs.scales, **own.scales}
    ranges = {**theirs.ranges, **own.ranges}
    if not ranges and not scales:
        return config
    kept = Encodings(file=own.file, ranges=ranges, weights=own.weights, scales=scales)
    return config.model_copy(update={"encodings": kept})


def quantization_notes(config: Config, found: Quantization, plan: Plan) -> list[str]:
    """Return what became of the quantization that a model had."""
    if not found.is_there:
        return []
    weights = len(found.scales) + found.other_weights
    if config.requantize:
        return [
            "the model is quantized already, and gets new ranges and scales as the option requantize asks "
            f"(activations: {len(found.ranges)}, weights: {weights})"
        ]
    ranges = sum(q.prescribed is not None for q in plan.activations)
    specs = [s for s in plan.weight_specs.values() if isinstance(s.scales, GivenScales)]
    given = sum(s.is_given for s in specs)
    every = sum(x.dynamic and x.node in found.dynamic for x in plan.layers)
    parts = {
        "activations that keep their ranges": ranges,
        "layers that find the ranges of their inputs in every run": every,
        "weights that keep their integers, as the file has no others": given,
        "weights that keep their scales, and are rounded anew from their float values": len(specs) - given,
        "weights that get new scales, as theirs are not those of a layer of the target": weights - len(specs),
    }
    told = "; ".join(f"{what}: {count}" for what, count in parts.items() if count > 0)
    return [f"the model is quantized already ({told})"]


def counting(config: Config, prepared: Prepared) -> Config:
    """Return the options with the tensors that decide choices by value among the outputs that count.

    Raises
    ------
    ConfigError
        If an output that is named does not exist.
    """
    if not config.outputs:
        return config
    names = [v.name for v in prepared.model.graph.output]
    for name in config.outputs:
        if name not in names:
            raise ConfigError(
                f"option outputs: the model has no output {name}; its outputs are {', '.join(names)}."
            )
    return config.model_copy(update={"outputs": (*config.outputs, *prepared.found.decisive)})


def name_of(model: object, original: ModelProto) -> str:
    """Return the path of a model, or the name of its graph."""
    return str(Path(model)) if isinstance(model, (str, os.PathLike)) else original.graph.name


def final(quantized: ModelProto, opset: int, ir_version: int) -> ModelProto:
    """Return the verified model in the opset and IR version of the original.

    Loads it in onnxruntime if that supports the opset.
    """
    newest = newest_readable()
    result = restored(quantized, opset, ir_version, *newest)
    if result is not quantized and opset_of(result) <= newest[0]:
        Session(result, optimize=False)
    return result


def _type_notes(model: ModelProto, config: Config, target: Target, rest: FloatType) -> list[str]:
    notes = [
        f"{name} tensors are computed and stored in {rest.value}; inputs and outputs keep their types"
        for name in other_float_types(model)
        if name != rest.value
    ]
    if config.most_activation_bits > 8 and not target.activation.wide:
        notes.append(
            "no integer kernels are known for 16-bit activations: operators compute in float32 between "
            "their quantizers"
        )
    return notes


def _opset_notes(model: ModelProto, readable: ModelProto) -> list[str]:
    own, read = opset_of(model), opset_of(readable)
    if own <= read:
        return []
    return [
        f"the installed onnxruntime does not run quantized models of opset {own}: the result was made and "
        f"verified in opset {read}"
    ]
