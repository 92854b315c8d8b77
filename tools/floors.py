"""CPU time of every pass of a run beside its floor: what the least work that it does takes on this machine.

The floor of a pass is the time of the float passes that it cannot do without, as onnxruntime takes for them,
of its multiplications at the rate of large matrix products, and of the values that it must read, once, at the
bandwidth of memory. Passes without an entry in `FLOORS` have none: what they do is small, or decided as they
go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from eptq_onnx import pipeline
from eptq_onnx.execute.blocks import tensor_bytes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.method.float_fallback import SAMPLES as FALLBACK_SAMPLES
from eptq_onnx.method.reconstruct import work
from eptq_onnx.passes.base import Context, Pass, State

_BANDWIDTH_BYTES = 2**28
"""Bytes that are summed to measure the bandwidth, more than any cache holds."""
_SIDE = 1024
"""Side of the matrix product that is timed."""


@dataclass(frozen=True)
class Work:
    """The least work of a pass.

    Parameters
    ----------
    passes : float
        Runs of the float network for one sample.
    operations : float
        Multiplications.
    bytes : float
        Bytes of activations that it reads, beside those that the network itself reads.
    """

    passes: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0


def _bytes_a_sample(state: State, ctx: Context) -> float:
    size = ctx.samples.micro_batch()
    return tensor_bytes(specialize(state.executed, ctx.samples.two_batches(size))) / size


FLOORS: dict[str, Callable[[State, Context], Work]] = {
    "score": lambda state, ctx: Work(
        len(ctx.shares.training) + 3 * ctx.config.probes * len(ctx.shares.scored)
    ),
    "calibrate": lambda state, ctx: Work(
        len(ctx.shares.training), bytes=len(ctx.shares.training) * _bytes_a_sample(state, ctx)
    ),
    "float fallback": lambda state, ctx: Work(2 * min(len(ctx.walked), FALLBACK_SAMPLES)),
    "reconstruct": lambda state, ctx: Work(
        2 * len(ctx.walked),
        work(state.executed, state.plan, ctx.config, ctx.multiplications, len(ctx.walked))[0],
    ),
    "verify": lambda state, ctx: Work(2 * len(ctx.shares.judged)),
}
"""The least work of each pass: one float and one quantized run where both are compared, and a backward pass
at twice the cost of a forward pass."""


def _least_cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of the fastest of a few calls: other load slows some of them down."""
    taken = []
    for _ in range(5):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def seconds_a_byte() -> float:
    """Return the CPU time to read a byte of memory, in seconds."""
    values = np.ones(_BANDWIDTH_BYTES // 4, np.float32)
    return _least_cpu_seconds(values.sum) / _BANDWIDTH_BYTES


def seconds_an_operation() -> float:
    """Return the CPU time of one multiplication in a large matrix product, in seconds."""
    factor = np.ones((_SIDE, _SIDE), np.float32)
    return _least_cpu_seconds(lambda: np.matmul(factor, factor)) / _SIDE**3


@dataclass(frozen=True)
class Measured:
    """CPU seconds of a pass, and its floor in CPU seconds, or None."""

    seconds: float
    floor: float | None


class Meter:
    """Measures all passes of the runs inside the block.

    Parameters
    ----------
    pass_seconds : float
        CPU seconds of one run of the float network for one sample.
    """

    def __init__(self, pass_seconds: float) -> None:
        self._pass, self._byte = pass_seconds, seconds_a_byte()
        with threadpool_limits(1, "blas"):
            self._operation = seconds_an_operation()
        self._plain = pipeline.run_pass
        self.passes: dict[str, Measured] = {}

    def __enter__(self) -> Meter:
        pipeline.run_pass = self._run
        return self

    def __exit__(self, *error: object) -> None:
        pipeline.run_pass = self._plain

    def _run(self, step: Pass, state: State, ctx: Context) -> State:
        began = time.process_time()
        after = self._plain(step, state, ctx)
        seconds = time.process_time() - began
        floor = None
        if step.name in FLOORS:
            work = FLOORS[step.name](state, ctx)
            floor = work.passes * self._pass + work.operations * self._operation + work.bytes * self._byte
        self.passes[step.name] = Measured(seconds, floor)
        return after
