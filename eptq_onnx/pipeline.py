"""The method as a list of passes, and the runner.

Only the runner deals with time, memory limits, cost estimates and missing gradients.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
from pydantic import ByteSize

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.errors import GradientError
from eptq_onnx.estimates import Estimate
from eptq_onnx.memory import release_freed
from eptq_onnx.method.estimate import A_PIECE, measured
from eptq_onnx.passes.allocate import Allocate
from eptq_onnx.passes.base import Context, Pass, State
from eptq_onnx.passes.calibrate import Calibrate
from eptq_onnx.passes.choices import KeepChoices
from eptq_onnx.passes.diagnose import Diagnose
from eptq_onnx.passes.dynamic import Dynamic
from eptq_onnx.passes.effects import Effects
from eptq_onnx.passes.equalize import Equalize
from eptq_onnx.passes.float_fallback import FloatFallback
from eptq_onnx.passes.measure import Measure
from eptq_onnx.passes.optimize import Optimize
from eptq_onnx.passes.pack import Pack
from eptq_onnx.passes.place import Place
from eptq_onnx.passes.ranges import Ranges
from eptq_onnx.passes.reconstruct import Reconstruct
from eptq_onnx.passes.rest import Rest
from eptq_onnx.passes.rotate import Rotate
from eptq_onnx.passes.score import Score
from eptq_onnx.passes.verify import Verify
from eptq_onnx.passes.write import Write
from eptq_onnx.proto import store
from eptq_onnx.resume import Resume

PIPELINE: tuple[Pass, ...] = (
    Rotate(),
    Score(),
    Equalize(),
    Calibrate(),
    Dynamic(),
    FloatFallback(),
    KeepChoices(),
    Effects(),
    Place(),
    Allocate(),
    Ranges(),
    Reconstruct(),
    Optimize(),
    Write(),
    Pack(),
    Rest(),
    Verify(),
    Diagnose(),
    Measure(),
)
"""The passes that run on a normalized, planned model, in order."""

_LOGGER = logging.getLogger("eptq_onnx")
_SHARE_OF_MEMORY = 0.9
"""Default memory limit of large models, as a fraction of RAM."""


@dataclass
class Runner:
    """Run passes one after the other.

    Parameters
    ----------
    passes : sequence of Pass
    resume : Resume, optional
        Keeps results in a workdir, and takes them from there.
    seconds : dict of str to float
        Time of each pass that ran.
    """

    passes: Sequence[Pass]
    resume: Resume | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def part(self, first: str | None = None, last: str | None = None) -> Runner:
        """Return a runner of the passes from one to another, both included, that times into the same record.

        Parameters
        ----------
        first, last : str, optional
            Names of passes; by default the first and the last of all.
        """
        names = [step.name for step in self.passes]
        begin = 0 if first is None else names.index(first)
        end = len(names) if last is None else names.index(last) + 1
        return Runner(self.passes[begin:end], self.resume, self.seconds)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a block of work."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)

    def affordable(self, config: Config, state: State, samples: Samples) -> tuple[Config, State]:
        """Set the memory limit of a large model, and turn off passes that exceed it, each with a note."""
        if config.max_memory is None and store.is_large(state.executed):
            config = config.model_copy(
                update={"max_memory": ByteSize(_SHARE_OF_MEMORY * psutil.virtual_memory().total)}
            )
        if config.max_memory is None:
            return config, state
        for step in self.passes:
            if step.switch is None or getattr(config, step.switch[0]) == step.switch[1]:
                continue
            limit, needed = (
                ByteSize(config.max_memory // step.memory_share),
                ByteSize(step.memory(state, samples)),
            )
            if needed > limit:
                sizes = [size.human_readable(decimal=True) for size in (needed, limit)]
                state = state.noting(
                    f"{step.without}: that takes about {sizes[0]} of memory, and {sizes[1]} is the limit"
                )
                config = config.model_copy(update=dict([step.switch]))
        return config, state

    def estimate(self, state: State, ctx: Context) -> Estimate:
        """Estimate the run time of each pass and report the total."""
        enabled = self._enabled(ctx)
        known = self.resume.known(enabled, ctx) if self.resume is not None else set()
        costs = {step.name: step.cost(state, ctx) for step in enabled if step.name not in known}
        rates = measured(state.executed, state.plan, ctx.samples, ctx.config)
        shares = dict(self.seconds)
        for name, cost in costs.items():
            shares[name] = (
                rates.a_pass * cost.passes
                + rates.a_walk * cost.walks
                + rates.a_build * cost.builds
                + rates.an_operation * cost.operations
                + rates.a_value * cost.values
                + A_PIECE * cost.pieces
                + cost.seconds
            )
        total = sum(shares.values())
        shares = {name: s + (costs[name].share * total if name in costs else 0) for name, s in shares.items()}
        found = Estimate(
            sum(shares.values()),
            sum(cost.steps for cost in costs.values()),
            {n: s for n, s in shares.items() if s},
        )
        ctx.progress("estimate", 1, 1, found)
        return found

    def run(self, state: State, ctx: Context) -> State:
        """Run all enabled passes.

        Raises
        ------
        EptqError
            From a pass.
        """
        for step in self._enabled(ctx):
            with self.timed(step.name):
                state = self._after(step, state, ctx)
            release_freed()
            _LOGGER.info("%s: %.1f s", step.name, self.seconds[step.name])
        if self.resume is None:
            return state
        taken, state = self.resume.taken, self.resume.loaded(state)
        return state.noting(f"taken from the workdir: {', '.join(taken)}") if taken else state

    def _after(self, step: Pass, state: State, ctx: Context) -> State:
        """Return the state after a pass, from the workdir if it has the result."""
        if self.resume is None:
            return run_pass(step, state, ctx)
        found = self.resume.take(step, state, ctx)
        if found is None:
            return self.resume.run(step, state, ctx, run_pass)
        ctx.progress(step.name, 1, 1, "from the workdir")
        return found

    def _enabled(self, ctx: Context) -> list[Pass]:
        return [step for step in self.passes if step.enabled(ctx)]


def run_pass(step: Pass, state: State, ctx: Context) -> State:
    """Run a pass, or note that it is skipped for lack of gradients."""
    missing = [name for name in step.requires if getattr(state, name) is None]
    if missing:
        raise RuntimeError(f"the pass {step.name} stands before what provides {', '.join(missing)}")
    try:
        return step.run(state, ctx)
    except GradientError as e:
        if not step.without:
            raise
        return state.noting(f"{step.without}: {e}")
