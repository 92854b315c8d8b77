"""What a run begins with: the normalized model, its samples, the plan, and the context of all passes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from eptq_onnx import engines, pipeline, targets
from eptq_onnx.config import WITHOUT_SAMPLES, Config, without_samples
from eptq_onnx.data.readers import Source, is_nothing
from eptq_onnx.data.splits import share_out
from eptq_onnx.method.estimate import multiplications
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.numerics.scales import GivenScales
from eptq_onnx.ops import check_roles, executed
from eptq_onnx.outcome import OptimizationTrace
from eptq_onnx.passes.base import Context, Progress, State
from eptq_onnx.prepare import Prepared, counting, keeping, prepare, quantization_notes
from eptq_onnx.records import Plan
from eptq_onnx.runtime import computing_on, custom_operators
from eptq_onnx.targets import Target
from eptq_onnx.training.worth import may_pay
from eptq_onnx.workers import employed

_FEW_SCORED = 64
"""Samples that are scored where the network-wise optimization does not run."""

_MOST_NAMED = 5
"""Most tensors that a note names."""


def silent(step: str, done: int, total: int, detail: object = "") -> None:
    """Progress that nobody looks at."""


@contextmanager
def surroundings(config: Config) -> Iterator[None]:
    """Enter what a run needs around it: workers, threads, a device and custom operators."""
    with (
        employed(config.workers, config.threads),
        custom_operators(config.custom_ops),
        computing_on(config.device),
    ):
        yield


def target_of(name: str) -> Target:
    """Read a target and check that its rows match the operator table."""
    found = targets.load(name)
    check_roles(found)
    return found


@dataclass(frozen=True)
class Start:
    """A run before its first pass.

    Parameters
    ----------
    runner : pipeline.Runner
    prepared : Prepared
    state : State
    ctx : Context
    """

    runner: pipeline.Runner
    prepared: Prepared
    state: State
    ctx: Context


def start(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    given: Config,
    folder: str,
    progress: Progress = silent,
    imagined: int | None = None,
) -> Start:
    """Read and normalize the model, read the samples, and plan.

    Parameters
    ----------
    model : path, bytes or ModelProto
    data : Source
    given : Config
    folder : str
        Temporary folder for the weights of a large model.
    progress : Progress
    imagined : int, optional
        Take as many samples, and repeat those of the data: for an estimate, it matters how many there are.

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    runner = pipeline.Runner(pipeline.PIPELINE)
    target = target_of(given.target)
    target.storage_for(given.storage, given.block)
    target.check_bits(given)
    blind = is_nothing(data)
    options = target.with_widest(without_samples(given) if blind else given)
    chosen = engines.choose(given.engine)
    engine = chosen() if options.needs_gradients else None
    with runner.timed("normalize"):
        prepared = prepare(model, data, target, target.with_widest(given), folder)
        if imagined is not None:
            own = prepared.samples
            prepared = replace(prepared, samples=own.only(np.arange(imagined) % own.count))
        if prepared.origin.recipe or prepared.origin.made_up:
            progress("data", 1, 1, prepared.origin)
        float_model = executed(prepared.model, prepared.found)
        prepared = replace(prepared, samples=prepared.samples.shared())
    with runner.timed("plan"):
        found = prepared.quantization
        options = keeping(options, found)
        dynamic = frozenset() if options.requantize else frozenset(found.dynamic)
        plan = make_plan(prepared.model, target, options, dynamic=dynamic)
        config, state = runner.affordable(
            counting(options, prepared),
            State(prepared.model, float_model, plan, dynamic=dynamic),
            prepared.samples,
        )
        config, state = _worthwhile(config, state)
        fit = targets.fit_of(given.target, target)
        state = state if fit is None else state.noting(fit)
        state = state.noting(WITHOUT_SAMPLES) if blind else state
        state = state.noting(*_encoding_notes(given, plan), *quantization_notes(options, found, plan))
    ctx = Context(
        given=given,
        config=config,
        target=target,
        engine=engine,
        samples=prepared.samples,
        shares=share_out(prepared.samples, config),
        found=prepared.found,
        multiplications=multiplications(float_model, plan, prepared.samples),
        source=model,
        folder=folder,
        float_bytes=prepared.float_bytes,
        rest=prepared.rest,
        progress=progress,
    )
    return Start(runner, prepared, state, ctx)


def _worthwhile(config: Config, state: State) -> tuple[Config, State]:
    """Return the options without network-wise optimization where it does not pay, and the reason as a trace.

    Scores then only weigh ranges and positions, for which few samples do.
    """
    if not config.wants_scores or may_pay(state.plan, config):
        return config, state
    few: dict[str, int] = {} if "score_samples" in config.model_fields_set else {"score_samples": _FEW_SCORED}
    config = config.model_copy(update=few)
    if not config.optimizes:
        return config, state
    why = (
        "not started: next to weights of 7 bits or more, quantized activations cause nearly all of the "
        "noise, which no rounding of weights changes"
    )
    return config.model_copy(update={"steps": 0}), state.changed(trace=OptimizationTrace(reason=why))


def _encoding_notes(config: Config, plan: Plan) -> list[str]:
    """Return what of given ranges is not taken."""
    if config.encodings is None:
        return []
    known, notes = plan.quantizer_of, []
    left = [name for name in config.encodings.ranges if name not in known]
    if left:
        more = f" and {len(left) - _MOST_NAMED} more" if len(left) > _MOST_NAMED else ""
        notes.append(
            f"{len(left)} of {len(config.encodings.ranges)} tensors in the encodings are not quantized here: "
            f"{', '.join(left[:_MOST_NAMED])}{more}"
        )
    kept = sum(isinstance(s.scales, GivenScales) for s in plan.weight_specs.values())
    if (left_out := config.encodings.weights + len(config.encodings.scales) - kept) > 0:
        notes.append(
            f"encodings of weights that are not taken: {left_out} (blocks, zero points, more bits than the "
            "options ask for, or no layer of the target has a weight of this name)"
        )
    return notes
