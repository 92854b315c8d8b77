from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics.statistics import OutputStatistics
from eptq_onnx.report.verdict import FEW_SAMPLES, VERY_HIGH_DB, Assurance, judge_outputs

SCORES = OutputStatistics(
    32, 31.0, 30.5, 29.0, 25.0, decisions=32, disagreement=0.0, expected_disagreement=0.012
)
"""Statistics of a classifier at 8 bits."""
VALUES = OutputStatistics(32, 31.0, 25.0, 22.0, 25.0)
ORDER = [Assurance.SAFE, Assurance.CHECK, Assurance.LOSS]


def verdict(*outputs: OutputStatistics, samples: int = 32, held_out: bool = True):
    return judge_outputs({f"y{k}": s for k, s in enumerate(outputs)}, samples, held_out)


@pytest.mark.parametrize(
    "good", [SCORES, VALUES, replace(SCORES, sqnr_db=23.0, centred_sqnr_db=22.8, expected_disagreement=0.031)]
)
def test_little_noise_is_safe(good):
    v = verdict(good)
    assert v.assurance is Assurance.SAFE
    assert not v.advice
    assert str(v).startswith(f"safe: y0 keeps {good.sqnr_db:.1f} dB")


@pytest.mark.parametrize(
    ("statistics", "assurance", "words"),
    [
        (
            replace(
                SCORES, sqnr_db=14.2, centred_sqnr_db=14.0, sample_sqnr_db=5.4, expected_disagreement=0.09
            ),
            Assurance.LOSS,
            "0 of 32 samples (9.0% expected)",
        ),
        (
            replace(SCORES, sqnr_db=17.4, centred_sqnr_db=17.0, expected_disagreement=0.045),
            Assurance.CHECK,
            "0 of 32 samples (4.5% expected)",
        ),
        (
            replace(SCORES, sqnr_db=17.4, centred_sqnr_db=17.0, disagreement=0.094),
            Assurance.CHECK,
            "3 of 32 samples (1.2% expected)",
        ),
        (
            replace(SCORES, decisions=9000, sqnr_db=16.0, centred_sqnr_db=16.0, disagreement=0.05),
            Assurance.CHECK,
            "5.0% of 9000 positions",
        ),
        (replace(VALUES, sqnr_db=33.0, centred_sqnr_db=7.0), Assurance.LOSS, "noise is 45% of its spread"),
        (replace(VALUES, sqnr_db=33.0, centred_sqnr_db=13.0), Assurance.CHECK, "noise is 22% of its spread"),
        (replace(VALUES, sqnr_db=20.0, centred_sqnr_db=19.0), Assurance.CHECK, "noise is 11% of its spread"),
        (replace(VALUES, sample_sqnr_db=3.0), Assurance.CHECK, "one sample keeps only 3.0 dB"),
        (replace(VALUES, not_finite=1), Assurance.LOSS, "NaN or Inf on 1 of 32 samples"),
        (replace(VALUES, mismatched=2), Assurance.CHECK, "another number of values on 2 of 32"),
        (replace(VALUES, mismatched=9), Assurance.LOSS, "another number of values on 9 of 32"),
    ],
)
def test_reasons_are_told_in_words(statistics, assurance, words):
    for outputs in ([statistics], [SCORES, statistics], [statistics, VALUES, SCORES]):
        v = verdict(*outputs)
        assert v.assurance is assurance
        assert any(words in reason for reason in v.reasons)
        assert bool(v.advice) == (assurance is Assurance.CHECK)
        assert len(v.reasons) == 1, "the outputs that are well are no reason"


def test_a_map_of_classes_must_change_less():
    """In 400,000 pixels, 2 % are whole objects."""
    places = replace(SCORES, decisions=400_000, sqnr_db=18.0, centred_sqnr_db=17.0, expected_disagreement=0.2)
    found = [verdict(replace(places, disagreement=share)).assurance for share in (0.001, 0.02)]
    assert found == [Assurance.SAFE, Assurance.CHECK]
    assert (
        verdict(replace(SCORES, sqnr_db=23.0, centred_sqnr_db=22.0, disagreement=0.02)).assurance
        is Assurance.SAFE
    )


@pytest.mark.parametrize("good", [SCORES, VALUES])
def test_little_evidence_is_not_safe(good):
    for samples in (1, FEW_SAMPLES - 1):
        assert "too few to tell more" in str(verdict(good, samples=samples))
        assert verdict(good, samples=samples).assurance is Assurance.CHECK
    seen = verdict(good, held_out=False)
    assert seen.assurance is Assurance.CHECK
    assert "calibration has seen the samples" in str(seen)
    excellent = replace(
        good, sqnr_db=VERY_HIGH_DB + 1, centred_sqnr_db=VERY_HIGH_DB, expected_disagreement=0.001
    )
    assert verdict(excellent, samples=4, held_out=False).assurance is Assurance.SAFE


def test_nothing_compared_is_to_be_checked():
    assert judge_outputs({}, 32, True).assurance is Assurance.CHECK
    assert judge_outputs({"y": SCORES}, 0, True).assurance is Assurance.CHECK


def test_many_outputs_are_summed_up():
    v = verdict(*[replace(VALUES, sqnr_db=5.0, centred_sqnr_db=2.0)] * 9)
    assert v.reasons[-1] == "and 7 more outputs like these"
    assert len(v.reasons) == 3


FIGURES = st.builds(
    lambda sqnr, below, worst, decisions, seen, expected: OutputStatistics(
        32, sqnr, sqnr - below, sqnr - below, sqnr - worst,
        decisions, seen * (decisions > 0), expected * (decisions > 0),
    ),
    st.floats(-5, 60), st.floats(0, 30), st.floats(0, 20),
    st.sampled_from([0, 32, 5000]), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(FIGURES, st.floats(0, 20), st.integers(1, 64), st.booleans())
def test_more_noise_never_makes_it_better(figures, more, samples, held_out):
    worse = replace(
        figures,
        sqnr_db=figures.sqnr_db - more,
        centred_sqnr_db=figures.centred_sqnr_db - more,
        sample_sqnr_db=figures.sample_sqnr_db - more,
        disagreement=min(1.0, figures.disagreement * (1 + more)),
        expected_disagreement=min(1.0, figures.expected_disagreement * (1 + more)),
    )
    before, after = (
        ORDER.index(verdict(f, samples=samples, held_out=held_out).assurance) for f in (figures, worse)
    )
    assert after >= before
    assert ORDER.index(verdict(figures, SCORES, samples=samples).assurance) >= ORDER.index(
        verdict(figures, samples=samples).assurance
    )
