"""The whole road, from a float model to a QDQ model: the one file that sees every step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import ByteSize

import eptq_onnx
from eptq_onnx import engines, scratch, targets
from eptq_onnx.config import Attention, Config, Start, WeightRange
from eptq_onnx.data.notes import sample_notes
from eptq_onnx.data.readers import Source
from eptq_onnx.data.readers import files_of as files_of_data
from eptq_onnx.data.samples import Samples, spread
from eptq_onnx.data.samples import candidates as read_candidates
from eptq_onnx.data.splits import Shares, share_out
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import GradientError, ModelError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.files import check_apart, model_outputs
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import flattened, sink
from eptq_onnx.graph.external import files_of as files_of_model
from eptq_onnx.graph.opsets import restored
from eptq_onnx.graph.replay import Replay
from eptq_onnx.graph.view import opset_of
from eptq_onnx.graph.widen import other_float_types
from eptq_onnx.method.allocate import SAMPLES as ALLOCATION_SAMPLES
from eptq_onnx.method.allocate import allocate
from eptq_onnx.method.arrange import arrange, record
from eptq_onnx.method.calibrate import FLOAT_PASSES as CALIBRATION_PASSES
from eptq_onnx.method.calibrate import calibrate, check_outputs
from eptq_onnx.method.choices import FLOAT_PASSES as SETTLE_PASSES
from eptq_onnx.method.choices import SAMPLES as SETTLE_SAMPLES
from eptq_onnx.method.choices import deciding_activations
from eptq_onnx.method.equalize import equalize
from eptq_onnx.method.equalize import needed_bytes as equalization_bytes
from eptq_onnx.method.estimate import multiplications, seconds_a_pass, seconds_an_operation
from eptq_onnx.method.float_fallback import FLOAT_PASSES as GUARD_PASSES
from eptq_onnx.method.float_fallback import SAMPLES as GUARD_SAMPLES
from eptq_onnx.method.float_fallback import sensitive_activations
from eptq_onnx.method.judge import SAMPLES as JUDGED
from eptq_onnx.method.judge import Limit, better_than_nearest, still_better
from eptq_onnx.method.normalize import normalize, settle
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.reconstruct import FLOAT_PASSES as WALK_PASSES
from eptq_onnx.method.reconstruct import closed_form, operations, unsolved
from eptq_onnx.method.rotate import needed_bytes as rotation_bytes
from eptq_onnx.method.rotate import rotate
from eptq_onnx.method.score import FLOAT_PASSES as PROBE_PASSES
from eptq_onnx.method.score import score
from eptq_onnx.method.verify import Versions, verify
from eptq_onnx.ops import executed
from eptq_onnx.proto import store
from eptq_onnx.records import Calibration, Estimate, OptimizationTrace, Plan, Rounding, Scores, Speed, Verification
from eptq_onnx.report import LayerReport, Report
from eptq_onnx.runtime import Session, custom_operators, newest_readable
from eptq_onnx.runtimes.speed import measure
from eptq_onnx.targets import Target
from eptq_onnx.training.graph import soften
from eptq_onnx.training.loop import FLOAT_PASSES as STEP_PASSES
from eptq_onnx.training.loop import layer_attention, optimize
from eptq_onnx.training.loop import needed_bytes as optimization_bytes


class Progress(Protocol):
    """Called as the work goes on: step, units done, units in all, a word on how it goes.

    Of the step ``estimate``, which comes early and once, the detail is the `Estimate` of the run; of others a string.
    """

    def __call__(self, step: str, done: int, total: int, detail: object = "") -> None:
        """Take note."""
        ...


_WALKED = 1024
"""At most so many samples are rounded on, layer by layer, if no more are scored."""
_MOST_NAMED = 8
"""Tensors that one note names."""
_SHARE_OF_MEMORY = 0.9
"""Of the machine's, that a large model's work may take where nothing else is said."""


def _silent(step: str, done: int, total: int, detail: object = "") -> None:
    return None


@dataclass(frozen=True)
class Result:
    """The quantized model and what was done to get it.

    Parameters
    ----------
    model : ModelProto
    report : Report
    inputs : tuple of (str, path)
        The files that the run read, each with what it is.
    """

    model: ModelProto
    report: Report
    inputs: tuple[tuple[str, Path], ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; see `eptq_onnx.graph.io.save`.

        Raises
        ------
        OutputError
            If it cannot be written, or would overwrite a file that the run read.
        """
        check_apart(model_outputs(path), self.inputs)
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
        a function that gives them; see `eptq_onnx.data.readers.opened`.
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
    inputs = tuple(input_files(model, data, config))
    with custom_operators(config.custom_ops), scratch.folder() as folder:
        return replace(_quantize(model, data, config, progress, folder), inputs=inputs)


