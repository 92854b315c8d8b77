"""After the passes: the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from eptq_onnx import devices
from eptq_onnx._version import __version__
from eptq_onnx.config import FLOAT_BITS
from eptq_onnx.data.samples import spread
from eptq_onnx.data.sheet import seen
from eptq_onnx.diagnosis import Exhibits, NodePlace, Picture
from eptq_onnx.estimates import Estimate
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.sizes import size_of_parts
from eptq_onnx.graph.view import GraphView, opset_of
from eptq_onnx.outcome import Verification
from eptq_onnx.passes.base import Context, State
from eptq_onnx.prepare import Prepared
from eptq_onnx.records import DYNAMIC_BITS, Calibration, Layer, Plan, Scores
from eptq_onnx.report import LayerReport, Report
from eptq_onnx.training.attention import layer_attention

_MOST_NAMED = 8
"""Maximum number of tensors that one note names."""
_MOST_SAMPLES = 64
"""Most samples whose attention is shown."""


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
        *_noise_above(ctx.config.activation_noise, state),
        *state.verification.notes,
        *devices.told(),
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
        verification=_named(state.verification, prepared),
        speed=state.speed,
        estimate=costs.estimate,
        seconds=costs.seconds,
        peak_memory_bytes=costs.peak_memory,
        sizes=size_of_parts(written),
        noise=state.diagnosis.noise if state.diagnosis is not None else None,
        exhibits=_exhibits(prepared, state, ctx),
    )


def _layers(state: State, count: int) -> tuple[LayerReport, ...]:
    plan, scores = state.plan, state.scores
    weights = layer_attention(plan, scores, count).mean(axis=1) if scores is not None else None
    found = state.diagnosis
    return tuple(
        LayerReport(
            node=layer.node,
            op_type=layer.op_type,
            weight_type=layer.weight_spec.format.type_name,
            weight_bits=layer.weight_spec.bits,
            weight_range=(layer.weight_spec.qmin, layer.weight_spec.qmax),
            weight_zero_points=not layer.weight_spec.symmetric,
            activation_bits=_activation_bits(layer, plan),
            edge=layer.edge,
            attention=None if weights is None else float(weights[k]),
            sqnr_db=state.verification.layers[layer.node],
            own_db=None if found is None else found.own[layer.node],
            nearest_db=None if found is None else found.nearest[layer.node],
        )
        for k, layer in enumerate(plan.layers)
    )


def _activation_bits(layer: Layer, plan: Plan) -> int:
    """Return the width of the activations that a layer reads."""
    if layer.stored:
        return FLOAT_BITS
    return DYNAMIC_BITS if layer.dynamic else plan.quantizer_of[layer.input].spec.bits


def _exhibits(prepared: Prepared, state: State, ctx: Context) -> Exhibits:
    scores, count = state.scores, len(ctx.shares.scored)
    attention = None
    if scores is not None:
        attention = layer_attention(state.plan, scores, count)[:, spread(count, _MOST_SAMPLES)]
    return Exhibits(
        network=tuple(_network(state)),
        attention=attention,
        histograms=state.diagnosis.histograms if state.diagnosis is not None else (),
        pictures=tuple(_pictures(prepared, state, ctx)),
    )


def _network(state: State) -> Iterator[NodePlace]:
    """Yield all nodes in the order of execution."""
    plan = state.plan
    layers = {layer.node: layer for layer in plan.layers}
    reasons = {kept.node: kept.reason for kept in plan.kept_float}
    for node in GraphView(state.model).nodes:
        name, kind = node.name, node.op_type
        if name in layers and layers[name].stored:
            kept = f"weights of {layers[name].weight_spec.bits} bits"
            yield NodePlace(name, kind, "float", "; ".join(filter(None, (kept, reasons.get(name, "")))))
        elif name in layers:
            layer = layers[name]
            how = " dynamic" if layer.dynamic else ""
            bits = f"W{layer.weight_spec.bits}A{_activation_bits(layer, plan)}{how}"
            yield NodePlace(name, kind, "integers", bits)
        elif name in plan.integer_nodes:
            yield NodePlace(
                name, kind, "integers", "A16, other widths converted" if name in plan.wide else ""
            )
        elif name in plan.absorbed:
            yield NodePlace(name, kind, "merged", "the quantizer behind it clips as it does")
        elif name in reasons:
            yield NodePlace(name, kind, "float", reasons[name])
        else:
            yield NodePlace(name, kind, "other", "it computes shapes, indices or conditions")


def _named(verification: Verification, prepared: Prepared) -> Verification:
    """Give the worst samples their names, where they have some."""
    if not prepared.names:
        return verification
    return replace(
        verification, worst=tuple(replace(s, name=prepared.name_of(s.sample)) for s in verification.worst)
    )


def _pictures(prepared: Prepared, state: State, ctx: Context) -> Iterator[Picture]:
    """Yield the samples on which the models differ most, if they are pictures."""
    for noise in state.verification.worst:
        pixels = seen(ctx.samples, prepared.origin, prepared.model, noise.sample)
        if pixels is None:
            return
        yield Picture(prepared.name_of(noise.sample), noise, pixels)


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


def _noise_above(limit: float, state: State) -> Iterator[str]:
    """Yield what activations cause if that is more than the limit, and what a quieter choice costs."""
    placed = state.placement
    candidates, chosen = (placed.candidates, placed.taken) if placed is not None else ((), None)
    left = state.sensitivity.left if chosen is None or chosen.noise is None else chosen.noise
    if not limit or left <= limit:
        return
    quiet = [c for c in candidates if c.noise is not None and c.noise <= limit and c.regions]
    best = min(quiet, key=lambda c: c.ratio, default=None)
    quieter = ""
    if best is not None and chosen is not None:
        quieter = (
            f"; a choice with less noise takes {best.ratio / chosen.ratio:.2f} times as long: "
            f"--objective noise --budget time={best.seconds:.2g}"
        )
    yield (
        f"quantized activations cause noise of {100 * left:.2g}% of the outputs' power, above "
        f"max_noise={limit:g}: none of them stands out{quieter}"
    )
