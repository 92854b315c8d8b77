"""Weights alone, quantized without any data: nothing is run, and nothing is measured."""

from __future__ import annotations

import math
import os

from onnx import ModelProto

from eptq_onnx._version import __version__
from eptq_onnx.config import FLOAT_BITS, Config, FloatType, without_samples
from eptq_onnx.data.origin import Origin
from eptq_onnx.errors import ConfigError
from eptq_onnx.estimates import Estimate
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.sizes import size_of_parts
from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.graph.widen import other_float_types
from eptq_onnx.memory import peak_memory
from eptq_onnx.method.calibrate.constants import constant_grids
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.verify import look_at_file
from eptq_onnx.passes.base import UNSET, Context, Progress, State
from eptq_onnx.passes.pack import Pack
from eptq_onnx.passes.ranges import Ranges
from eptq_onnx.passes.write import Write
from eptq_onnx.pipeline import Runner
from eptq_onnx.prepare import final, keeping, name_of, quantization_notes
from eptq_onnx.proto import store
from eptq_onnx.records import Calibration
from eptq_onnx.report import LayerReport, Report
from eptq_onnx.start import target_of

NO_SAMPLES = "no samples"
"""What a report calls the data of such a run."""


def without_data(
    model: str | os.PathLike[str] | bytes | ModelProto, given: Config, folder: str, progress: Progress
) -> tuple[ModelProto, Report]:
    """Round the weights of a model to nearest, in the ranges with the least squared error.

    Parameters
    ----------
    model : path, bytes or ModelProto
    given : Config
        With activations that stay float.
    folder : str
        Temporary folder for the weights of a large model.
    progress : Progress

    Raises
    ------
    ConfigError, ModelError
        As `eptq_onnx.quantize` does.
    """
    without_samples(given)
    asked = given
    if given.rest not in (None, FloatType.FLOAT32):
        raise ConfigError(
            f"option rest={given.rest.value} needs samples, which show what it holds: give data."
        )
    target = target_of(given.target)
    target.storage_for(given.storage, given.block)
    target.check_bits(given)
    progress("estimate", 1, 1, estimate := Estimate(0.0, 0))
    runner = Runner(())
    with runner.timed("normalize"):
        original, float_form, found = io.load_with_quantization(model, folder, blocks=given.requantize)
        given = keeping(given, found)
        whole = normalize(float_form, target.opset_for(FLOAT_BITS, given.storage, given.block))
    with runner.timed("plan"):
        plan = make_plan(whole, target, given)
        tables = constant_grids(plan, GraphView(whole))
    state = State(whole, whole, plan, Calibration(tables, {}, {}))
    state = state.noting(*quantization_notes(given, found, plan))
    size = store.model_bytes(original)
    ctx = Context(
        given=given, config=given, target=target, engine=None, samples=UNSET, shares=UNSET, found=UNSET,
        multiplications={}, source=model, folder=folder, float_bytes=size, progress=progress,
    )  # fmt: skip
    for step in (Ranges(), Write(), Pack()):
        with runner.timed(step.name):
            state = step.run(state, ctx)
            progress(step.name, 1, 1)
    written = sink(state.packed)
    with runner.timed("verify"):
        verification = look_at_file(written, whole, plan, target, size)
    report = Report(
        version=__version__,
        model=name_of(model, original),
        target=target.name,
        engine="",
        config=asked.model_dump(mode="json"),
        opset=max(opset_of(written), opset_of(original)),
        data=Origin(NO_SAMPLES),
        samples=0,
        unused_samples=0,
        batching={},
        layers=tuple(
            LayerReport(
                node=layer.node,
                op_type=layer.op_type,
                weight_type=layer.weight_spec.format.type_name,
                weight_bits=layer.weight_spec.bits,
                weight_range=(layer.weight_spec.qmin, layer.weight_spec.qmax),
                weight_zero_points=not layer.weight_spec.symmetric,
                activation_bits=FLOAT_BITS,
                edge=layer.edge,
                attention=None,
                sqnr_db=math.nan,
            )
            for layer in plan.layers
        ),
        kept_float=plan.kept_float,
        notes=(
            *state.notes,
            *(f"{kind} tensors are computed and stored in float32" for kind in other_float_types(original)),
        ),
        rotated={},
        equalized={},
        placement=None,
        front=(),
        optimization=None,
        verification=verification,
        speed=None,
        estimate=estimate,
        seconds=runner.seconds,
        peak_memory_bytes=peak_memory(),
        sizes=size_of_parts(written),
    )
    return final(written, opset_of(original), original.ir_version), report
