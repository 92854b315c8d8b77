"""Judge what to expect of the written model: safe, check, or expect loss, with reasons in words.

The limits were set on files of nine networks (classifiers, detectors, segmenters, a sentence encoder), at 8
to 2 bits, each scored on labelled data; ``tools/bench_verdict.py`` prints such a table for others. No file
whose score fell by more than a point met the conditions of `Assurance.SAFE`. How well the limits work for
other networks is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from eptq_onnx.data.origin import Origin
from eptq_onnx.numerics.statistics import Meaning, OutputStatistics
from eptq_onnx.outcome import Verification
from eptq_onnx.report.outputs import changes_in_words, cosines_in_words

SAFE_DB, VERY_HIGH_DB = 30.0, 40.0
"""SQNR at which an output is safe whatever its use, and at which few or already seen samples suffice."""
SAFE_CHANGES, LOSSY_CHANGES = 0.035, 0.06
"""Shares of changed decisions: below the first, scores fell by less than a point; above the second, more."""
SAFE_PLACES = 0.005
"""`SAFE_CHANGES` for samples with many decisions, such as a map of classes.

Scores of classes with small areas fall by several times the share of changed positions.
"""
SAFE_CENTRED_DB = 15.0
"""Centred SQNR below which few changed decisions do not make an output safe."""
LOSSY_CENTRED_DB = 8.0
"""Centred SQNR below which every task loses: noise is a sixth of the outputs' variance or more."""
WORST_SAMPLE_DB = 10.0
"""SQNR below which a sample's outputs have little to do with the float model's."""
MISMATCHED = 0.1
"""Share of samples with outputs of another size above which the model behaves differently."""
FEW_SAMPLES = 16
"""Number of samples below which a verdict is uncertain."""
MADE_UP = "samples are random numbers: ranges are wrong, and no figure here says anything about accuracy"
"""What is said of runs on data that is made up."""
NO_SAMPLES = (
    "there were no samples: inputs are random numbers, and no figure here says anything about accuracy"
)
"""What is said of runs that drew inputs for want of data."""
UNMEASURED = (
    "no samples were given: weights are rounded to nearest, and nothing was measured; with samples they are "
    "rounded so that the layers' outputs stay the same, which halves the error or better"
)
"""What is said of runs without data."""


class Assurance(str, Enum):
    """What to expect of the quantized model's results."""

    SAFE = "safe"
    CHECK = "check"
    LOSS = "expect loss"


_ORDER = (Assurance.SAFE, Assurance.CHECK, Assurance.LOSS)
_ADVICE = {
    Assurance.SAFE: "",
    Assurance.CHECK: "score both models on labelled data before you rely on it",
    Assurance.LOSS: "",  # what to try follows from the figures; see `eptq_onnx.report.advice`
}


@dataclass(frozen=True)
class Verdict:
    """What to expect, why, and what to do about it.

    Parameters
    ----------
    assurance : Assurance
    reasons : tuple of str
    advice : str
        Empty if there is nothing to do.
    """

    assurance: Assurance
    reasons: tuple[str, ...]
    advice: str

    def __str__(self) -> str:
        return f"{self.assurance.value}: {'; '.join([*self.reasons, *filter(None, [self.advice])])}"


def judge(verification: Verification, origin: Origin) -> Verdict:
    """Return the verdict on the written model, which is that of its worst output.

    Parameters
    ----------
    verification : Verification
    origin : Origin
        Where the samples come from.
    """
    if verification.samples == 0 and not verification.statistics:
        return Verdict(Assurance.CHECK, (UNMEASURED,), "give samples with --data")
    if origin.made_up:
        return Verdict(Assurance.CHECK, (of_made_up(origin),), "give real samples with --data")
    return judge_outputs(verification.statistics, verification.samples, verification.held_out)


def of_made_up(origin: Origin) -> str:
    """Return what is said of figures on inputs that are made up."""
    return MADE_UP if origin.needed else NO_SAMPLES


