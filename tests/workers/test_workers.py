from __future__ import annotations

import numpy as np
import pytest
from conftest import MODELS
from copying import Copying, copying  # noqa: F401 (a fixture)
from graphs import images, silent, small_convnet
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx import Config, ConfigError, quantize, sensitivity
from eptq_onnx.parallel import Threads, owned_threads, paired_map, working_on
from eptq_onnx.workers import DEFAULT, registered

SHIPPED = [
    "digits_mobile",
    "digits_resnet",
    pytest.param("shapes_detector", marks=pytest.mark.slow),
    pytest.param("shapes_segmenter", marks=pytest.mark.slow),
]


def written(name: str, **options) -> bytes:
    """The model that a short run through all passes writes."""
    with np.load(MODELS / f"{name.split('_', maxsplit=1)[0]}_calib.npz") as file:
        data = {key: values[:24] for key, values in file.items()}
    config = Config(**{"weight_bits": 4, "steps": 2, "batch_size": 8, "score_samples": 16, **options})
    return quantize(MODELS / f"{name}.onnx", data, config, progress=silent).model.SerializeToString()


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_sent_and_sent_back_gives_the_same_bytes(name, copying, diagnosed):  # noqa: F811
    assert written(name, workers="copying") == written(name)
    assert copying.maps > 50


def test_blocks_of_a_large_model_are_sent_too(copying):  # noqa: F811
    options = {"max_memory": "2MB", "steps": 0}
    assert written("digits_resnet", **options, workers="copying") == written("digits_resnet", **options)


def test_the_ranking_is_the_same(copying):  # noqa: F811
    found = [
        sensitivity(small_convnet(), images(8), Config(workers=kind), progress=silent).to_json()
        for kind in ("copying", "threads")
    ]
    assert found[0] == found[1]
    assert copying.maps


def test_threads_are_the_default():
    assert Config().workers == DEFAULT == next(iter(registered()))


def test_unknown_workers_are_told():
    with pytest.raises(ConfigError, match="workers 'nobody' are unknown: choose one of threads, ray"):
        quantize(small_convnet(), images(8), Config(workers="nobody"), progress=silent)


@given(st.lists(st.integers()), st.integers(1, 4))
def test_pairs_hold_the_items_themselves(numbers, threads):
    items = [[n] for n in numbers]
    with owned_threads(threads), working_on(Threads()):
        found = list(paired_map(lambda n: n + 1, items, lambda item: item[0]))
    assert [result for _, result in found] == [n + 1 for n in numbers]
    assert all(item is own for (item, _), own in zip(found, items, strict=True))


def test_workers_are_closed_when_a_block_fails():
    closed = []

    class Closing(Copying):
        def close(self):
            closed.append(self)

    with pytest.raises(ZeroDivisionError), working_on(Closing()):
        raise ZeroDivisionError
    assert len(closed) == 1
