"""Check a quantized file before it is used: the target's rules, accuracy, kernels, speed, and a score."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eptq_onnx import runtimes, targets
from eptq_onnx.config import Config, Gate
from eptq_onnx.data.readers import Source
from eptq_onnx.data.samples import spread
from eptq_onnx.errors import CapabilityError, ConfigError, InstallError, ModelError
from eptq_onnx.execute.pairing import Pairing, comparisons, within_bytes
from eptq_onnx.graph import io
from eptq_onnx.graph.meaning import meanings
from eptq_onnx.graph.outputs import numbers
from eptq_onnx.numerics.statistics import OutputStatistics
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.ops import executed
from eptq_onnx.outcome import Speed
from eptq_onnx.prepare import Prepared, prepare
from eptq_onnx.report.plain import plain
from eptq_onnx.rules import Lint, Severity, lint
from eptq_onnx.runtimes.base import Verifier, ports_of
from eptq_onnx.runtimes.bench import effort_of
from eptq_onnx.runtimes.speed import latency
from eptq_onnx.scoring import Runnable, evaluate_of, float_model, quantized_model, score_of
from eptq_onnx.targets import Target


@dataclass(frozen=True)
class Verified:
    """What was found out about a quantized file.

    Parameters
    ----------
    target : str
    lint : Lint
    computed_by : str
        What ran the quantized model.
    samples : int
        Samples on which outputs were compared, evenly spread over the data.
    given : int
        Samples of the data.
    outputs : dict of str to OutputStatistics
        How each output differs from the float model's.
    kernels : dict of str to dict of str to int
        Operator to precision to the number of kernels that the target's runtime executes; empty if they are
        unknown.
    speed : Speed or None
    score, float_score : float or None
        Scores of the quantized and of the float model.
    unavailable : tuple of str
        What was not found out, and why.
    failures : tuple of str
        What the file does not meet.
    notes : tuple of str
        How samples were read, and what of that was guessed.
    """

    target: str
    lint: Lint
    computed_by: str
    samples: int
    given: int
    outputs: Mapping[str, OutputStatistics]
    kernels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    speed: Speed | None = None
    score: float | None = None
    float_score: float | None = None
    unavailable: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Return True if the file meets everything."""
        return not self.failures

    def to_json(self) -> str:
        """Return everything as JSON, the verdict under the key ``passed``; infinite ratios are null."""
        return json.dumps(plain({"passed": self.passed, **asdict(self)}), indent=2)


def verify(pair: tuple[Path, Path], data: Source, target: Target, gate: Gate, folder: str) -> Verified:
    """Check a quantized file against its float model.

    Parameters
    ----------
    pair : tuple of two paths
        The float model, and the quantized one.
    data : Source
    target : Target
    gate : Gate
    folder : str
        Temporary folder for the weights of a large model.

    Raises
    ------
    EptqError
        If a file, the data or an option cannot be used, or if the gate asks for what cannot be found out.
    """
    if gate.evaluate is not None:
        evaluate_of(gate.evaluate)  # what cannot be imported is said before anything runs
    found = lint(io.load(pair[1], folder, quantized=True), target)
    prepared = prepare(pair[0], data, target, Config(), folder)
    if prepared.found.draws.places:
        raise ModelError(
            f"{pair[0]} draws random numbers, so its outputs cannot be compared with another file's."
        )
    return _Check(pair, prepared, target, gate).run(found)