def input_files(model: str | os.PathLike[str] | bytes | ModelProto, data: Source, config: Config) -> list[tuple[str, Path]]:
    """The files that `quantize` reads, each with what it is: none of them may be overwritten."""
    target = [("the target file", Path(os.path.abspath(config.target)))] if config.target.endswith(".toml") else []
    libraries = [("a custom-operator library", path) for path in config.custom_ops]
    return [*files_of_model(model), *files_of_data(data), *target, *libraries]


def _quantize(model: str | os.PathLike[str] | bytes | ModelProto, data: Source, config: Config, progress: Progress, folder: str) -> Result:
    """See `quantize`; ``folder`` is for the weights of a large model."""
    clock, notes = _Clock(), list[str]()
    target = targets.load(config.target)
    engine = engines.make(config.engine) if config.needs_gradients else None
    with clock("normalize"):
        origin, samples, whole, found = _prepared(model, data, target, config, folder)
        # Planned and written is the whole model; what the samples run of it is calibrated and optimized.
        float_model = executed(whole, found)
    with clock("plan"):
        plan = make_plan(whole, target, config)
    given, config = config, _affordable(config, whole, float_model, plan, samples, notes)
    shares = share_out(samples, config)
    run = _Run(config, target, samples, found, shares, multiplications(float_model, plan, samples), clock, progress)
    scored, walked, tell = shares.scored, run.walked, run.tell
    with clock("estimate"):
        expected = _expected(float_model, plan, run)
    with clock("rotate"):
        whole, rotated, left = rotate(whole, plan, config, tell("rotate"))
        float_model = run.executed(whole)
        notes += left
    with clock("calibrate"):
        check_outputs(float_model, run.others, config)
        calibration = calibrate(float_model, plan, run.training, config, tell("calibrate"))
    scores: Scores | None = None
    if engine is not None and _wants_scores(config):
        with clock("score"), _noting(notes, "no Hessian scores, plain MSE ranges instead"):
            wanted = _scored_weights(float_model, plan, config)
            scores = score(float_model, plan, samples, scored, calibration, wanted, engine, config, tell("score"))
    with clock("equalize"):
        whole, scores, equalized = equalize(whole, float_model, plan, run.training, scores, config, tell("equalize"))
        float_model = run.executed(whole)
    plan, calibration = _ranged(run, whole, float_model, plan, calibration, scores, notes, rescaled=bool(equalized))
    if config.budget is not None:
        with clock("allocate"):
            plan = allocate(float_model, plan, target, samples, walked, calibration, scores, config.budget, config, tell("allocate"))
    with clock("ranges"):
        nearest = weight_ranges(float_model, plan, calibration, scores, config)
    judge = _Judge(run, whole, float_model, plan, calibration, nearest)
    rounding = nearest
    if config.start is Start.CLOSED_FORM:
        rounding = _compensated(run, judge, rounding, scores, notes)
    rounding, trace = _optimized(run, judge, rounding, scores, engine, notes)
    with clock("write"):
        marked, stands_for = write(whole, plan, rounding)
    with clock("verify"):
        versions = Versions(whole, marked, stands_for)
        verification = verify(versions, plan, target, samples, shares, found, origin.size, tell("verify"))
    quantized = sink(marked)
    speed = _speed(run, model, quantized, folder, notes)
    notes = [
        *origin.notes,
        *notes,
        *_unscored(scores),
        *_not_finite(calibration),
        *_left_over(calibration, samples, engine),
        *verification.notes,
    ]
    report = Report(
        version=eptq_onnx.__version__,
        model=origin.name,
        target=target.name,
        engine=engine.name if engine else "",
        config=given.model_dump(mode="json"),
        opset=max(opset_of(quantized), origin.opset),
        samples=samples.count,
        unused_samples=calibration.unused_samples,
        batching=samples.layout,
        layers=_layer_reports(plan, scores, verification, len(scored)),
        kept_float=plan.kept_float,
        notes=tuple(notes),
        rotated=rotated,
        equalized=equalized,
        optimization=trace,
        verification=verification,
        speed=speed,
        estimate=expected,
        seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
    )
    return Result(store.load_all(_final(quantized, origin)), report)


