"""The code of the detector tutorial: what it decodes, and how it scores."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import MODELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PAGE = (MODELS.parent / "docs" / "tutorial-detector.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("page")
    for name, text in re.findall(
        r"^```python\n# (boxes|heads)\.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    ):
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in ("boxes", "heads"):
            sys.modules.pop(name, None)
        yield importlib.import_module("boxes"), importlib.import_module("heads")
        for name in ("boxes", "heads"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def boxes(modules) -> ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def heads(modules) -> ModuleType:
    return modules[1]


RANDOM = np.random.default_rng(0)
SIZE = (96, 160)
"""Height and width."""


def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in a picture of that size, and scores of three classes."""
    first = RANDOM.uniform(0, 60, (count, 2))
    return np.concatenate([first, first + RANDOM.uniform(4, 30, (count, 2))], axis=1), RANDOM.random(
        (count, 3)
    )


def middle_and_extent(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]


def test_a_yolox_head_is_decoded_cell_by_cell(heads):
    strides = np.concatenate([np.full(SIZE[0] // s * (SIZE[1] // s), s) for s in (8, 16, 32)])
    cells = np.array([(x, y) for s in (8, 16, 32) for y in range(SIZE[0] // s) for x in range(SIZE[1] // s)])
    want, scores = drawn(len(cells))
    middle, extent = middle_and_extent(want)
    objectness = RANDOM.random((len(cells), 1))
    encoded = [middle / strides[:, None] - cells, np.log(extent / strides[:, None]), objectness, scores]
    found, got = heads.yolox(np.concatenate(encoded, axis=1)[None], SIZE)
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_allclose(got, objectness * scores)


def test_an_ultralytics_head_is_decoded(heads):
    want, scores = drawn(50)
    found, got = heads.ultralytics(np.concatenate([*middle_and_extent(want), scores], axis=1).T[None])
    np.testing.assert_allclose(found, want)
    np.testing.assert_allclose(got, scores)


@pytest.fixture(scope="module")
def own() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MODELS)
        return importlib.import_module("score")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0, 0.6))
def test_the_average_precision_is_that_of_the_evaluation_of_the_shipped_models(
    boxes, own, seed, photos, noise
):
    random = np.random.default_rng(seed)
    truth, found = np.full((photos, 4, 5), -1.0), []
    for k in range(photos):
        count = random.integers(1, 5)
        corner = random.uniform(0, 60, (count, 2))
        truth[k, :count] = np.concatenate(
            [random.integers(0, 3, (count, 1)), corner, corner + random.uniform(5, 30, (count, 2))], axis=1
        )
        near = np.repeat(truth[k, :count, 1:], 3, axis=0) + noise * random.normal(0, 10, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found.append(boxes.detections(near, random.random((len(near), 3)), least=0.5))
    truth[0, 0, 0], truth[-1, 0, 0], truth[0, 1, 0] = 0, 1, 2  # every class is there, as the other wants it
    truth[0, :2, 1:] = [[1, 1, 20, 20], [30, 30, 50, 50]]
    if photos == 1:
        truth[0, 2] = [1, 5, 40, 25, 60]
    rows = [t[t[:, 0] >= 0] for t in truth]
    want = np.mean(
        [own._average_precision(found, truth, kind) for kind in np.unique(np.concatenate(rows)[:, 0])]
    )
    assert boxes.ap50(found, rows) == pytest.approx(want)


def test_the_same_boxes_are_found_and_others_are_not(boxes):
    truth = [np.array([[0, 0, 0, 10, 10], [1, 20, 20, 30, 40]]), np.zeros((0, 5))]
    same = [np.insert(t.astype(float), 1, 0.9, axis=1) for t in truth]
    assert boxes.ap50(same, truth) == 1
    away = [rows + np.array([0, 0, 50, 50, 50, 50]) for rows in same]
    assert boxes.ap50(away, truth) == 0
    assert boxes.ap50([np.zeros((0, 6))] * 2, truth) == 0
