"""What a pass is, what it works on, and what it makes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples, Selection, spread
from eptq_onnx.data.splits import Shares
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import GradientError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph.replay import Replay
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.judge import SAMPLES, Limit
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.ops import executed
from eptq_onnx.records import (
    Calibration,
    Network,
    OptimizationTrace,
    Plan,
    Rounding,
    Scores,
    Speed,
    Verification,
)
from eptq_onnx.targets import Target
from eptq_onnx.workdir import Partial

_WALKED = 1024
"""Largest number of samples for layer-wise work, unless more are scored."""
UNSET: Any = None
"""What a field of `State` holds until a pass provides it."""


class Progress(Protocol):
    """Called as the work goes on: pass, units done, units in all, a word on how it goes.

    Of ``estimate``, which comes early and once, the detail is the `Estimate` of the run; of others a string.
    """

    def __call__(self, step: str, done: int, total: int, detail: object = "") -> None:
        """Take note."""
        ...


@dataclass(frozen=True)
class Context:
    """What no pass changes.

    Parameters
    ----------
    given : Config
        As the user gave it.
    config : Config
        As the machine's memory allows it.
    target : Target
    engine : Engine or None
        None if no pass needs gradients.
    samples : Samples
        All.
    shares : Shares
        Which samples do what.
    found : Replay
        What the float network drew and chose.
    multiplications : mapping of str to float
        Of each layer, by node, for one sample.
    source : path, bytes or ModelProto
        The float model as it was given.
    folder : str
        For the weights of a large model.
    float_bytes : int
        Size of the float model.
    progress : Progress
    partial : Partial
        Where the pass that runs may keep its work while it goes on.
    """

    given: Config
    config: Config
    target: Target
    engine: Engine | None
    samples: Samples
    shares: Shares
    found: Replay
    multiplications: Mapping[str, float]
    source: str | os.PathLike[str] | bytes | ModelProto
    folder: str
    float_bytes: int
    progress: Progress
    partial: Partial = field(default_factory=Partial)

    @cached_property
    def training(self) -> Samples:
        """The samples on which ranges and rounding are chosen."""
        return self.samples.only(self.shares.training)

    @cached_property
    def others(self) -> Samples:
        """The samples on which results are judged and compared."""
        return self.samples.only(
            np.setdiff1d(np.union1d(self.shares.judged, self.shares.unseen), self.shares.training)
        )

    @cached_property
    def walked(self) -> NDArray[np.int64]:
        """The samples for layer-wise work: more than gradients are taken on, which cost more, and of all
        sizes."""
        training = self.shares.training
        return training[
            spread(len(training), max(1, max(_WALKED, self.config.score_samples) // self.samples.rows))
        ]

    @property
    def gradients(self) -> Engine:
        """The engine, for passes that need one.

        Raises
        ------
        GradientError
            If none was chosen.
        """
        if self.engine is None:
            raise GradientError("no engine was chosen.")
        return self.engine

    def chosen(self, indices: NDArray[np.int64]) -> Selection:
        """Some of the samples."""
        return Selection(self.samples, indices)

    def executed(self, model: ModelProto, read_as: Mapping[str, str] | None = None) -> ModelProto:
        """What the samples run of a model."""
        return executed(model, self.found, read_as)

    def tell(self, step: str) -> Callable[[int, int], None]:
        """What a function calls as its work goes on."""
        return partial(self.progress, step)


@dataclass(frozen=True)
class Written:
    """The quantized model as it was put together.

    Parameters
    ----------
    marked : ModelProto
        With settled Ifs still marked; see `eptq_onnx.graph.branches`.
    stands_for : mapping of str to str
        Quantized tensor to the tensor that holds its values.
    """

    marked: ModelProto
    stands_for: Mapping[str, str]


class Judge:
    """Compares roundings with nearest rounding by running the networks that they make, on samples that no
    rounding has seen.

    What it needs for that is computed when it is first asked, and once.

    Parameters
    ----------
    state : State
        With the ranges of all weights.
    ctx : Context
    """

    def __init__(self, state: State, ctx: Context) -> None:
        self._model, self._network, self._nearest, self._ctx = state.model, state.network, state.nearest, ctx

    @cached_property
    def _deviation(self) -> Deviation:
        """From the float model, sample by sample: how much samples differ tells what chance does."""
        ctx, network = self._ctx, self._network
        size = ctx.samples.fixed_batch or 1
        return Deviation(
            network.model,
            ctx.samples,
            ctx.shares.judged,
            SAMPLES,
            network.calibration.variance,
            ctx.config,
            size,
        )

    @cached_property
    def limit(self) -> Limit:
        """Noise of nearest rounding."""
        parts = self._deviation.parts
        noise = self.noise(self._nearest) if parts else np.zeros((0, 0))
        return Limit(noise, np.array([p not in self._ctx.found.decisive for p in parts], bool))

    def noise(self, rounding: Rounding) -> NDArray[np.float64]:
        """Noise of every part of the outputs, run by run."""
        return self._deviation.of_runs(*self.written(rounding))

    def written(self, rounding: Rounding) -> tuple[ModelProto, Mapping[str, str]]:
        """The executed model with a rounding, and what stands for a tensor in it."""
        marked, stands_for = write(self._model, self._network.plan, rounding)
        return self._ctx.executed(marked, stands_for), stands_for


@dataclass(frozen=True)
class State:
    """What the passes have made so far. Fields are `UNSET` before a pass provides them.

    Parameters
    ----------
    model : ModelProto
        The whole float model, normalized: what is planned and written.
    executed : ModelProto
        What the samples run of it: what is calibrated and optimized.
    plan : Plan
    calibration : Calibration
    scores : Scores or None
        None where the Hessian bound is not wanted or cannot be had.
    nearest : Rounding
        All weights rounded to nearest.
    rounding : Rounding
    trace : OptimizationTrace or None
    written : Written
    verification : Verification
    speed : Speed or None
    rotated, equalized : mapping
        See `eptq_onnx.report.Report`.
    left_float : mapping of str to str
        Tensors that measurements want in floating point, each with the reason.
    notes : tuple of str
    """

    model: ModelProto
    executed: ModelProto
    plan: Plan
    calibration: Calibration = UNSET
    scores: Scores | None = None
    nearest: Rounding = UNSET
    rounding: Rounding = UNSET
    trace: OptimizationTrace | None = None
    written: Written = UNSET
    verification: Verification = UNSET
    speed: Speed | None = None
    rotated: Mapping[str, int] = field(default_factory=dict)
    equalized: Mapping[str, float] = field(default_factory=dict)
    left_float: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def network(self) -> Network:
        """The float network and what is known of it."""
        return Network(self.executed, self.plan, self.calibration, self.scores)

    def changed(self, **fields: Any) -> State:
        """The same with some fields changed."""
        result = object.__new__(type(self))
        vars(result).update({**vars(self), **fields})
        return result

    def noting(self, *notes: str) -> State:
        """The same with further notes."""
        return self.changed(notes=(*self.notes, *notes)) if notes else self


@dataclass(frozen=True)
class Cost:
    """What a pass costs.

    Parameters
    ----------
    passes : float
        Runs of the float network, for one sample each.
    operations : float
        Multiplications beside them, as fast as those of large matrix products.
    steps : int
        Of the network-wise optimization, at most.
    """

    passes: float = 0.0
    operations: float = 0.0
    steps: int = 0


class Pass(ABC):
    """One pass: it makes a new state of the one before.

    Attributes
    ----------
    name : str
        As progress and the report call it.
    requires, provides : tuple of str
        Fields of `State` that it reads, which must be set, and those that it sets.
    switch : tuple of (str, object), optional
        The option that leaves it out, and its value for that.
    without : str
        What a result without this pass is called in a note.
    memory_share : int
        A pass may take one part in so many of the memory limit: the rest holds what other passes left.
    repeats : bool
        True if the same pass makes something else each time: its result is not kept in a workdir.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]]
    switch: ClassVar[tuple[str, object] | None] = None
    without: ClassVar[str] = ""
    memory_share: ClassVar[int] = 1
    repeats: ClassVar[bool] = False

    def enabled(self, ctx: Context) -> bool:
        """True if the options ask for this pass."""
        return True

    def cost(self, state: State, ctx: Context) -> Cost:
        """What it will take, told before the first pass runs; nothing where it is too little to tell."""
        return Cost()

    def memory(self, state: State, samples: Samples) -> int:
        """Bytes that it takes, told before the first pass runs; 0 where it is bounded otherwise."""
        return 0

    @abstractmethod
    def run(self, state: State, ctx: Context) -> State:
        """Do the work.

        Raises
        ------
        GradientError
            If it needs gradients that there are not: it is left out, with a note.
        """


def leave_float(state: State, ctx: Context, tensors: Mapping[str, str]) -> State:
    """The state with a plan in which further tensors stay float, each for its reason."""
    if not tensors:
        return state
    left = {**state.left_float, **tensors}
    plan = make_plan(state.model, ctx.target, ctx.config, left)
    calibration = state.calibration
    if not set(plan.activations) <= set(state.plan.activations):
        # What is left of a group may want another range.
        channels = state.scores.channels if state.scores is not None else None
        tell = ctx.tell("recalibrate")
        calibration = calibrate(
            state.executed,
            plan,
            ctx.training,
            ctx.config,
            tell,
            scores=channels,
            known=calibration.activations,
        )
    return state.changed(plan=plan, calibration=calibration, left_float=left)
