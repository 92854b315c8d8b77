"""What to try where accuracy fell, and what it is expected to bring: from the figures of the run alone.

The noise of weights and that of activations add up to a good approximation, each bit more of either divides
its part by four, and a part that is left in floating point is gone. What no figure speaks for is not advised.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from eptq_onnx import targets
from eptq_onnx.config import BudgetUnit, Config, Preset
from eptq_onnx.data.splits import ENOUGH
from eptq_onnx.diagnosis import Loud, OutputNoise
from eptq_onnx.errors import ConfigError
from eptq_onnx.report.verdict import FEW_SAMPLES, Assurance
from eptq_onnx.targets import Target

if TYPE_CHECKING:
    from eptq_onnx.report import Report

_LEAST_GAIN = 0.5
"""Gain in dB below which nothing is advised."""
_LEAST_PART = 0.25
"""Share of the noise from which on a part is worth lowering."""
_LOW = 4
"""Bits of weights up to which network-wise optimization gains."""
_LONGER = 3
"""Steps of a longer optimization, relative to those of one that had not ended."""


@dataclass(frozen=True)
class Advice:
    """Something to try.

    Parameters
    ----------
    option : str
        As it is written on the command line.
    why : str
        The figures that speak for it.
    expected_db : float or None
        SQNR in dB that the worst output is expected to keep with it; None if that is not what it changes.
    bound : str
        ``"about"``, ``"at least"`` or ``"at most"``: what the expectation is.
    """

    option: str
    why: str
    expected_db: float | None = None
    bound: Literal["about", "at least", "at most"] = "about"

    @property
    def expected(self) -> str:
        """Return the expectation in words; empty if there is none."""
        if self.expected_db is None:
            return ""
        return f"{self.bound} {self.expected_db:.1f} dB"


def advise(report: Report) -> tuple[Advice, ...]:
    """Return what to try, what costs least first; empty if the verdict is safe."""
    if report.verdict.assurance is Assurance.SAFE or report.data.made_up:
        return ()
    found = list(_of_evidence(report))
    if report.noise is not None and 0 < report.noise.total < math.inf:
        case = _Case(report, report.noise)
        found += [
            a for a in case.all() if a.expected_db is not None and a.expected_db - case.now >= _LEAST_GAIN
        ]
    return tuple(found)


def _of_evidence(report: Report) -> Iterator[Advice]:
    """Yield what makes the verdict itself more certain."""
    v = report.verification
    if not report.samples:
        return
    if report.samples < ENOUGH:
        what = "calibration has seen them all" if not v.held_out else "few are held out"
        yield Advice(
            "--data",
            f"{report.samples} samples were given, and {what}: from {ENOUGH} samples on, some are held out",
        )
    elif v.samples < FEW_SAMPLES:
        enough = math.ceil(FEW_SAMPLES / v.samples * report.samples)
        yield Advice(
            "--data",
            f"{v.samples} of the {report.samples} samples are held out for the comparison, too few to be "
            f"sure: with {enough} samples, {FEW_SAMPLES} are held out",
        )


@dataclass(frozen=True)
class _Case:
    """The figures of a run that lost accuracy."""

    report: Report
    noise: OutputNoise

    @property
    def now(self) -> float:
        """SQNR of the worst output in dB."""
        return min(s.sqnr_db for s in self.report.verification.statistics.values())

    @property
    def weights(self) -> float:
        """Share of the noise that weights cause; the parts may exceed the whole a little."""
        return self.noise.weights / max(self.noise.weights + self.noise.activations, 1e-30)

    @property
    def activations(self) -> float:
        """Share of the noise that activations cause."""
        return 1 - self.weights

    @property
    def weight_bits(self) -> int:
        """Fewest bits of any layer's weights."""
        return min((x.weight_bits for x in self.report.layers), default=8)

    @property
    def activation_bits(self) -> int:
        """Fewest bits of any layer's input."""
        return min((x.activation_bits for x in self.report.layers), default=8)

    @cached_property
    def config(self) -> Config:
        """The options of the run."""
        known = self.report.config
        return Config(**{name: known[name] for name in Config.model_fields if name in known})

    @property
    def weight_budget(self) -> float | None:
        """The mean bits of a weight that were allowed, if they were limited so."""
        budgets = (b.amount for b in self.config.budget if b.unit is BudgetUnit.WEIGHTS)
        return next(budgets, None)

    def all(self) -> Iterator[Advice]:
        """Yield all that may be tried, what costs least first."""
        yield from self._more_samples()
        yield from self._other_target()
        if self.weights >= _LEAST_PART:
            yield from self._longer()
            yield from self._loud_weights()
            yield from self._wider_weights()
        if self.activations >= _LEAST_PART:
            yield from self._loud_activations()
            yield from self._wider_activations()

    def _without(self, part: float) -> float:
        """Return the SQNR of the worst output in dB if a share of the noise is gone."""
        return self.now - 10 * math.log10(max(1 - part, 1e-3))

    def _other_target(self) -> Iterator[Advice]:
        narrow = [x for x in self.report.layers if x.weight_bits == 8 and _is_narrow(x.weight_range)]
        others = [n for n in targets.names() if targets.load(n).elsewhere == self.report.target]
        if not narrow or not others:
            return
        # One bit more for these layers.
        part = self.weights * len(narrow) / len(self.report.layers) * 0.75
        yield Advice(
            f"--target {others[0]}",
            f"weights cause {self.weights:.0%} of the noise, and those of {len(narrow)} layers are in "
            f"[{narrow[0].weight_range[0]}, {narrow[0].weight_range[1]}], because 8-bit products saturate on "
            "processors without VNNI: they get one bit more if the file is to run on others",
            self._without(part),
        )

    def _loud_weights(self) -> Iterator[Advice]:
        loud = self.noise.loud_weights
        if not loud:
            return
        bits = {x.node: (x.weight_bits, x.activation_bits) for x in self.report.layers}
        nodes = [node for item in loud for node in item.nodes]
        if not self.config.chooses_widths and all(bits[node][0] < 8 for node in nodes):
            option = _options("--bits", [f"{node}=w8a{bits[node][1]}" for node in nodes])
            part = sum(item.share * (1 - 4.0 ** (bits[item.nodes[0]][0] - 8)) for item in loud)
        else:
            option, part = _options("--exclude", nodes), sum(item.share for item in loud)
        yield Advice(
            option,
            f"weights cause {self.weights:.0%} of the noise, and {_named(loud)} of theirs",
            self._without(self.weights * part),
        )

    def _wider_weights(self) -> Iterator[Advice]:
        own = [x.weight_bits for x in self.report.layers if x.weight_bits < 8]
        if not own:
            return
        mean = sum(x.weight_bits for x in self.report.layers) / len(self.report.layers)
        cause = f"weights cause {self.weights:.0%} of the noise"
        if self.config.chooses_widths:
            budget = self.weight_budget
            yield Advice(
                f"--budget weights={(mean if budget is None else budget) + 1:.3g}",
                f"{cause}, and layers have {mean:.1f} bits on average: this gives one more",
                self._without(self.weights * 0.75),
            )
            return
        narrow = sum(own) / len(own)
        more = math.floor(narrow) + 1
        if more < 8:
            # So much if each of them got as many; a budget does better.
            yield Advice(
                f"--budget weights={more}",
                f"{cause}, {len(own)} of {len(self.report.layers)} layers having {_span(own)} bits, and "
                "a budget gives more to those that need it",
                self._without(self.weights * (1 - 4.0 ** (narrow - more))),
                bound="at least",
            )
        part = sum(1 - 4.0 ** (bits - 8) for bits in own) / len(own)
        yield Advice(
            "--weight-bits 8",
            f"{cause}, {len(own)} of {len(self.report.layers)} layers having {_span(own)} bits",
            self._without(self.weights * part),
        )

    def _longer(self) -> Iterator[Advice]:
        """Yield a longer optimization, if it has not had its chance."""
        trace, preset = self.report.optimization, self.config.preset
        most = self._without(self.weights)
        if trace is None:
            if self.weight_bits <= _LOW and preset is Preset.FAST and self.config.steps is None:
                yield Advice(
                    "--preset balanced",
                    f"{self.weight_bits}-bit weights cause {self.weights:.0%} of the noise, and the preset "
                    f"{preset.value} does not optimize their rounding over the whole network",
                    most,
                    bound="at most",
                )
            return
        if self.config.steps is not None or len(trace.checkpoints) < 2:
            return
        (_, start), *others = trace.checkpoints
        step, best = min(others, key=lambda c: c[1])
        if step != others[-1][0]:
            return
        kept = "" if trace.best_step else "the optimization kept its start, but "
        why = (
            f"{kept}the error on held-out samples was still falling at step {step}, the last check: "
            f"{start:.4g} at the start, {best:.4g} there"
        )
        yield Advice(f"--steps {_LONGER * trace.steps}", why, most, bound="at most")

    def _loud_activations(self) -> Iterator[Advice]:
        loud = self.noise.loud_activations
        if not loud:
            return
        nodes = list(dict.fromkeys(node for item in loud for node in item.nodes))
        share = sum(item.share for item in loud)
        yield Advice(
            _options("--exclude", nodes),
            f"activations cause {self.activations:.0%} of the noise, and inputs of {_named(loud)} of theirs",
            self._without(self.activations * share),
        )

    def _wider_activations(self) -> Iterator[Advice]:
        cause, own = f"activations cause {self.activations:.0%} of the noise", self.activation_bits
        yield from self._larger_budget(cause)
        if own < 8:
            part = 1 - 4.0 ** (own - 8)
            yield Advice(
                "--activation-bits 8",
                f"{cause}, {own} bits being the fewest",
                self._without(self.activations * part),
            )
        elif own == 8 and (target := self._target_of_16_bits()) is not None:
            slow = "" if target.activation.wide else "; no integer kernels are known for 16 bits"
            yield Advice(
                "--activation-bits 16",
                f"{cause}, and weights {self.weights:.0%}{slow}",
                self._without(self.activations),
            )

    def _larger_budget(self, cause: str) -> Iterator[Advice]:
        """Yield a larger mean of activation bits, or one at all."""
        target, mean = self._target_of_16_bits(), self.config.activation_budget
        most = 8 if mean is not None and mean < 8 else 16
        if mean is None:
            wide = target is not None and target.activation.wide
            if not wide or self.activation_bits != 8:
                return
            mean = 8.0
        larger = min(mean + most / 8, most)
        if larger > mean:
            # So much if each of them got as much of it; a budget does better.
            yield Advice(
                f"--budget activations={larger:.3g}",
                f"{cause}, and a budget gives {most} bits to those that need them",
                self._without(self.activations * (larger - mean) / (most - mean)),
                bound="at least",
            )

    def _target_of_16_bits(self) -> Target | None:
        """Return the target if it takes 16-bit activations."""
        known = self.report.target in targets.names()
        found = targets.load(self.report.target if known else str(self.report.config.get("target")))
        try:
            found.check_bits(Config(activation_bits=16))
        except ConfigError:
            return None
        return found

    def _more_samples(self) -> Iterator[Advice]:
        seen = self.noise.seen
        if seen is None or seen >= self.noise.total or seen <= 0:
            return
        gap = 10 * math.log10(self.noise.total / seen)
        yield Advice(
            "--data",
            f"outputs keep {gap:.1f} dB more on samples that calibration has seen than on others: give more "
            f"than these {self.report.samples}",
            self.now + gap,
            bound="at most",
        )


def _is_narrow(covered: tuple[int, int]) -> bool:
    """Return True for a range of fewer values than 8 bits hold, but for the one that symmetry costs."""
    return covered[1] - covered[0] < 2**8 - 2


def _options(flag: str, values: Sequence[str]) -> str:
    return " ".join(f"{flag} {shlex.quote(value)}" for value in values)


def _named(loud: Sequence[Loud]) -> str:
    """Return who causes which share, such as ``a 40%, b and c 20%``."""
    return ", ".join(f"{' and '.join(item.nodes)} {item.share:.0%}" for item in loud)


def _span(bits: Sequence[int]) -> str:
    low, high = min(bits), max(bits)
    return str(low) if low == high else f"{low} to {high}"
