"""After the passes: the report."""

from __future__ import annotations

from dataclasses import dataclass

from eptq_onnx._version import __version__
from eptq_onnx.config import FLOAT_BITS
from eptq_onnx.estimates import Estimate
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.sizes import size_of_parts
from eptq_onnx.graph.view import opset_of
from eptq_onnx.passes.base import Context, State
from eptq_onnx.prepare import Prepared
from eptq_onnx.records import Calibration, Scores
from eptq_onnx.report import LayerReport, Report
from eptq_onnx.training.attention import layer_attention

_MOST_NAMED = 8
"""Maximum number of tensors that one note names."""


@dataclass(frozen=True)
class Costs:
    """What a run cost.

    Parameters
    ----------
    estimate : Estimate
        The estimate made before the run.
    seconds : dict of str to float
        Time of each part.
    peak_memory : int
        In bytes.
    """

    estimate: Estimate
    seconds: dict[str, float]
    peak_memory: int


def report_of(prepared: Prepared, state: State, ctx: Context, costs: Costs) -> Report:
    """Assemble the report.

    Parameters
    ----------
    prepared : Prepared
    state : State
        After all passes.
    ctx : Context
    costs : Costs
    """
    notes = [
        *prepared.notes,
        *state.notes,
        *_unscored(state.scores),
        *_not_finite(state.calibration),
        *_left_over(state.calibration, ctx),
        *state.verification.notes,
    ]
    written = sink(state.packed)
    return Report(
        version=__version__,
        model=prepared.name,
        target=ctx.target.name,
        engine=ctx.engine.name if ctx.engine else "",
        config={**ctx.given.model_dump(mode="json"), **prepared.reading},
        opset=max(opset_of(written), prepared.opset),
        data=prepared.origin,
        samples=ctx.samples.count,
        unused_samples=state.calibration.unused_samples,
        batching=ctx.samples.layout,
        layers=_layers(state, len(ctx.shares.scored)),
        kept_float=state.plan.kept_float,
        notes=tuple(notes),
        rotated=state.rotated,
        equalized=state.equalized,
        placement=state.placement,
        front=state.front,
        optimization=state.trace,
        verification=state.verification,
        speed=state.speed,
        estimate=costs.estimate,
        seconds=costs.seconds,
        peak_memory_bytes=costs.peak_memory,
        sizes=size_of_parts(written),
    )


def _layers(state: State, count: int) -> tuple[LayerReport, ...]:
    plan, scores = state.plan, state.scores
    weights = layer_attention(plan, scores, count).mean(axis=1) if scores is not None else None
    quantizers = plan.quantizer_of
    return tuple(
        LayerReport(
            node=layer.node,
            op_type=layer.op_type,
            weight_type=layer.weight_spec.format.type_name,
            weight_bits=layer.weight_spec.bits,
            weight_range=(layer.weight_spec.qmin, layer.weight_spec.qmax),
            weight_zero_points=not layer.weight_spec.symmetric,
            activation_bits=FLOAT_BITS if layer.stored else quantizers[layer.input].spec.bits,
            edge=layer.edge,
            attention=None if weights is None else float(weights[k]),
            sqnr_db=state.verification.layers[layer.node],
        )
        for k, layer in enumerate(plan.layers)
    )


def _unscored(scores: Scores | None) -> list[str]:
    return (
        [f"{node} has no Hessian score: {why}" for node, why in scores.unreached.items()]
        if scores is not None
        else []
    )


def _not_finite(calibration: Calibration) -> list[str]:
    shares = [f"{name} ({share:.2%})" for name, share in calibration.not_finite.items()]
    if not shares:
        return []
    more = f" and {len(shares) - _MOST_NAMED} more" if len(shares) > _MOST_NAMED else ""
    return [
        "NaN or infinite values in the float model count in no statistic: "
        f"{', '.join(shares[:_MOST_NAMED])}{more}"
    ]


def _left_over(calibration: Calibration, ctx: Context) -> list[str]:
    samples = ctx.samples
    count, alike = calibration.unused_samples, len(samples.alike())
    notes = (
        [f"{count} samples are left over: the model takes {samples.fixed_batch} at a time"] if count else []
    )
    if ctx.engine is not None and alike < samples.count:
        notes.append(
            f"gradients need fixed shapes: scored and optimized on the {alike} of {samples.count} samples of "
            "the most frequent size"
        )
    return notes
