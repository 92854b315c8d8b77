"""The words for how outputs differ suit what the outputs are, and are the same wherever they stand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics.statistics import Comparison, Meaning, OutputStatistics
from eptq_onnx.report.outputs import agreement, changes_in_words, explained, metric_named, output_row
from eptq_onnx.report.verdict import judge_outputs


def compared(meaning: Meaning, shape: tuple[int, ...], noise: float, seed: int, count: int = 32, scale=None):
    random = np.random.default_rng(seed)
    found = Comparison(meaning)
    for _ in range(count):
        exact = random.normal(0, 1, shape)
        got = exact + noise * random.normal(0, 1, shape)
        if scale is not None:
            exact, got = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (exact, got))
        found.add(exact, got)
    return found.result()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(Meaning)), st.sampled_from([(1, 10), (1, 6, 5), (1, 4, 6, 6)]),
    st.floats(0.001, 1), st.integers(0, 99),
)  # fmt: skip
def test_only_scores_have_a_top_1(meaning, shape, noise, seed):
    s = compared(meaning, shape, noise, seed)
    texts = (agreement(s), str(judge_outputs({"y": s}, 32, True)))
    assert s.meaning is meaning
    assert all(("top-1" in text) == (meaning is Meaning.SCORES) for text in texts)
    assert (s.decisions > 0) == (meaning is Meaning.SCORES)
    assert ("cosine" in texts[0]) == (meaning is Meaning.EMBEDDING)
    assert ("off by" in texts[0]) == (meaning is Meaning.BOXES)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 20), st.floats(0.001, 2), st.integers(0, 99))
def test_the_verdict_and_the_table_say_the_same_of_decisions(classes, noise, seed):
    """The number that was counted and the share that is expected stand beside each other in both."""
    s = compared(Meaning.SCORES, (1, classes), noise, seed)
    words = changes_in_words(s)
    assert words == f"{round(32 * s.disagreement)} of 32 samples ({s.expected_disagreement:.1%} expected)"
    assert words in output_row("y", s)[-1]
    verdict = str(judge_outputs({"y": s}, 32, True))
    assert words in verdict
    assert len(re.findall("top-1", verdict)) == 1


def test_vectors_of_length_1_are_an_embedding_whoever_says_scores():
    s = compared(Meaning.SCORES, (1, 16), 0.1, 0, scale=1)
    assert s.meaning is Meaning.EMBEDDING
    assert not s.decisions
    assert 0.9 < s.least_cosine <= s.cosine < 1
    hot = Comparison()
    for k in range(8):
        hot.add(np.eye(4)[k % 4][None], np.eye(4)[k % 4][None])
    assert hot.result().meaning is Meaning.SCORES, "probabilities of a sure classifier have that length, too"


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 10), st.integers(0, 99))
def test_an_error_is_in_the_unit_of_the_values(unit, seed):
    random = np.random.default_rng(seed)
    found = Comparison(Meaning.BOXES)
    for _ in range(4):
        exact = random.normal(50, 20, (1, 7, 4))
        found.add(exact, exact + unit)
    assert found.result().error == pytest.approx(unit)


def test_only_the_words_that_stand_there_are_explained():
    def words(meaning: Meaning, shape: tuple[int, ...]) -> str:
        return explained([compared(meaning, shape, 0.1, 0)])

    assert "Top-1" in words(Meaning.SCORES, (1, 10))
    assert "expected" in words(Meaning.SCORES, (1, 10))
    assert "expected" not in words(Meaning.SCORES, (1, 4, 6, 6))
    assert "Top-1" not in words(Meaning.EMBEDDING, (1, 10))
    assert "cosine" in words(Meaning.EMBEDDING, (1, 10))
    assert "no top-1" in words(Meaning.PARTS, (1, 10))
    assert not words(Meaning.BOXES, (1, 7, 4))
    assert not explained([])


def test_a_metric_is_named_as_suits_the_outputs():
    def with_(*meanings: Meaning, decisions: int = 32) -> str:
        return metric_named(
            [
                OutputStatistics(32, 30, 30, 30, 30, decisions=decisions * (m is Meaning.SCORES), meaning=m)
                for m in meanings
            ]
        )

    assert with_(Meaning.SCORES) == "metric:accuracy"
    assert with_(Meaning.SCORES, decisions=9000) == "metric:mean_iou"
    assert with_(Meaning.PARTS, Meaning.PARTS) == with_(Meaning.BOXES, Meaning.SCORES)
    assert with_(Meaning.PARTS) == "metric:mean_average_precision"
    assert with_(Meaning.EMBEDDING) == "metric:search"
    assert with_(Meaning.VALUES) == with_() == with_(Meaning.SCORES, decisions=0) == "metric:score"
