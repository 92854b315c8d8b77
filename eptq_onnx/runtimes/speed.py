"""Measure whether one model is faster than another in a runtime, and which operators take the time.

The models run in turn, so that other load on the machine affects both. The ratio is the median over pairs of
measurements, and its confidence interval shows whether the difference is more than noise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eptq_onnx.errors import ModelError
from eptq_onnx.graph.view import QUANTIZERS
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.outcome import OperatorTime, Pace, Speed
from eptq_onnx.runtimes.base import Kernel, Model, NodeTime, Timed, Verifier

_FEWEST = 10
"""Minimum number of pairs: the range of fewer values encloses the median with too little confidence."""
_TAIL = 0.001
"""Probability that the median lies beyond one end of its interval.

It is small because the interval is tested again after every pair.
"""
_TURN, _REPEATS = 0.02, 20
"""Approximate seconds of one model's turn, and the maximum number of runs in it.

Only the fastest run counts, because slower runs were interrupted.
"""
_OF_RUNS, SECONDS = 1.5, 1.5
"""Most seconds of all runs together; seconds of the whole comparison with sessions and profiles, about."""
_MARGIN = 1.05
"""A ratio within this factor of 1 makes no difference to a user."""


@dataclass(frozen=True)
class Effort:
    """How long two models are compared.

    Parameters
    ----------
    longest_run : float
        Maximum seconds of one run; slower models are not measured.
    seconds : float
        Time limit of all runs together; the last pair may exceed it.
    pairs : int
        Maximum number of pairs.
    decided : bool
        True to stop as soon as the interval shows which model is faster, or that neither is.
    advice : str
        End of the error for a slower model.
    """

    longest_run: float = 2.0
    seconds: float = _OF_RUNS
    pairs: int = 41
    decided: bool = True
    advice: str = ""


BRIEF = Effort()
"""The default effort, at the end of a quantization: a second or two."""


def measure(verifier: Verifier, pair: tuple[Model, Model], feeds: Feeds, samples: int) -> Speed:
    """Time both models in turn on all cores, for a second or two.

    Parameters
    ----------
    verifier : Verifier
    pair : tuple of two models
        The original and the written model.
    feeds : dict of str to ndarray
        Feeds of one run.
    samples : int
        Samples in these feeds.

    Raises
    ------
    ModelError
        If the runtime rejects a model, or if one run takes longer than `Effort.longest_run`.
    """
    speed = replace(latency(verifier, pair, feeds, threads=0), samples=samples)
    # Operators are profiled in separate sessions, because profiling slows a session down.
    return speed if speed.pace is Pace.FASTER else by_operator(verifier, pair, feeds, speed, threads=0)


def latency(
    verifier: Verifier, pair: tuple[Model, Model], feeds: Feeds, threads: int, effort: Effort = BRIEF
) -> Speed:
    """Load both models and time them in turn; see `compare`."""
    with verifier.load(pair[0], threads) as exact, verifier.load(pair[1], threads) as quantized:
        return compare((exact.bind(feeds), quantized.bind(feeds)), 1, effort)


def by_operator(
    verifier: Verifier, pair: tuple[Model, Model], feeds: Feeds, speed: Speed, threads: int
) -> Speed:
    """Add the time of each kind of operator to a comparison."""
    exact, quantized = (operator_seconds(verifier.profile(model, feeds, threads)) for model in pair)
    return replace(speed, operators=operator_times(exact, quantized))


def compare(
    pair: tuple[Timed, Timed],
    samples: int,
    effort: Effort = BRIEF,
) -> Speed:
    """Time two functions in turn.

    Parameters
    ----------
    pair : tuple of two callables
        The first runs the float model once, the second the quantized model; each returns its seconds.
    samples : int
        Samples per run.
    effort : Effort

    Raises
    ------
    ModelError
        If one run takes longer than `Effort.longest_run`.
    """
    longest = 0.0
    for run in pair:
        first = run()  # allocates memory and packs weights
        second = run() if first < effort.longest_run else first
        if second > effort.longest_run:
            raise ModelError(
                f"one run takes {second:.1f} s, and the limit is {effort.longest_run:g} s{effort.advice}"
            )
        longest = max(longest, second)
    # Both models get the same number of runs, because the minimum over more runs is smaller.
    repeats = min(_REPEATS, math.ceil(_TURN / max(longest, 1e-9)))
    times: list[tuple[float, float]] = []
    spent = 0.0
    while len(times) < _FEWEST or (
        len(times) < effort.pairs
        and spent < effort.seconds
        and not (effort.decided and _pace(*_interval(times)) is not None)
    ):
        turns = list(enumerate(pair))
        seconds = [0.0, 0.0]
        # The order alternates, so that a drift (of the clock frequency, for example) favours neither model.
        for k, run in turns if len(times) % 2 == 0 else reversed(turns):
            # The first run is a warm-up: the other session's threads still spin, its weights fill the caches.
            runs = [run() for _ in range(repeats + 1)]
            seconds[k] = max(min(runs[1:]), 1e-9)
            spent += sum(runs)
        times.append((seconds[0], seconds[1]))
    low, high = _interval(times)
    medians = np.median(np.array(times), axis=0)
    return Speed(
        pace=_pace(low, high) or Pace.SAME,
        float_seconds=float(medians[0]),
        quantized_seconds=float(medians[1]),
        ratio=float(np.median([q / f for f, q in times])),
        low=low,
        high=high,
        pairs=len(times),
        samples=samples,
    )


def _interval(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the confidence interval of the median ratio.

    Its ends are order statistics that enclose the median with a confidence of at least 99.8 %.
    """
    ratios = sorted(q / f for f, q in times)
    n, left, tail = len(ratios), 0, 0.5 ** len(ratios)
    while left + 1 < n / 2 and tail + math.comb(n, left + 1) * 0.5**n <= _TAIL:
        left += 1
        tail += math.comb(n, left) * 0.5**n
    return ratios[left], ratios[n - 1 - left]


def _pace(low: float, high: float) -> Pace | None:
    """Return the pace that the interval of the ratio implies; None if it is inconclusive."""
    if low > _MARGIN:
        return Pace.SLOWER
    if high < 1 / _MARGIN:
        return Pace.FASTER
    return Pace.SAME if low >= 1 / _MARGIN and high <= _MARGIN else None


def operator_seconds(times: Iterable[NodeTime]) -> dict[str, float]:
    """Return the seconds per run of each kind of operator, by `label`."""
    found: dict[str, float] = defaultdict(float)
    for node in times:
        found[label(node.kernel)] += node.seconds
    return dict(found)


def label(kernel: Kernel) -> str:
    """Return the operator that a kernel implements, for a quantizer together with the operators around it.

    These are the producers of what it quantizes, or the readers of what it dequantizes.
    """
    if kernel.operator not in QUANTIZERS:
        return kernel.operator
    both = "/".join(QUANTIZERS)
    if kernel.around is None:
        return both
    if kernel.around:
        return f"{both} around {' and '.join(kernel.around)}"
    return f"{both} at an {'output' if kernel.operator == 'DequantizeLinear' else 'input'}"


def operator_times(exact: Mapping[str, float], quantized: Mapping[str, float]) -> tuple[OperatorTime, ...]:
    """Return both profiles side by side, largest increase first."""
    rows = [
        OperatorTime(name, exact.get(name, 0.0), quantized.get(name, 0.0)) for name in {**exact, **quantized}
    ]
    return tuple(sorted(rows, key=lambda r: (r.float_seconds - r.quantized_seconds, r.operator)))
