"""Random numbers, choices by value and batches that are none: nothing ends worse than nearest rounding."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from graphs import silent
from wild import CHOICES, DRAWS, Wild, wild

import eptq_onnx
from eptq_onnx import Config, data, pipeline
from eptq_onnx.graph.branches import flattened
from eptq_onnx.method.arrange import record
from eptq_onnx.method.normalize import normalize
from eptq_onnx.ops import executed
from eptq_onnx.passes.optimize import Optimize
from eptq_onnx.passes.reconstruct import Reconstruct
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once

CALIBRATION = 64
DRAWN = int(os.environ.get("EPTQ_DRAWS", "24"))
WORSE = 0.5
"""Decibels."""


def given(case: Wild, form: str) -> Any:
    """The calibration samples as arrays, as arrays of runs, or as feeds."""
    feeds = case.samples[:CALIBRATION]
    if form == "feeds":
        return feeds
    runs = np.stack([f["x"] for f in feeds])
    lone = case.label.startswith("none")
    return {"x": runs if lone or form == "runs" else runs[:, 0]}


def quality(case: Wild, quantized: eptq_onnx.Result) -> dict[str, float]:
    """SQNR in dB of each output on unseen samples, with the draws and the choices of the float network."""
    model = normalize(case.model, 13)
    samples, found, _ = record(flattened(model), data.read(case.samples[CALIBRATION:], case.model), seed=7)
    sessions = [Session(executed(m, found)) for m in (model, quantized.model)]
    power: dict[str, float] = {}
    noise: dict[str, float] = {}
    for k in range(samples.count):
        feeds = samples.take([k])
        exact, got = (s.run({n: v for n, v in feeds.items() if n in s.inputs}) for s in sessions)
        for o in case.model.graph.output:
            power[o.name] = power.get(o.name, 0.0) + float(np.square(exact[o.name], dtype=np.float64).sum())
            noise[o.name] = noise.get(o.name, 0.0) + float(
                np.square(exact[o.name] - got[o.name], dtype=np.float64).sum()
            )
    return {n: 10 * np.log10(p / max(noise[n], 1e-30)) for n, p in power.items()}


def changed(config: Config, **options: Any) -> Config:
    return Config(**{**config.model_dump(), **options})


def nearest_rounding(case: Wild, form: str, config: Config) -> eptq_onnx.Result:
    """All weights rounded to nearest, with the ranges of the config: options that leave steps out would
    change these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pipeline, "PIPELINE", [p for p in pipeline.PIPELINE if not isinstance(p, (Reconstruct, Optimize))]
        )
        return eptq_onnx.quantize(case.model, given(case, form), config, progress=silent)


def check(seed: int, operators: Any, config: Config, *, form: str = "arrays") -> None:
    case = wild(seed, operators)
    result = eptq_onnx.quantize(case.model, given(case, form), config, progress=silent)
    nearest = nearest_rounding(case, form, config)
    ours, theirs = quality(case, result), quality(case, nearest)
    for name, db in ours.items():
        assert db > theirs[name] - WORSE, (
            f"seed {seed} ({case.label}), {name}: {db:.1f} dB, nearest rounding has {theirs[name]:.1f}"
        )
    assert {o.name for o in result.model.graph.output} == {o.name for o in case.model.graph.output}
    kinds = [
        [n.op_type for n in m.graph.node if n.op_type.startswith("Random")]
        for m in (case.model, result.model)
    ]
    assert kinds[0] == kinds[1], "the written model draws as before"


FAST = Config(preset="fast", measure_speed=False)


@pytest.mark.parametrize("operator", DRAWS + CHOICES, ids=lambda f: f.__name__.strip("_"))
def test_draws_and_choices_do_not_disturb_the_rounding(operator):
    check(DRAWS.index(operator) if operator in DRAWS else 10 + CHOICES.index(operator), (operator,), FAST)


@pytest.mark.parametrize(("seed", "form"), [(100, "feeds"), (101, "runs"), (102, "arrays"), (103, "feeds")])
def test_the_loop_follows_the_same_rows(seed, form):
    check(seed, DRAWS + CHOICES, Config(steps=4, batch_size=4, probes=1, measure_speed=False), form=form)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1000 + DRAWN))
def test_no_drawn_network_ends_worse_than_its_nearest_rounding(seed):
    bits = [(8, 8), (8, 8), (4, 8), (6, 6)][seed % 4]
    steps = {} if seed % 3 else {"steps": 6, "probes": 1, "batch_size": 8, "preset": "balanced"}
    config = changed(FAST, weight_bits=bits[0], activation_bits=bits[1], **steps)
    check(seed, DRAWS + CHOICES, config, form=("arrays", "feeds", "runs")[seed % 3])


@pytest.mark.parametrize("operator", DRAWS, ids=lambda f: f.__name__.strip("_"))
def test_the_same_seed_gives_the_same_bytes_though_the_model_draws(operator):
    case = wild(5, (operator,))
    first, again = (
        eptq_onnx.quantize(case.model, given(case, "arrays"), FAST).model.SerializeToString()
        for _ in range(2)
    )
    assert first == again
