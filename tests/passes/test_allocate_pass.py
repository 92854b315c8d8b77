from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import images, silent, small_convnet

from eptq_onnx import Config, quantize
from eptq_onnx.method import fit_bytes
from eptq_onnx.passes import allocate

FAST: dict[str, Any] = {"preset": "fast", "measure_speed": False}


@pytest.fixture
def counts(monkeypatch):
    """The bytes that were counted for the chosen widths, and for each with one weight at more bits."""
    found = []

    def spy(choose, effects, count, limit, keeps):
        widths = fit_bytes.fit_bytes(choose, effects, count, limit, keeps)
        more = [
            count.bytes({**widths, name: bits})
            for name, of in effects.items()
            for bits in of
            if bits > widths[name] and of[bits] < of[widths[name]]
        ]
        found.append((count.bytes(widths), more))
        return widths

    monkeypatch.setattr(allocate, "fit_bytes", spy)
    return found


def test_a_budget_of_bytes_is_that_of_the_file(models_folder, counts):
    amount = 41_000
    config = Config(budget=f"bytes={amount}", start="nearest", steps=0, measure_speed=False)
    data = {"image": np.load(models_folder / "digits_calib.npz")["image"][:32]}
    found = quantize(models_folder / "digits_resnet.onnx", data, config)
    counted, more = counts[-1]
    assert found.model.ByteSize() <= counted <= amount
    assert counted - found.model.ByteSize() <= 8
    assert min(more) > amount
    assert len({layer.weight_bits for layer in found.report.layers}) > 1


@pytest.mark.parametrize("options", [{}, {"start": "nearest", "steps": 0}, {"target": "portable"}], ids=str)
def test_what_eight_bits_meet_is_met(options):
    data, config = images(8), {**FAST, "target": "ort-x64-vnni", **options}
    whole = quantize(small_convnet(), data, Config(**config), progress=silent)
    amount = whole.model.ByteSize()
    found = quantize(small_convnet(), data, Config(**config, budget=f"bytes={amount}"), progress=silent)
    assert {layer.weight_bits for layer in found.report.layers} == {8}
    assert found.model.ByteSize() <= amount
