"""Look at a float model without data: what it takes, what would run on integers, and what a run costs."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from eptq_onnx import targets
from eptq_onnx.config import Config, Reading
from eptq_onnx.config.option import written_as
from eptq_onnx.data.inputs import inputs_of
from eptq_onnx.data.readers import Data, Wanted, wanted
from eptq_onnx.errors import ConfigError, DataError, ModelError
from eptq_onnx.estimates import Estimate
from eptq_onnx.graph import io
from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.memory import peak_memory
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import all_nodes, initializers
from eptq_onnx.records import KeptFloat, Plan
from eptq_onnx.report.plain import plain
from eptq_onnx.start import Start, start, target_of
from eptq_onnx.targets import machine

SAMPLES = 250
"""Samples that a run is estimated for if nobody says how many."""
_DRAWN = 4
"""Samples that are made up to run the model, and repeated."""
_WIDTHS = ((8, 8), (4, 8))
"""Bits of weights and activations whose files are estimated besides those asked for."""

Model: TypeAlias = "str | os.PathLike[str] | bytes | ModelProto"


@dataclass(frozen=True)
class Port:
    """An input or an output of a model.

    Parameters
    ----------
    name, type : str
    shape : str
        Such as ``(any, 3, 224, 224)``.
    """

    name: str
    type: str
    shape: str


@dataclass(frozen=True)
class Operators:
    """The nodes of one operator in the model as it is quantized, with constants folded.

    Parameters
    ----------
    operator : str
    nodes : int
    integer : int
        Nodes that can run on integers.
    """

    operator: str
    nodes: int
    integer: int


@dataclass(frozen=True)
class Inspection:
    """What a float model is, and what becomes of it.

    Parameters
    ----------
    model : str
    file_bytes, parameters, opset : int
    inputs, outputs : tuple of Port
    data : Wanted
        Samples that its inputs look like, as far as they tell.
    target : str
    why_target : str
        Why that target was chosen; empty if it was named.
    nodes : dict of str to int
        Operators of the file, bodies of If, Loop and Scan included, and the number of their nodes.
    operators : tuple of Operators
    kept_float : tuple of KeptFloat
        Nodes that stay float, each with the reason.
    multiply_adds : float or None
        Of one sample, in the layers that can run on integers; None if unknown.
    sizes : dict of str to int
        Bits, such as ``W4A8``, to the approximate bytes of the written file.
    samples : int
        Number of samples that the estimates are for.
    estimate : Estimate or None
        Time that a run takes on this machine; None if unknown.
    memory_bytes : int or None
        Approximate memory that a run takes; None if unknown.
    command : str
        The command to run next.
    unavailable : tuple of str
        What was not found out, and why.
    """

    model: str
    file_bytes: int
    parameters: int
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data: Wanted
    target: str
    why_target: str
    nodes: Mapping[str, int]
    operators: tuple[Operators, ...]
    kept_float: tuple[KeptFloat, ...]
    multiply_adds: float | None
    sizes: Mapping[str, int]
    samples: int
    estimate: Estimate | None
    memory_bytes: int | None
    command: str
    unavailable: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(plain(asdict(self)), indent=2)


def inspect(model: Model, config: Config, reading: Reading, folder: str) -> Inspection:
    """Look at a float model; see `eptq_onnx.inspect`.

    Parameters
    ----------
    model : path, bytes or ModelProto
    config : Config
    reading : Reading
        What is known of the samples that will be given.
    folder : str
        Temporary folder for the weights of a large model.

    Raises
    ------
    EptqError
        If there is nothing to quantize, or something is wrong.
    """
    original = io.load(model, folder)
    data = wanted(original, reading)
    if data is None:
        raise DataError("the model has no input to feed calibration data to.")
    samples = reading.samples or SAMPLES
    begun, unavailable = _begun(model, config, folder, samples)
    if begun is None:
        target = target_of(config.target)
        widest = target.with_widest(config)
        whole = normalize(
            original, target.opset_for(widest.most_activation_bits, config.storage, config.block)
        )
        plan = make_plan(whole, target, widest)
    else:
        target, whole, plan = begun.ctx.target, begun.state.model, begun.state.plan
    name = str(Path(model)) if isinstance(model, (str, os.PathLike)) else ""
    return Inspection(
        model=name or original.graph.name,
        file_bytes=store.model_bytes(original),
        parameters=sum(math.prod(t.dims) for t in initializers(original.graph)),
        opset=opset_of(original),
        inputs=_ports(original, fed=True),
        outputs=_ports(original, fed=False),
        data=data,
        target=target.name,
        why_target=machine.fitting()[1] if config.target == targets.AUTO else "",
        nodes=dict(Counter(_named(n.domain, n.op_type) for n in all_nodes(original.graph)).most_common()),
        operators=_operators(whole, plan),
        kept_float=plan.kept_float,
        multiply_adds=None if begun is None else sum(begun.ctx.multiplications.values()),
        sizes=_sizes(whole, store.model_bytes(original), config),
        samples=samples,
        estimate=None if begun is None else begun.runner.estimate(begun.state, begun.ctx),
        memory_bytes=None if begun is None else _memory(begun),
        command=shlex.join(
            ["eptq-onnx", "quantize", name or "model.onnx", *data.arguments, *_options(config, reading)]
        ),
        unavailable=unavailable,
    )


def _begun(model: Model, config: Config, folder: str, samples: int) -> tuple[Start | None, tuple[str, ...]]:
    """Return the start of a run on made-up samples, or None and why they do not do."""
    try:
        return start(model, Data("random", samples=_DRAWN), config, folder, imagined=samples), ()
    except (DataError, ModelError) as e:
        # Not every model runs on made-up samples; if the model is at fault, the plan says so, too.
        return None, (f"time, memory and multiply-adds: the model does not run on made-up samples: {e}",)


def _ports(model: ModelProto, *, fed: bool) -> tuple[Port, ...]:
    """Return the inputs that need values, or the outputs."""
    needed = {i.name for i in inputs_of(model)}
    values = [v for v in model.graph.input if v.name in needed] if fed else model.graph.output
    return tuple(Port(v.name, _type_name(v.type.tensor_type.elem_type), _shape(v)) for v in values)


def _shape(value: ValueInfoProto) -> str:
    """Return sizes as text, with the names of open axes."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return "of any shape"
    sizes = (
        d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "any") for d in tensor.shape.dim
    )
    return f"({', '.join(sizes)})"


