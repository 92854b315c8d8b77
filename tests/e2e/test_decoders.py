"""Decoders with a cache of keys and values: several inputs of changing length, weights alone in blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from graphs import silent

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.runtime import Session

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from decoder import Sizes, decoder, initial, train

SIZES = Sizes(layers=2, heads=4, groups=2, theta=10000.0, epsilon=1e-5)
WIDTH, INNER, TOKENS = 64, 96, 600


def model():
    return decoder(initial(SIZES, WIDTH, INNER, TOKENS), SIZES)


def feeds(count, seed=1):
    """Prompts of several lengths without a past, and single tokens behind one."""
    rng, found = np.random.default_rng(seed), []
    for k in range(count):
        tokens, past = ((7, 11)[k // 2 % 2], 0) if k % 2 else (1, (5, 9)[k // 2 % 2])
        feed = {"input_ids": rng.integers(0, TOKENS, (1, tokens))}
        for layer in range(SIZES.layers):
            for name in ("key", "value"):
                feed[f"past_{name}_{layer}"] = rng.standard_normal((1, 2, past, 16)).astype(np.float32)
        found.append(feed)
    return found


@pytest.mark.parametrize("storage", [None, "packed"])
def test_a_decoder_with_a_past_of_changing_length(storage):
    whole = model()
    config = Config(bits="w4a32", edge_bits=4, block=32, preset="fast", target="ort-x64", storage=storage, measure_speed=False)  # fmt: skip
    result = eptq_onnx.quantize(whole, feeds(40), config, progress=silent)
    report = result.report
    assert report.verification.outputs["logits"] > 9
    # The table that the last layer multiplies by is stored once, in 4 bits.
    assert report.sizes["weights"] < 0.6 * (TOKENS * WIDTH + 2 * (3 * WIDTH * WIDTH + 3 * WIDTH * INNER))
    if storage is None:
        assert report.verification.planned["MatMulNBits"] == report.verification.kernels["MatMulNBits"] == 15
    for feed in feeds(4, seed=9):
        exact, found = (Session(m).run(feed) for m in (whole, result.model))
        for name, value in exact.items():
            assert found[name].shape == value.shape
        assert np.square(found["logits"] - exact["logits"]).mean() < 0.15 * np.square(exact["logits"]).mean()


def test_prompt_and_steps_agree_in_the_written_file():
    """What is decoded token by token is what a prompt gives at once."""
    config = Config(bits="w4a32", block=32, target="ort-x64", storage="packed")
    session = Session(eptq_onnx.quantize(model(), config=config, progress=silent).model)
    tokens = np.random.default_rng(0).integers(0, TOKENS, (1, 6))
    empty = {f"past_{n}_{k}": np.zeros((1, 2, 0, 16), np.float32) for n in ("key", "value") for k in range(2)}
    at_once, past, steps = session.run({"input_ids": tokens, **empty})["logits"], empty, []
    for k in range(6):
        found = session.run({"input_ids": tokens[:, k : k + 1], **past})
        steps.append(found["logits"])
        past = {name.replace("present", "past"): v for name, v in found.items() if name != "logits"}
    np.testing.assert_allclose(np.concatenate(steps, 1), at_once, rtol=1e-3, atol=1e-4)


def test_the_decoder_of_the_benchmark_learns():
    weights = initial(SIZES, 32, 48, 256)
    losses = train(weights, SIZES, 60, length=32, batch=8)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