def judge_outputs(statistics: Mapping[str, OutputStatistics], samples: int, held_out: bool) -> Verdict:
    """Return the verdict on a set of outputs.

    Parameters
    ----------
    statistics : mapping of str to OutputStatistics
        Statistics of each output.
    samples : int
        Samples compared.
    held_out : bool
        True if no step of the quantization has seen them.
    """
    if not statistics or samples == 0:
        return _verdict(
            Assurance.CHECK,
            ["no output was compared" if statistics or samples == 0 else "no output is floating point"],
        )
    judged = {name: _judge_output(s) for name, s in statistics.items()}
    worst = max((a for a, _ in judged.values()), key=_ORDER.index)
    reasons = [f"{name} {why}" for name, (assurance, why) in judged.items() if assurance is worst]
    if len(reasons) > 3:
        reasons = [*reasons[:2], f"and {len(reasons) - 2} more outputs like these"]
    least = min(s.sqnr_db for s in statistics.values())
    doubts = []
    if samples < FEW_SAMPLES:
        few = f"{samples} samples are" if samples > 1 else f"{samples} sample is"
        doubts.append(f"{few} too few to tell more")
    if not held_out:
        doubts.append("calibration has seen the samples, so other samples may fare worse")
    if worst is Assurance.SAFE and doubts and least < VERY_HIGH_DB:
        worst = Assurance.CHECK
    return _verdict(worst, [*reasons, *(doubts if worst is not Assurance.SAFE else [])])


def _verdict(assurance: Assurance, reasons: list[str]) -> Verdict:
    return Verdict(assurance, tuple(reasons), _ADVICE[assurance])


def _judge_output(s: OutputStatistics) -> tuple[Assurance, str]:
    """Return the verdict on one output, and a description of its deviation."""
    if s.not_finite:
        return Assurance.LOSS, f"has NaN or Inf on {s.not_finite} of {s.samples} samples"
    if s.mismatched:
        # The number of boxes above a threshold, for instance, may differ by one without a loss.
        return (
            Assurance.LOSS if s.mismatched > MISMATCHED * s.samples else Assurance.CHECK,
            f"has another number of values on {s.mismatched} of {s.samples} samples",
        )
    changes, limit = _changes(s)
    text = f"keeps {s.sqnr_db:.1f} dB" if s.sqnr_db < 100 else "is the same"
    if changes is not None:
        text += f", its top-1 changes on {changes_in_words(s)}"
    elif s.meaning is Meaning.EMBEDDING and s.sqnr_db < 100:
        text += f", its vectors a {cosines_in_words(s)}"
    if s.sqnr_db >= VERY_HIGH_DB:
        return Assurance.SAFE, text
    spread = f"{text}, noise is {_noise(s.centred_sqnr_db)} of its spread"
    if s.centred_sqnr_db < LOSSY_CENTRED_DB:
        return Assurance.LOSS, spread
    if changes is not None and changes > LOSSY_CHANGES and s.centred_sqnr_db < SAFE_CENTRED_DB:
        return Assurance.LOSS, text
    if s.sample_sqnr_db < WORST_SAMPLE_DB:
        return Assurance.CHECK, f"{text}, but one sample keeps only {s.sample_sqnr_db:.1f} dB"
    agrees = changes is not None and changes <= limit and s.centred_sqnr_db >= SAFE_CENTRED_DB
    if agrees or (s.sqnr_db >= SAFE_DB and s.centred_sqnr_db >= SAFE_CENTRED_DB):
        return Assurance.SAFE, text
    return Assurance.CHECK, text if changes is not None else spread


def _changes(s: OutputStatistics) -> tuple[float | None, float]:
    """Return the share of changed decisions, None if there are none, and the largest safe share."""
    if not s.decisions:
        return None, 0.0
    if s.decisions > s.samples:
        # With so many decisions, the observed share is reliable.
        return s.disagreement, SAFE_PLACES
    return max(s.disagreement, s.expected_disagreement), SAFE_CHANGES


def _noise(db: float) -> str:
    return f"{10 ** (-db / 20):.0%}"