def _type_name(elem_type: int) -> str:
    if elem_type == TensorProto.STRING:
        return "text"
    try:
        return str(helper.tensor_dtype_to_np_dtype(elem_type))
    except KeyError:  # a sequence, or a type that is not stated
        return "of any type"


def _named(domain: str, op_type: str) -> str:
    """Return the name of an operator, with its domain unless that is ONNX's own."""
    return op_type if domain in ("", "ai.onnx") else f"{domain}.{op_type}"


def _operators(whole: ModelProto, plan: Plan) -> tuple[Operators, ...]:
    """Count nodes by operator, those that can run on integers first."""
    own = {*plan.integer_nodes, *plan.absorbed, *(x.node for x in plan.layers if x.dynamic)}
    nodes = Counter(_named(n.domain, n.op_type) for n in whole.graph.node)
    integer = Counter(_named(n.domain, n.op_type) for n in whole.graph.node if n.name in own)
    found = [Operators(operator, count, integer[operator]) for operator, count in nodes.items()]
    return tuple(sorted(found, key=lambda o: (-o.integer, -o.nodes, o.operator)))


def _sizes(whole: ModelProto, float_bytes: int, config: Config) -> dict[str, int]:
    """Return the approximate bytes of files of several widths."""
    view, sizes = GraphView(whole), dict[str, int]()
    target = target_of(config.target)
    own = () if config.chooses_widths else ((config.weight_bits, config.activation_bits),)
    for weights, activations in dict.fromkeys((*own, *_WIDTHS)):
        options = {"weight_bits": weights, "activation_bits": activations}
        wanted_bits = config.model_copy(update=options)
        try:
            target.check_bits(wanted_bits)
        except ConfigError:
            continue  # the target stores no weights of this width
        sizes[f"W{weights}A{activations}"] = _size(view, make_plan(whole, target, wanted_bits), float_bytes)
    return sizes


def _size(view: GraphView, plan: Plan, float_bytes: int) -> int:
    """Return the approximate bytes of a file: constants at their bits, weights with a scale per channel."""
    size = float_bytes
    kept = plan.weight_specs | {q.name: q.spec for q in (*plan.tables, *plan.held)}
    for name, spec in kept.items():
        count = math.prod(view.constant_shape(name))
        bits = spec.bits if spec.bits in (2, 3, 4, 5, 6) else 8
        size += -4 * count + -(-count * bits // 8)
    channels = sum(_channels(view, layer.weight) for layer in plan.layers)
    return size + _BYTES_A_CHANNEL * channels + _BYTES_A_PAIR * (len(plan.quantizers) + len(plan.layers))


_BYTES_A_CHANNEL = 5
"""A scale, and a zero point of a byte, for each output channel of a weight."""
_BYTES_A_PAIR = 300
"""Two nodes with their names, a scale and a zero point, for each quantizer."""


def _channels(view: GraphView, weight: str) -> int:
    return max(view.constant_shape(weight), default=1)


def _memory(begun: Start) -> int:
    """Return the approximate peak of a run: what is there already, and the pass that needs most."""
    own = [
        step.memory(begun.state, begun.ctx.samples) for step in begun.runner.passes if step.enabled(begun.ctx)
    ]
    return peak_memory() + max(own, default=0)


def _options(config: Config, reading: Reading) -> list[str]:
    """Return the options that were given as a command takes them; those of the data stand elsewhere."""
    found: list[str] = []
    for name in sorted(config.model_fields_set):
        found += written_as(name, type(config).model_fields[name], getattr(config, name))
    return found + (["--samples", str(reading.samples)] if reading.samples else [])
