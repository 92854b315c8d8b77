"""The list of passes fits together, and the runner sees to missing gradients and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from graphs import images, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config, pipeline
from eptq_onnx.errors import GradientError
from eptq_onnx.passes.base import UNSET, Pass, State
from eptq_onnx.pipeline import PIPELINE, Runner

FIELDS = {f.name for f in dataclasses.fields(State)}
GIVEN = {
    f.name
    for f in dataclasses.fields(State)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
}


def test_every_pass_finds_what_it_requires():
    known = set(GIVEN)
    for step in PIPELINE:
        assert set(step.requires) <= known, step.name
        assert set(step.provides) <= FIELDS, step.name
        known |= set(step.provides)


def test_names_are_told_apart_and_switches_are_options():
    assert len({step.name for step in PIPELINE}) == len(PIPELINE)
    for step in PIPELINE:
        if step.switch is not None:
            assert step.without
            assert Config(**dict[str, Any]([step.switch]))


@pytest.mark.parametrize("name", ["calibrate", "ranges", "write"])
def test_a_pass_that_stands_before_what_it_requires_is_a_fault(monkeypatch, name):
    monkeypatch.setattr(pipeline, "PIPELINE", [step for step in PIPELINE if step.name != name])
    with pytest.raises(RuntimeError, match="stands before what provides"):
        eptq_onnx.quantize(small_convnet(), images(4), Config(preset="fast"), progress=silent)


@pytest.mark.parametrize("name", ["score", "optimize"])
def test_a_pass_without_gradients_is_left_out_with_a_note(monkeypatch, name):
    [step] = [step for step in PIPELINE if step.name == name]

    def refuse(self: Pass, state: object, ctx: object) -> State:
        raise GradientError("none of this is differentiable.")

    monkeypatch.setattr(type(step), "run", refuse)
    result = eptq_onnx.quantize(small_convnet(), images(8), Config(steps=2), progress=silent)
    assert f"{step.without}: none of this is differentiable." in result.report.notes


@pytest.mark.parametrize("name", [step.name for step in PIPELINE if step.switch is not None])
def test_a_pass_that_does_not_fit_the_memory_is_left_out_with_a_note(monkeypatch, name):
    [step] = [step for step in PIPELINE if step.name == name]
    monkeypatch.setattr(type(step), "memory", lambda self, state, samples: 10**15)
    result = eptq_onnx.quantize(
        small_convnet(), images(8), Config(steps=2, max_memory="1TB"), progress=silent
    )
    assert name not in result.report.seconds
    [note] = [note for note in result.report.notes if note.startswith(step.without)]
    assert "of memory" in note


def test_passes_are_timed_and_estimated():
    told = []
    result = eptq_onnx.quantize(
        small_convnet(), images(8), Config(steps=2), progress=lambda *said: told.append(said[0])
    )
    passes = [step.name for step in PIPELINE if step.name in result.report.seconds]
    assert [name for name in result.report.seconds if name in passes] == passes
    # What is done already is part of the whole.
    assert set(result.report.estimate.shares) <= {"normalize", "plan", *passes}
    assert set(result.report.estimate.shares) >= {"normalize", "plan", "calibrate", "reconstruct", "verify"}
    assert told.index("estimate") < told.index("calibrate")


def test_the_runner_leaves_out_what_is_not_enabled():
    class Never(Pass):
        name = "never"
        provides = ()

        def enabled(self, ctx):
            return False

        def run(self, state, ctx):
            raise AssertionError

    state = State(small_convnet(), small_convnet(), plan=UNSET)
    assert Runner([Never()]).run(state, UNSET) is state
