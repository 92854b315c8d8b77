from __future__ import annotations

import pytest
from graphs import images, small_convnet

from eptq_onnx import data
from eptq_onnx.execute import micro
from eptq_onnx.method.normalize import normalize


@pytest.mark.parametrize("fits", [1, 2, 3, 4])
def test_as_many_samples_run_at_once_as_their_tensors_allow(monkeypatch: pytest.MonkeyPatch, fits: int):
    model = normalize(small_convnet(), 13)
    samples = data.read(images(16), model)
    one, four = (micro.gradient_bytes(model, samples, n) for n in (1, 4))
    assert 3.5 * one < four <= 4 * one
    monkeypatch.setattr(micro, "_MEMORY", four * fits // 4)
    assert micro.micro_batch(model, samples) == {1: 1, 2: 2, 3: 2, 4: 4}[fits]
    assert micro.micro_batch(model, samples.in_batches_of(4)) == 4, "what a model prescribes stays"
    assert micro.micro_batch(model, samples, 1) == 1
