"""Compare roundings with nearest rounding, by running the networks that they make."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.method.judge import SAMPLES, Limit
from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import Context, State
from eptq_onnx.records import Rounding


class Judge:
    """Compares on samples that no rounding has seen.

    Parameters
    ----------
    state : State
        With nearest rounding.
    ctx : Context
    """

    def __init__(self, state: State, ctx: Context) -> None:
        self._state, self._ctx = state, ctx

    @cached_property
    def _deviation(self) -> Deviation:
        """From the float model, sample by sample: how much samples differ tells what chance does."""
        ctx, size = self._ctx, self._ctx.samples.fixed_batch or 1
        variance = self._state.calibration.variance
        return Deviation(self._state.executed, ctx.samples, ctx.shares.judged, SAMPLES, variance, ctx.config, size)

    @cached_property
    def limit(self) -> Limit:
        """Noise of nearest rounding."""
        parts = self._deviation.parts
        noise = self.noise(self._state.nearest) if parts else np.zeros((0, 0))
        return Limit(noise, np.array([p not in self._ctx.found.decisive for p in parts], bool))

    def noise(self, rounding: Rounding) -> NDArray[np.float64]:
        """Noise of every part of the outputs, run by run."""
        return self._deviation.of_runs(*self.written(rounding))

    def written(self, rounding: Rounding) -> tuple[ModelProto, Mapping[str, str]]:
        """The executed model with a rounding, and what stands for a tensor in it."""
        marked, stands_for = write(self._state.model, self._state.plan, rounding)
        return self._ctx.executed(marked, stands_for), stands_for
