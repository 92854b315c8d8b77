"""How the outputs of two models differ, in the words that suit what each is."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from eptq_onnx.numerics.statistics import Meaning, OutputStatistics
from eptq_onnx.report.sheet import Sheet

COLUMNS = ("output", "SQNR (dB)", "about the mean (dB)", "worst sample (dB)", "agreement")
"""Head of the table."""
_DECISIONS = (
    "Top-1 is the largest channel, such as the class of a classifier; KL is the mean divergence of the "
    "scores in nats."
)
_EXPECTED = (
    "What is expected is the share that changes on many more samples, from the noise and the distance "
    "between the two largest scores; the verdict takes the larger of both."
)
_VECTORS = "Embeddings are compared by the cosine of the angle between the vectors of both models."
_PARTS = "Parts of different meaning in one output have no top-1: score the boxes that follow from them."
_METRICS = {
    Meaning.PARTS: "mean_average_precision",
    Meaning.BOXES: "mean_average_precision",
    Meaning.EMBEDDING: "search",
    Meaning.SCORES: "accuracy",
}
"""Names of metrics, by what outputs are; the first that a model has counts."""


def changes_in_words(s: OutputStatistics) -> str:
    """Return how many decisions change, such as ``0 of 32 samples (1.2% expected)``; empty without any."""
    if not s.decisions:
        return ""
    if s.decisions > s.samples:
        # With so many decisions, the observed share is reliable.
        return f"{s.disagreement:.1%} of {s.decisions} positions"
    changed = round(s.disagreement * s.decisions)
    return f"{changed} of {s.decisions} samples ({s.expected_disagreement:.1%} expected)"


def agreement(s: OutputStatistics) -> str:
    """Return what a table says beside the ratios."""
    if s.decisions:
        return f"top-1 changes on {changes_in_words(s)}, KL {s.divergence:.3g}"
    if s.meaning is Meaning.EMBEDDING:
        return cosines_in_words(s)
    if s.meaning is Meaning.BOXES:
        return f"boxes, off by {s.error:.3g} (root mean square)"
    if s.meaning is Meaning.PARTS:
        return "boxes and scores, or other unlike parts"
    return "-"


def explained(statistics: Collection[OutputStatistics]) -> str:
    """Return what the words of `agreement` mean, as far as outputs have them."""
    found = {
        _DECISIONS: any(s.decisions for s in statistics),
        _EXPECTED: any(0 < s.decisions <= s.samples for s in statistics),
        _VECTORS: any(s.meaning is Meaning.EMBEDDING for s in statistics),
        _PARTS: any(s.meaning is Meaning.PARTS for s in statistics),
    }
    return " ".join(text for text, there in found.items() if there)


def cosines_in_words(s: OutputStatistics) -> str:
    """Return how far the vectors of an embedding keep their direction."""
    return f"cosine {s.cosine:.4f}, worst {s.least_cosine:.4f}"


def output_row(name: str, s: OutputStatistics) -> tuple[str, ...]:
    """Return the row of an output."""
    figures = (s.sqnr_db, s.centred_sqnr_db, s.sample_sqnr_db)
    return (name, *(f"{figure:.2f}" for figure in figures), agreement(s))


def statistics_sheet(title: str, statistics: Mapping[str, OutputStatistics]) -> Sheet:
    """Return the table of all outputs."""
    return Sheet(title, COLUMNS, tuple(output_row(n, s) for n, s in statistics.items()), names=(0,))


def metric_named(statistics: Collection[OutputStatistics]) -> str:
    """Return a name for a metric that suits outputs, as ``module:function``."""
    found = {s.meaning for s in statistics if s.meaning is not Meaning.SCORES or s.decisions}
    if any(s.meaning is Meaning.SCORES and s.decisions > s.samples for s in statistics):
        return "metric:mean_iou" if found == {Meaning.SCORES} else "metric:score"
    return f"metric:{next((name for meaning, name in _METRICS.items() if meaning in found), 'score')}"
