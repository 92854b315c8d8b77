"""The whole road, from a float model to a QDQ model: the one file that sees every step."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import ByteSize

import eptq_onnx
from eptq_onnx import engines, targets
from eptq_onnx.config import Attention, Config, Start, WeightRange
from eptq_onnx.data import Samples, read, spread
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import GradientError
from eptq_onnx.graph import io, store
from eptq_onnx.graph.branches import flattened, sink
from eptq_onnx.graph.opsets import restored
from eptq_onnx.graph.view import opset_of
from eptq_onnx.graph.widen import other_float_types
from eptq_onnx.readers import Source
from eptq_onnx.report import LayerReport, Report
from eptq_onnx.runtime import custom_operators
from eptq_onnx.steps.allocate import SAMPLES as ALLOCATION_SAMPLES
from eptq_onnx.steps.allocate import allocate
from eptq_onnx.steps.calibrate import FLOAT_PASSES as CALIBRATION_PASSES
from eptq_onnx.steps.calibrate import calibrate
from eptq_onnx.steps.closed_form import FLOAT_PASSES as WALK_PASSES
from eptq_onnx.steps.closed_form import closed_form, operations, unsolved
from eptq_onnx.steps.equalize import equalize
from eptq_onnx.steps.equalize import needed_bytes as equalization_bytes
from eptq_onnx.steps.estimate import multiplications, seconds_a_pass, seconds_an_operation
from eptq_onnx.steps.guard import FLOAT_PASSES as GUARD_PASSES
from eptq_onnx.steps.guard import SAMPLES as GUARD_SAMPLES
from eptq_onnx.steps.guard import sensitive_activations
from eptq_onnx.steps.normalize import normalize
from eptq_onnx.steps.optimize import FLOAT_PASSES as STEP_PASSES
from eptq_onnx.steps.optimize import layer_attention, optimize, split
from eptq_onnx.steps.optimize import needed_bytes as optimization_bytes
from eptq_onnx.steps.plan import plan as make_plan
from eptq_onnx.steps.ranges import weight_ranges
from eptq_onnx.steps.rotate import needed_bytes as rotation_bytes
from eptq_onnx.steps.rotate import rotate
from eptq_onnx.steps.score import FLOAT_PASSES as PROBE_PASSES
from eptq_onnx.steps.score import score
from eptq_onnx.steps.soften import soften
from eptq_onnx.steps.verify import verify
from eptq_onnx.steps.write import write
from eptq_onnx.targets import Target
from eptq_onnx.types import Calibration, Estimate, OptimizationTrace, Plan, Rounding, Scores, Verification


class Progress(Protocol):
    """Called as the work goes on: step, units done, units in all, a word on how it goes."""

    def __call__(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Take note."""
        ...


_WALKED = 1024
"""At most so many samples are rounded on, layer by layer, if no more are scored."""
_SHARE_OF_MEMORY = 0.9
"""Of the machine's, that a large model's work may take where nothing else is said."""


def _silent(step: str, done: int, total: int, detail: str = "") -> None:
    return None


@dataclass(frozen=True)
class Result:
    """The quantized model and what was done to get it.

    Parameters
    ----------
    model : ModelProto
    report : Report
    """

    model: ModelProto
    report: Report

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; see `eptq_onnx.graph.io.save`.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        io.save(self.model, path)


def quantize(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    config: Config | None = None,
    *,
    progress: Progress = _silent,
) -> Result:
    """Quantize a float ONNX model with EPTQ.

    Parameters
    ----------
    model : path, bytes or ModelProto
        The float model; never changed.
    data : Source
        Calibration samples without labels: one array per model input, samples along the first axis; or feeds, files, or
        a function that gives them; see `eptq_onnx.readers.opened`.
    config : Config, optional
    progress : callable, optional

    Returns
    -------
    Result

    Raises
    ------
    EptqError
        Its subclasses say what is wrong and what to do; see `eptq_onnx.errors`.
    """
    config = config or Config()
    with custom_operators(config.custom_ops), tempfile.TemporaryDirectory(prefix="eptq-onnx-", ignore_cleanup_errors=True) as folder:
        return _quantize(model, data, config, progress, folder)