@dataclass(frozen=True)
class _Run:
    """What does not change from step to step.

    Parameters
    ----------
    config : Config
        As it can be afforded.
    target : Target
    samples : Samples
        All.
    found : Replay
        What the float network draws and chooses.
    shares : Shares
        Which samples do what.
    multiplications : mapping of str to float
        Of each layer, by node, for one sample.
    clock : _Clock
    progress : Progress
    """

    config: Config
    target: Target
    samples: Samples
    found: Replay
    shares: Shares
    multiplications: Mapping[str, float]
    clock: _Clock
    progress: Progress

    @cached_property
    def training(self) -> Samples:
        """What ranges and rounding are chosen on."""
        return self.samples.only(self.shares.training)

    @cached_property
    def others(self) -> Samples:
        """What results are judged and compared on."""
        return self.samples.only(np.setdiff1d(np.union1d(self.shares.judged, self.shares.unseen), self.shares.training))

    @cached_property
    def walked(self) -> NDArray[np.int64]:
        """Samples to round layer by layer on: more than gradients are taken on, which cost more, and of all sizes."""
        training = self.shares.training
        return training[spread(len(training), max(1, max(_WALKED, self.config.score_samples) // self.samples.rows))]

    def executed(self, model: ModelProto, read_as: Mapping[str, str] | None = None) -> ModelProto:
        """What the samples run of a model."""
        return executed(model, self.found, read_as)

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
) -> tuple[_Origin, Samples, ModelProto, Replay]:
    """The samples, the model in normal form, and what the float network draws and chooses for them."""
    original = io.load(model, folder)
    candidates = read_candidates(data, original, config.batch_axes)
    plain = normalize(original, target.opset_for(config.activation_bits))
    arranged = arrange(plain, candidates, config.seed)
    whole = settle(plain, arranged.samples)
    samples, found, left = record(flattened(whole), arranged.samples, config.seed)
    name = str(Path(model)) if isinstance(model, (str, os.PathLike)) else original.graph.name
    notes = [*sample_notes(arranged.samples), *_type_notes(original, config), *_opset_notes(original, whole), *arranged.notes, *left]
    return _Origin(name, opset_of(original), original.ir_version, store.model_bytes(original), notes), samples, whole, found


def _final(quantized: ModelProto, origin: _Origin) -> ModelProto:
    """The verified model in the opset and IR version of the original; onnxruntime loads it, if it reads that opset at all."""
    newest = newest_readable()
    result = restored(quantized, origin.opset, origin.ir_version, *newest)
    if result is not quantized and opset_of(result) <= newest[0]:
        Session(result, optimize=False)
    return result


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
    config, samples, chosen = run.config, run.samples, len(run.shares.scored)
    steps = config.step_count(sum(run.multiplications.values()))
    wants_scores = _wants_scores(config)
    count = len(run.shares.training)
    # Passes of the float network over a sample; a second calibration follows on scores, and on channels that were scaled.
    passes = {
        "calibrate": CALIBRATION_PASSES * count,
        "score": PROBE_PASSES * config.probes * chosen * wants_scores,
        "recalibrate": CALIBRATION_PASSES * count * (wants_scores or config.equalize),
        "guard": GUARD_PASSES * min(chosen, GUARD_SAMPLES) * (config.max_noise > 0),
        "settle": SETTLE_PASSES * min(len(run.walked), SETTLE_SAMPLES) * any(not p.draws for p in run.found.places),
        "allocate": ALLOCATION_SAMPLES * len(plan.layers) * (config.budget is not None),
        "closed form": WALK_PASSES * len(run.walked) * (config.start is Start.CLOSED_FORM),
        "optimize": STEP_PASSES * steps * min(max(1, config.batch_size // samples.rows), chosen),
    }
    pace = seconds_a_pass(model, plan, samples, config)
    shares = {step: pace * n for step, n in passes.items()}
    if config.start is Start.CLOSED_FORM:
        shares["closed form"] += operations(model, plan, config) * seconds_an_operation()
    expected = Estimate(sum(shares.values()), steps, shares)
    run.progress("estimate", 1, 1, expected)
    return expected


def _ranged(
    run: _Run,
    whole: ModelProto,
    model: ModelProto,
    plan: Plan,
    calibration: Calibration,
    scores: Scores | None,
    notes: list[str],
    *,
    rescaled: bool,
) -> tuple[Plan, Calibration]:
    """Ranges that know the scores, and the channels as they are now; and a plan without what would spoil the outputs all the same."""
    config, clock = run.config, run.clock
    channels = scores.channels if scores is not None else None
    again = partial(calibrate, model, samples=run.training, config=config, progress=run.tell("recalibrate"), scores=channels)
    if rescaled or scores is not None:
        with clock("recalibrate"):
            # No channels of tables are scaled.
            tables = {q.name: calibration.activations[q.name] for q in plan.activations if q.spec.axis is not None}
            calibration = again(plan, known=tables if rescaled else calibration.activations)
    with clock("guard"):
        quantized = partial(_with_activations, run.executed, whole, plan, calibration)
        sensitive = sensitive_activations(model, plan, quantized, run.samples, run.walked, calibration, config, run.tell("guard"))
        reasons = {t: f"quantizing {t} alone would cause noise of {ratio:.1%} of the outputs' power" for t, ratio in sensitive.items()}
    former = plan
    made: dict[frozenset[str], tuple[Plan, Calibration]] = {}

    def without(deciding: Mapping[str, str]) -> tuple[Plan, Calibration]:
        """A plan in which further tensors stay float."""
        key = frozenset(deciding)
        if key not in made:
            left = {**reasons, **deciding}
            plan = make_plan(whole, run.target, config, left) if left else former
            # What is left of a group may want another range.
            kept = set(plan.activations) <= set(former.activations)
            made[key] = plan, calibration if kept else again(plan, known=calibration.activations)
        return made[key]

    with clock("settle"):
        rounding: Rounding | None = None

        def rounded(deciding: Mapping[str, str]) -> tuple[ModelProto, dict[str, str]]:
            nonlocal rounding
            plan, calibration = without(deciding)
            rounding = rounding or weight_ranges(model, plan, calibration, scores, config)
            return write(whole, plan, replace(rounding, activations=calibration.activations))

        plan, walked = without({})[0], run.samples.only(run.walked)
        deciding, note = deciding_activations(whole, plan, rounded, walked, run.multiplications, run.found, run.tell("settle"))
        notes += [note] if note else []
        return without(deciding)


class _Judge:
    """Compares roundings with nearest rounding, on samples that none of them has seen."""

    def __init__(self, run: _Run, whole: ModelProto, model: ModelProto, plan: Plan, calibration: Calibration, nearest: Rounding) -> None:
        self.run, self.whole, self.model, self.plan, self.nearest = run, whole, model, plan, nearest
        self.calibration = calibration

    @cached_property
    def deviation(self) -> Deviation:
        """Of the float model, sample by sample: how much they differ tells what chance does."""
        run = self.run
        size = run.samples.fixed_batch or 1
        return Deviation(self.model, run.samples, run.shares.judged, JUDGED, self.calibration.variance, run.config, size)

    @cached_property
    def limit(self) -> Limit:
        """Noise of nearest rounding."""
        parts = self.deviation.parts
        noise = self.noise(self.nearest) if parts else np.zeros((0, 0))
        return Limit(noise, np.array([p not in self.run.found.decisive for p in parts], bool))

    def noise(self, rounding: Rounding) -> NDArray[np.float64]:
        """Of every part of the outputs, run by run."""
        return self.deviation.of_runs(*self.written(rounding))

    def written(self, rounding: Rounding) -> tuple[ModelProto, Mapping[str, str]]:
        """The executed model with a rounding, and what stands for a tensor in it."""
        marked, stands_for = write(self.whole, self.plan, rounding)
        return self.run.executed(marked, stands_for), stands_for

    def confirms(self, start: Rounding, rounding: Rounding) -> bool:
        """True if what the optimization made of its start is no worse than nearest rounding."""
        return still_better(self.noise, self.limit, start, rounding)


def _compensated(run: _Run, judge: _Judge, nearest: Rounding, scores: Scores | None, notes: list[str]) -> Rounding:
    """The closed-form start, as far as it serves; what it left as it was is noted."""
    model, plan = judge.model, judge.plan
    with run.clock("closed form"):
        progress = run.tell("closed form")
        rounded, skipped = closed_form(
            model, judge.written(nearest)[0], plan, nearest, run.samples, run.walked, scores, run.config, progress
        )
        notes.extend(f"{node} keeps nearest rounding: {why}" for node, why in skipped.items())
    with run.clock("choose"):
        rounding, note = better_than_nearest(judge.noise, judge.limit, plan, nearest, rounded, targets=run.config.optimizes)
        notes.extend([note] if note else [])
    return rounding


def _optimized(
    run: _Run, judge: _Judge, start: Rounding, scores: Scores | None, engine: Engine | None, notes: list[str]
) -> tuple[Rounding, OptimizationTrace | None]:
    """What the network-wise optimization makes of its start, if that serves; what stands in its way is noted."""
    config, plan, calibration = run.config, judge.plan, judge.calibration
    rounding, trace = start, None
    if engine is None or not config.optimizes:
        return rounding, trace
    with run.clock("optimize"), _noting(notes, "not optimized over the whole network"):
        graph = soften(judge.model, plan, start, run.samples, calibration, config, engine)
        notes += [f"no gradient passes {note}" for note in graph.notes]
        notes += [f"weight {name} is not optimized: {why}" for name, why in graph.unreached.items()]
        tell = partial(_tell_loss, run.progress)
        scored, held = run.shares.scored, run.shares.held
        rounding, trace = optimize(plan, start, graph, run.samples, scored, held, calibration, scores, config, tell)
        if not judge.confirms(start, rounding):
            notes.append(
                "the start of the optimization is kept: outputs of its result are noisier than those of the start or of nearest rounding"
            )
            rounding, trace = start, replace(trace, best_step=0)
    return rounding, trace


def _speed(
    run: _Run, model: str | os.PathLike[str] | bytes | ModelProto, quantized: ModelProto, folder: str, notes: list[str]
) -> Speed | None:
    """Run time of both models; where it cannot be measured, a note says why."""
    if not run.config.measure_speed:
        return None
    if store.folder_of(quantized) is not None:
        notes.append("speed is not measured: both models together would take too much memory")
        return None
    part = next(run.samples.parts(range(run.samples.count), run.samples.fixed_batch or 1))
    try:
        with run.clock("speed"):
            return measure(io.load(model, folder), quantized, run.samples.take(part), len(part))
    except ModelError as e:
        notes.append(f"speed is not measured: {e}")
        return None


def _with_activations(
    executed: Callable[[ModelProto, Mapping[str, str]], ModelProto],
    whole: ModelProto,
    plan: Plan,
    calibration: Calibration,
    names: Sequence[str],
) -> tuple[ModelProto, dict[str, str]]:
    """The float model with the quantizers of some activations, and what stands for a quantized tensor in it."""
    wanted = set(names)
    chosen = tuple(q for q in plan.activations if q.name in wanted)
    plan = replace(plan, layers=(), activations=chosen, integer_nodes={}, absorbed={})
    marked, stands_for = write(whole, plan, Rounding({}, {}, calibration.activations, {}, {}))
    return executed(marked, stands_for), stands_for


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


def _not_finite(calibration: Calibration) -> list[str]:
    shares = [f"{name} ({share:.2%})" for name, share in calibration.not_finite.items()]
    if not shares:
        return []
    more = f" and {len(shares) - _MOST_NAMED} more" if len(shares) > _MOST_NAMED else ""
    return [f"NaN or infinite values in the float model count in no statistic: {', '.join(shares[:_MOST_NAMED])}{more}"]


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


def _scored_weights(model: ModelProto, plan: Plan, config: Config) -> set[str]:
    """The weights whose Hessian scores decide what is written: the closed form chooses ranges of its own."""
    if config.weight_range_method is not WeightRange.HMSE:
        return set()
    skipped = unsolved(model, plan)
    return {x.weight for x in plan.layers if config.start is not Start.CLOSED_FORM or x.node in skipped}


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
