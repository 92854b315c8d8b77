"""Passes: their interface, their context and the state that they pass on."""

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

from eptq_onnx.config import Config, FloatType
from eptq_onnx.data.samples import Samples, Selection, spread
from eptq_onnx.data.splits import Shares
from eptq_onnx.diagnosis import Diagnosis
from eptq_onnx.engines.base import Engine
from eptq_onnx.errors import GradientError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph.replay import Replay
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.allocate import Candidates
from eptq_onnx.method.float_fallback import Sensitivity
from eptq_onnx.method.judge import SAMPLES, Limit
from eptq_onnx.method.qdq import write
from eptq_onnx.ops import executed, output_parts
from eptq_onnx.outcome import OptimizationTrace, Speed, Verification
from eptq_onnx.placement import FrontPoint, Placement
from eptq_onnx.records import Calibration, Network, Plan, Rounding, Scores
from eptq_onnx.targets import Target
from eptq_onnx.workdir import Partial

_WALKED = 1024
"""Largest number of samples for layer-wise work, unless more are scored."""
UNSET: Any = None
"""What a field of `State` holds until a pass provides it."""


class Progress(Protocol):
    """Callback for progress: pass, units done, total units, and a detail to show.

    The first call is for ``estimate``, whose detail is the `Estimate` of the run; before it comes ``data``
    with an `Origin`, if samples were prepared by a recipe. Other details are text.
    """

    def __call__(self, step: str, done: int, total: int, detail: object = "") -> None:
        """Report progress."""
        ...