def _quantize(model: str | os.PathLike[str] | bytes | ModelProto, data: Source, config: Config, progress: Progress, folder: str) -> Result:
    """See `quantize`; ``folder`` is for the weights of a large model."""
    clock, notes = _Clock(), list[str]()
    target = targets.load(config.target)
    engine = engines.make(config.engine) if config.needs_gradients else None
    with clock("normalize"):
        origin, samples, whole = _prepared(model, data, target, config, folder)
        # Planned and written is the whole model; what the samples run of it is calibrated and optimized.
        float_model = flattened(whole)
    with clock("plan"):
        plan = make_plan(whole, target, config)
    given, config = config, _affordable(config, whole, float_model, plan, samples, notes)
    run = _Run(config, target, samples, *_shares(samples, config), clock, progress)
    chosen, walked, tell = run.chosen, run.walked, run.tell
    with clock("estimate"):
        expected = _expected(float_model, plan, run)
    with clock("rotate"):
        whole, rotated, left = rotate(whole, plan, config, tell("rotate"))
        float_model = flattened(whole)
        notes += left
    with clock("calibrate"):
        calibration = calibrate(float_model, plan, samples, config, tell("calibrate"))
    scores: Scores | None = None
    if engine is not None and _wants_scores(config):
        with clock("score"), _noting(notes, "no Hessian scores, plain MSE ranges instead"):
            wanted = _scored_weights(float_model, plan, config)
            scores = score(float_model, plan, samples, chosen, calibration, wanted, engine, config, tell("score"))
    with clock("equalize"):
        whole, scores, equalized = equalize(whole, float_model, plan, samples, scores, config, tell("equalize"))
        float_model = flattened(whole)
    plan, calibration = _ranged(run, whole, float_model, plan, calibration, scores, rescaled=bool(equalized))
    if config.budget is not None:
        with clock("allocate"):
            plan = allocate(float_model, plan, target, samples, walked, calibration, scores, config.budget, config, tell("allocate"))
    with clock("ranges"):
        rounding = weight_ranges(float_model, plan, calibration, scores, config, _ranged_weights(float_model, plan, config))
    if config.start is Start.CLOSED_FORM:
        rounding = _compensated(run, whole, float_model, plan, rounding, scores, notes)
    trace: OptimizationTrace | None = None
    if engine is not None and config.optimizes:
        with clock("optimize"), _noting(notes, "not optimized over the whole network"):
            graph = soften(float_model, plan, rounding, samples, calibration, config, engine)
            notes += [f"no gradient passes {note}" for note in graph.notes]
            notes += [f"weight {name} is not optimized: {why}" for name, why in graph.unreached.items()]
            rounding, trace = optimize(plan, rounding, graph, samples, chosen, calibration, scores, config, partial(_tell_loss, progress))
    with clock("write"):
        marked, stands_for = write(whole, plan, rounding)
        flat, quantized = flattened(marked), sink(marked)
    with clock("verify"):
        verification = verify(float_model, flat, quantized, plan, stands_for, target, samples, run.held, origin.size, tell("verify"))
    notes = [*origin.notes, *notes, *_unscored(scores), *_left_over(calibration, samples, engine)]
    report = Report(
        version=eptq_onnx.__version__,
        model=origin.name,
        target=target.name,
        engine=engine.name if engine else "",
        config=given.model_dump(mode="json"),
        opset=max(opset_of(quantized), origin.opset),
        samples=samples.count,
        unused_samples=calibration.unused_samples,
        layers=_layer_reports(plan, scores, verification, len(chosen)),
        kept_float=plan.kept_float,
        notes=tuple(notes),
        rotated=rotated,
        equalized=equalized,
        optimization=trace,
        verification=verification,
        estimate=expected,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
    )
    return Result(store.load_all(restored(quantized, origin.opset, origin.ir_version)), report)


@dataclass(frozen=True)
class _Run:
    """What does not change from step to step.

    Parameters
    ----------
    config : Config
        As it can be afforded.
    target : Target
    samples : Samples
    chosen, walked, held : ndarray of shape (n_samples,)
        Samples to score and optimize on, to round layer by layer on, and to compare on; see `_shares`.
    clock : _Clock
    progress : Progress
    """

    config: Config
    target: Target
    samples: Samples
    chosen: NDArray[np.int64]
    walked: NDArray[np.int64]
    held: NDArray[np.int64]
    clock: _Clock
    progress: Progress

    def tell(self, step: str) -> Callable[[int, int], None]:
        """What a step calls as its work goes on."""
        return partial(self.progress, step)


@dataclass(frozen=True)
class _Origin:
    """What is told of the model that was given; it is not kept."""

    name: str
    opset: int
    ir_version: int
    size: int
    notes: list[str]