class _Check:
    """The steps of `verify`; what they cannot find out is collected in ``unavailable``."""

    def __init__(self, pair: tuple[Path, Path], prepared: Prepared, target: Target, gate: Gate) -> None:
        self._pair, self._target, self._gate = pair, target, gate
        self._prepared, self._samples = prepared, prepared.samples
        every = spread(self._samples.count, gate.samples)
        self._parts = list(self._samples.batches(every, self._samples.fixed_batch or 1))
        if not self._parts:
            raise ConfigError(
                f"the model takes {self._samples.fixed_batch} samples at a time: give at least as many."
            )
        self.unavailable: list[str] = []
        self.failures: list[str] = []

    def run(self, found: Lint) -> Verified:
        """Run all steps."""
        self._judge_rules(found)
        runtime = self._runtime()
        kernels = self._kernels(runtime)
        # A file that the runtime rejects has failed; its outputs are those of the operators' definitions.
        runtime = runtime if kernels is not None else None
        with self._quantized(runtime) as (run, who):
            outputs, samples = self._outputs(run)
            score, float_score = self._scores(run)
        speed = self._speed(runtime)
        return Verified(
            target=self._target.name,
            lint=found,
            computed_by=who,
            samples=samples,
            given=self._samples.count,
            outputs=outputs,
            kernels=kernels or {},
            speed=speed,
            score=score,
            float_score=float_score,
            unavailable=tuple(self.unavailable),
            failures=tuple(self.failures),
            notes=self._prepared.origin.told,
        )

    def _runtime(self) -> Verifier | None:
        """Return the target's runtime, or None with the reason noted."""
        name = self._target.verifier
        if name == "none":
            self.unavailable.append(f"kernels and speed: the target {self._target.name} names no runtime")
            return None
        try:
            found = runtimes.make(name)
        except InstallError as e:
            self.unavailable.append(f"what the runtime of {self._target.name} does: {e}".rstrip("."))
            return None
        fit = targets.fit_of(self._target.name, self._target)
        if fit is not None:
            self.unavailable.append(f"outputs as the target's processors compute them: {fit}")
        return found

    @contextmanager
    def _quantized(self, runtime: Verifier | None) -> Iterator[tuple[Runnable, str]]:
        """Provide what runs the quantized file: the target's runtime, or else the operators' definitions."""
        with quantized_model(self._pair[1], runtime) as (model, who, why):
            if why:
                self.unavailable.append(f"outputs in the runtime of {self._target.name}: {why}")
            yield model, who

    def _judge_rules(self, found: Lint) -> None:
        for severity, count in found.counts.items():
            if count and (severity == Severity.ERROR.value or self._gate.strict):
                rules = ", ".join(sorted({f.rule for f in found.findings if f.severity.value == severity}))
                what = f"{count} {severity}{'s' * (count > 1)}"
                self.failures.append(f"the rules of {found.target} find {what}: {rules}")

    def _outputs(self, run: Runnable) -> tuple[dict[str, OutputStatistics], int]:
        """Compare the outputs on all samples."""
        prepared = self._prepared
        pairing = Pairing(prepared.model, self._samples, self._parts, prepared.found)
        exact = executed(prepared.model, prepared.found.draws)
        reference = within_bytes(pairing.outputs(exact))
        ports = ports_of(io.read_file(self._pair[1]).graph)

        def ours(part: NDArray[np.int64]) -> Feeds:
            feeds = self._samples.take(part)
            values = run(
                {p.name: np.asarray(feeds[p.name]).astype(p.dtype) for p in ports if p.name in feeds}
            )
            missing = [name for name in reference[0] if name not in values]
            if missing:
                raise ModelError(f"{self._pair[1]} has no output {missing[0]}: give two files of one model.")
            return {name: numbers(values[name]) for name in reference[0]}

        results = map(ours, self._parts[: len(reference)])
        compared = comparisons(pairing.pairs(reference, results), meanings(prepared.model))
        statistics = {name: comparison.result() for name, comparison in compared.items()}
        least = self._gate.min_sqnr
        if least is not None:
            self.failures += [
                f"the output {name} has {s.sqnr_db:.2f} dB, less than {least:g} dB"
                for name, s in statistics.items()
                if s.sqnr_db < least
            ]
        return statistics, pairing.samples_of(len(reference))

    def _scores(self, run: Runnable) -> tuple[float | None, float | None]:
        """Return the scores of both models; None without a function that scores."""
        if self._gate.evaluate is None:
            return None, None
        evaluate = evaluate_of(self._gate.evaluate)
        scores = score_of(evaluate, run, finite=False), score_of(evaluate, float_model(self._pair[0]))
        least = self._gate.min_score
        if not np.isfinite(scores[0]):
            self.failures.append(f"the score is {scores[0]}, where the float model's is {scores[1]:.4g}")
        elif least is not None and not scores[0] >= least:
            self.failures.append(f"the score is {scores[0]:.4g}, less than {least:g}")
        return scores

    def _kernels(self, runtime: Verifier | None) -> dict[str, dict[str, int]] | None:
        """Count the kernels of the target's operators by precision; None if the runtime rejects the file."""
        if runtime is None:
            return {}
        wanted = self._target.that_run("layer", "arithmetic")
        try:
            kernels = runtime.kernels(self._pair[1], self._samples.take(self._parts[0]))
        except CapabilityError as e:
            self.unavailable.append(f"kernels: {e}".rstrip("."))
            return {}
        except ModelError as e:
            self.failures.append(str(e).rstrip("."))
            return None
        counts = Counter((k.operator, k.precision or "unknown") for k in kernels if k.operator in wanted)
        found: dict[str, dict[str, int]] = defaultdict(dict)
        for (operator, precision), count in sorted(counts.items()):
            found[operator][precision] = count
        return dict(found)

    def _speed(self, runtime: Verifier | None) -> Speed | None:
        """Time both files in the target's runtime."""
        gate, most = self._gate, self._gate.max_slowdown
        if not gate.seconds:
            return None
        speed: Speed | None = None
        if runtime is not None and runtime.measures:
            feeds = self._samples.take(self._parts[0])
            speed = latency(runtime, self._pair, feeds, gate.threads, effort_of(gate.seconds))
        elif most is not None and not self.failures:
            raise CapabilityError(
                f"max_slowdown cannot be checked, because nothing here times models as {self._target.name} "
                "runs them: leave it out, or check where the runtime is installed."
            )
        elif runtime is not None:
            self.unavailable.append(f"speed: {runtime.name} times no models here")
        if speed is not None and most is not None and speed.low > most:
            self.failures.append(
                f"one run takes {speed.ratio:.2f} times as long as the float model's, more than {most:g}"
            )
        return speed