@dataclass(frozen=True)
class Context:
    """What stays the same throughout a run.

    Parameters
    ----------
    given : Config
        Options as the user gave them.
    config : Config
        The same, without what does not fit into memory.
    target : Target
    engine : Engine or None
        None if no pass needs gradients.
    samples : Samples
        All samples.
    shares : Shares
        Which samples are used for what.
    found : Replay
        Recorded random draws and choices of the float network.
    multiplications : mapping of str to float
        Multiplications of each layer for one sample, by node.
    source : path, bytes or ModelProto
        The float model as the user gave it.
    folder : str
        Temporary folder for the weights of a large model.
    float_bytes : int
        Size of the float model.
    progress : Progress
    rest : FloatType
        Type of what stays float.
    partial : Partial
        Where the running pass may save its progress.
    expected : float
        Seconds that the run is expected to take.
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
    rest: FloatType = FloatType.FLOAT32
    partial: Partial = field(default_factory=Partial)
    expected: float = 0.0

    @cached_property
    def training(self) -> Samples:
        """Samples used to choose ranges and rounding."""
        return self.samples.only(self.shares.training)

    @cached_property
    def others(self) -> Samples:
        """Samples used to judge and compare results."""
        return self.samples.only(
            np.setdiff1d(np.union1d(self.shares.judged, self.shares.unseen), self.shares.training)
        )

    @cached_property
    def walked(self) -> NDArray[np.int64]:
        """Indices of the samples for layer-wise work.

        There are more of them than scored samples, whose gradients are expensive, and they come in all sizes.
        """
        training = self.shares.training
        return training[
            spread(len(training), max(1, max(_WALKED, self.config.score_samples) // self.samples.rows))
        ]

    @property
    def gradients(self) -> Engine:
        """The gradient engine.

        Raises
        ------
        GradientError
            If there is none.
        """
        if self.engine is None:
            raise GradientError("no engine was chosen.")
        return self.engine

    def samples_of(self, plan: Plan) -> Samples:
        """Return the samples as a plan's network runs them.

        A range that is found in every run is that of one sample, as where the network is used, not that of
        whichever samples share a batch.
        """
        return self.samples.alone() if plan.dynamic else self.samples

    def chosen(self, indices: NDArray[np.int64], plan: Plan | None = None) -> Selection:
        """Select some of the samples, by default as the float network runs them."""
        return Selection(self.samples if plan is None else self.samples_of(plan), indices)

    def executed(self, model: ModelProto, read_as: Mapping[str, str] | None = None) -> ModelProto:
        """Return the part of a model that the samples execute, with recorded draws and choices as inputs."""
        return executed(model, self.found, read_as)

    def tell(self, step: str) -> Callable[[int, int], None]:
        """Return the progress callback of a pass."""
        return partial(self.progress, step)


@dataclass(frozen=True)
class Written:
    """The quantized model before the branches of settled If nodes are restored.

    Parameters
    ----------
    marked : ModelProto
        With settled Ifs still marked; see `eptq_onnx.graph.branches`.
    stands_for : mapping of str to str
        Maps each quantized tensor to the tensor that holds its values.
    """

    marked: ModelProto
    stands_for: Mapping[str, str]


class Judge:
    """Compare roundings with nearest rounding on samples that no rounding has seen.

    Runs the quantized networks. What this takes is computed on first use, once.

    Parameters
    ----------
    state : State
        With the ranges of all weights set.
    ctx : Context
    """

    def __init__(self, state: State, ctx: Context) -> None:
        self._model, self._network, self._nearest, self._ctx = state.model, state.network, state.nearest, ctx

    @cached_property
    def _deviation(self) -> Deviation:
        """Deviation from the float model per sample; its spread shows what is due to chance."""
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
        """Noise of nearest rounding, as the limit for others."""
        parts = self._deviation.parts
        noise = self.noise(self._nearest) if parts else np.zeros((0, 0))
        view = GraphView(self._network.model)
        counted = self._ctx.config.outputs or view.outputs
        of_outputs = [output_parts(view, (output,)) for output in counted]
        joined = {part for found in of_outputs if len(found) > 1 for part in found}
        return Limit(
            noise,
            np.array([p not in self._ctx.found.decisive for p in parts], bool),
            np.array([p in joined for p in parts], bool),
        )

    def noise(self, rounding: Rounding) -> NDArray[np.float64]:
        """Noise of every part of the outputs, for each run."""
        return self.noise_of(*self.written(rounding))

    def noise_of(self, model: ModelProto, read_as: Mapping[str, str]) -> NDArray[np.float64]:
        """Return the noise of a version of the executed network; see `written`."""
        return self._deviation.of_runs(model, read_as)

    def written(self, rounding: Rounding) -> tuple[ModelProto, Mapping[str, str]]:
        """Return the executed quantized model of a rounding, and which tensor holds the values of which."""
        marked, stands_for = write(self._model, self._network.plan, rounding)
        return self._ctx.executed(marked, stands_for), stands_for


@dataclass(frozen=True)
class State:
    """Results of the passes so far; fields are `UNSET` until a pass provides them.

    Parameters
    ----------
    model : ModelProto
        The whole normalized float model, which is planned and written.
    executed : ModelProto
        The part that the samples execute, which is calibrated and optimized.
    plan : Plan
    calibration : Calibration
    scores : Scores or None
        None if the Hessian bound is not needed or not available.
    nearest : Rounding
        All weights rounded to nearest.
    rounding : Rounding
    trace : OptimizationTrace or None
    written : Written
    packed : ModelProto
        The written model with weights as the option ``storage`` says, settled Ifs still marked.
    verification : Verification
    diagnosis : Diagnosis or None
    speed : Speed or None
    rotated, equalized : mapping
        See `eptq_onnx.report.Report`.
    sensitivity : Sensitivity
        Noise of each activation quantizer at the outputs, if it is limited.
    left_float : mapping of str to str
        Tensors kept in floating point because of measurements, each with the reason.
    float_nodes : mapping of str to str
        Nodes kept in floating point because of measurements, each with the reason.
    exact : frozenset of str
        Tensors and nodes around which weights stay float, too.
    dynamic : frozenset of str
        Layers whose inputs are quantized in every run because of measurements.
    placement : Placement or None
        What was chosen by time.
    front : tuple of FrontPoint
        The least noise at several times and sizes of the file, if noise or widths were chosen.
    effects : mapping of str to Candidates
        The noise of every width of every weight, if widths are chosen.
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
    packed: ModelProto = UNSET
    verification: Verification = UNSET
    diagnosis: Diagnosis | None = None
    speed: Speed | None = None
    rotated: Mapping[str, int] = field(default_factory=dict)
    equalized: Mapping[str, float] = field(default_factory=dict)
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    left_float: Mapping[str, str] = field(default_factory=dict)
    float_nodes: Mapping[str, str] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
    dynamic: frozenset[str] = frozenset()
    placement: Placement | None = None
    front: tuple[FrontPoint, ...] = ()
    effects: Mapping[str, Candidates] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def network(self) -> Network:
        """The executed float network with its plan, calibration and scores."""
        return Network(self.executed, self.plan, self.calibration, self.scores)

    def changed(self, **fields: Any) -> State:
        """Return a copy with some fields changed."""
        result = object.__new__(type(self))
        vars(result).update({**vars(self), **fields})
        return result

    def noting(self, *notes: str) -> State:
        """Return a copy with further notes."""
        return self.changed(notes=(*self.notes, *notes)) if notes else self


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a pass.

    Parameters
    ----------
    passes : float
        Float passes: runs of the float network for one sample.
    walks : float
        The same, but layer by layer.
    builds : float
        Sessions of a whole network.
    operations : float
        Multiplications of linear algebra beside those, at the speed of large matrix products.
    values : float
        Values that numpy picks, gathers or counts, on one core.
    steps : int
        Maximum number of network-wise optimization steps.
    pieces : float
        Parts of networks that get a session of their own.
    seconds : float
        Time that depends on neither model nor machine.
    share : float
        Time as a share of that of all other passes, at most.
    """

    passes: float = 0.0
    walks: float = 0.0
    builds: float = 0.0
    operations: float = 0.0
    values: float = 0.0
    steps: int = 0
    pieces: float = 0.0
    seconds: float = 0.0
    share: float = 0.0


class Pass(ABC):
    """A pass: takes a state and returns a new one.

    Attributes
    ----------
    name : str
        Name in progress and report.
    requires, provides : tuple of str
        Fields of `State` that must be set, and those that the pass sets.
    switch : tuple of (str, object), optional
        The option, and its value, that turns the pass off.
    without : str
        How a note describes a result without this pass.
    memory_share : int
        The pass may use this fraction (1/n) of the memory limit; the rest holds results of other passes.
    repeats : bool
        True if the pass is not deterministic: a workdir does not keep its result.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]]
    switch: ClassVar[tuple[str, object] | None] = None
    without: ClassVar[str] = ""
    memory_share: ClassVar[int] = 1
    repeats: ClassVar[bool] = False

    def enabled(self, ctx: Context) -> bool:
        """Return True if the options ask for this pass."""
        return True

    def cost(self, state: State, ctx: Context) -> Cost:
        """Estimate the cost before the first pass runs; zero if negligible."""
        return Cost()

    def memory(self, state: State, samples: Samples) -> int:
        """Estimate the peak memory in bytes before the first pass runs; 0 if it is bounded in another way."""
        return 0

    @abstractmethod
    def run(self, state: State, ctx: Context) -> State:
        """Do the work and return the new state.

        Raises
        ------
        GradientError
            If gradients are not available: the pass is skipped, with a note.
        """