def _prepared(
    model: str | os.PathLike[str] | bytes | ModelProto, data: Source, target: Target, config: Config, folder: str
) -> tuple[_Origin, Samples, ModelProto]:
    """The samples, and the model in normal form."""
    original = io.load(model, folder)
    samples = read(data, original)
    whole = normalize(original, target.opset_for(config.activation_bits), samples)
    name = str(Path(model)) if isinstance(model, (str, os.PathLike)) else original.graph.name
    notes = [*_type_notes(original, config), *_opset_notes(original, whole)]
    return _Origin(name, opset_of(original), original.ir_version, store.model_bytes(original), notes), samples, whole


def _affordable(config: Config, whole: ModelProto, model: ModelProto, plan: Plan, samples: Samples, notes: list[str]) -> Config:
    """The config with a limit for the memory of a large model, and without steps that do not fit into it."""
    if config.max_memory is None and store.folder_of(model) is not None:
        config = config.model_copy(update={"max_memory": ByteSize(_SHARE_OF_MEMORY * psutil.virtual_memory().total)})
    if config.max_memory is None:
        return config
    limit = ByteSize(config.max_memory)
    # A quarter: the model's tensors and the scores are there, too.
    for option, off, wanted, needed, share, what in (
        ("steps", 0, config.optimizes, optimization_bytes(model, plan, samples), 1, "not optimized over the whole network"),
        ("rotate", False, config.rotate, rotation_bytes(whole), 4, "no channels are mixed"),
        ("equalize", False, config.equalize, equalization_bytes(whole, plan), 4, "no channels are scaled"),
    ):
        if wanted and needed > limit // share:
            sizes = [ByteSize(size).human_readable(decimal=True) for size in (needed, limit // share)]
            notes.append(f"{what}: that takes about {sizes[0]} of memory, and {sizes[1]} is the limit")
            config = config.model_copy(update={option: off})
    return config


def _expected(model: ModelProto, plan: Plan, run: _Run) -> Estimate:
    """What the steps will take; it is told."""
    config, samples, chosen = run.config, run.samples, len(run.chosen)
    steps = config.step_count(multiplications(model, plan, samples))
    # A second calibration follows on scores, and on channels that were scaled.
    passes = CALIBRATION_PASSES * samples.count * (2 if _wants_scores(config) or config.equalize else 1)
    passes += PROBE_PASSES * config.probes * chosen * _wants_scores(config) + STEP_PASSES * steps * min(config.batch_size, chosen)
    passes += GUARD_PASSES * min(chosen, GUARD_SAMPLES) * (config.max_noise > 0)
    passes += ALLOCATION_SAMPLES * len(plan.layers) * (config.budget is not None)
    algebra = 0.0
    if config.start is Start.CLOSED_FORM:
        passes += WALK_PASSES * len(run.walked)
        algebra = operations(model, plan, config) * seconds_an_operation()
    expected = Estimate(passes * seconds_a_pass(model, plan, samples, config) + algebra, steps)
    run.progress("estimate", 1, 1, f"preset {config.preset.value}: {expected}")
    return expected


def _shares(samples: Samples, config: Config) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Samples to score and optimize on, to round layer by layer on, and to compare on; the last are not among the second."""
    alike = samples.alike()
    chosen = alike[spread(len(alike), config.score_samples)]
    held = chosen[split(len(chosen), config.holdout, config.seed)[1]]
    # Gradients cost more, and want fixed shapes: layers are rounded on more samples, and on those of all sizes.
    walked = np.setdiff1d(spread(samples.count, max(_WALKED, config.score_samples)), held)
    return chosen, walked if len(walked) else chosen, held


def _ranged(
    run: _Run,
    whole: ModelProto,
    model: ModelProto,
    plan: Plan,
    calibration: Calibration,
    scores: Scores | None,
    *,
    rescaled: bool,
) -> tuple[Plan, Calibration]:
    """Ranges that know the scores, and the channels as they are now; and a plan without what would spoil the outputs all the same."""
    config, samples, clock = run.config, run.samples, run.clock
    channels = scores.channels if scores is not None else None
    again = partial(calibrate, model, samples=samples, config=config, progress=run.tell("recalibrate"), scores=channels)
    if rescaled or scores is not None:
        with clock("recalibrate"):
            calibration = again(plan, known={} if rescaled else calibration.activations)
    with clock("guard"):
        quantized = partial(_with_activations, whole, plan, calibration)
        sensitive = sensitive_activations(model, plan, quantized, samples, run.chosen, calibration, config, run.tell("guard"))
        if not sensitive:
            return plan, calibration
        former, plan = plan, make_plan(whole, run.target, config, sensitive)
        if not set(plan.activations) <= set(former.activations):
            # What is left of a group may want another range.
            calibration = again(plan, known=calibration.activations)
    return plan, calibration


def _compensated(
    run: _Run, whole: ModelProto, model: ModelProto, plan: Plan, rounding: Rounding, scores: Scores | None, notes: list[str]
) -> Rounding:
    """The closed-form start; what it left as it was is noted."""
    with run.clock("closed form"):
        nearest = flattened(write(whole, plan, rounding)[0])
        progress = run.tell("closed form")
        rounding, skipped = closed_form(model, nearest, plan, rounding, run.samples, run.walked, scores, run.config, progress)
    notes.extend(f"{node} keeps nearest rounding: {why}" for node, why in skipped.items())
    return rounding


def _with_activations(whole: ModelProto, plan: Plan, calibration: Calibration, names: Sequence[str]) -> tuple[ModelProto, dict[str, str]]:
    """The float model with the quantizers of some activations, and what stands for a quantized tensor in it."""
    wanted = set(names)
    chosen = tuple(q for q in plan.activations if q.name in wanted)
    plan = replace(plan, layers=(), activations=chosen, integer_nodes={}, absorbed={})
    marked, stands_for = write(whole, plan, Rounding({}, {}, calibration.activations, {}, {}))
    return flattened(marked), stands_for


@contextmanager
def _noting(notes: list[str], consequence: str) -> Iterator[None]:
    """A step that gradients are missing for is left out, and the report says so."""
    try:
        yield
    except GradientError as e:
        notes.append(f"{consequence}: {e}")


def _type_notes(model: ModelProto, config: Config) -> list[str]:
    notes = [f"{name} tensors are computed and stored in float32; inputs and outputs keep their types" for name in other_float_types(model)]
    if config.activation_bits > 8:
        notes.append("no integer kernels are known for 16-bit activations: operators compute in float32 between their quantizers")
    return notes


def _opset_notes(model: ModelProto, readable: ModelProto) -> list[str]:
    own, read = opset_of(model), opset_of(readable)
    if own <= read:
        return []
    return [f"the installed onnxruntime does not run quantized models of opset {own}: the result was made and verified in opset {read}"]


def _unscored(scores: Scores | None) -> list[str]:
    return [f"{node} has no Hessian score: {why}" for node, why in scores.unreached.items()] if scores is not None else []


def _left_over(calibration: Calibration, samples: Samples, engine: Engine | None) -> list[str]:
    count, alike = calibration.unused_samples, len(samples.alike())
    notes = [f"{count} samples are left over: the model takes {samples.fixed_batch} at a time"] if count else []
    if engine is not None and alike < samples.count:
        notes.append(
            f"gradients need fixed shapes: scored and optimized on the {alike} of {samples.count} samples of the most frequent size"
        )
    return notes


def _tell_loss(progress: Progress, done: int, total: int, loss: float) -> None:
    progress("optimize", done, total, f"loss {loss:.4g}")


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wants_scores(config: Config) -> bool:
    return config.weight_range_method is WeightRange.HMSE or (config.optimizes and config.attention is not Attention.NONE)


def _ranged_weights(model: ModelProto, plan: Plan, config: Config) -> set[str]:
    """The weights whose ranges are those that step 5 chooses: the closed form chooses its own."""
    skipped = unsolved(model, plan)
    return {x.weight for x in plan.layers if config.start is not Start.CLOSED_FORM or x.node in skipped}


def _scored_weights(model: ModelProto, plan: Plan, config: Config) -> set[str]:
    return _ranged_weights(model, plan, config) if config.weight_range_method is WeightRange.HMSE else set()


def _layer_reports(plan: Plan, scores: Scores | None, verification: Verification, count: int) -> tuple[LayerReport, ...]:
    weights = layer_attention(plan, scores, count).mean(axis=1) if scores is not None else None
    quantizers = plan.quantizer_of
    return tuple(
        LayerReport(
            node=layer.node,
            op_type=layer.op_type,
            weight_bits=layer.weight_spec.bits,
            weight_range=(layer.weight_spec.qmin, layer.weight_spec.qmax),
            weight_zero_points=not layer.weight_spec.symmetric,
            activation_bits=quantizers[layer.input].spec.bits,
            edge=layer.edge,
            attention=None if weights is None else float(weights[k]),
            sqnr_db=verification.layers[layer.node],
        )
        for k, layer in enumerate(plan.layers)
    )


class _Clock:
    """Times the steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - began, 3)
