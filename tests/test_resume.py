"""Runs that keep a workdir: taken up again, they give the same bytes, and nothing is taken that has
changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import images, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.errors import GradientError, OutputError
from eptq_onnx.passes.optimize import Optimize
from eptq_onnx.passes.ranges import Ranges
from eptq_onnx.passes.score import Score
from eptq_onnx.pipeline import PIPELINE
from eptq_onnx.proto import store
from eptq_onnx.watched import Reads
from eptq_onnx.workdir import Workdir

OPTIONS: dict[str, Any] = {"steps": 20, "weight_bits": 4, "measure_speed": False, "target": "ort-x64"}
ALL = [
    "rotate",
    "score",
    "equalize",
    "calibrate",
    "dynamic",
    "float fallback",
    "ranges",
    "reconstruct",
    "optimize",
    "write",
    "pack",
    "verify",
]
_TAKEN = "taken from the workdir: "


def run(workdir: Path | None, seed: int = 0, **options: Any) -> eptq_onnx.Result:
    return eptq_onnx.quantize(
        small_convnet(),
        images(40, seed=seed),
        Config(**{**OPTIONS, "workdir": workdir, **options}),
        progress=silent,
    )


def taken(result: eptq_onnx.Result) -> list[str]:
    found = [note.removeprefix(_TAKEN).split(", ") for note in result.report.notes if note.startswith(_TAKEN)]
    return found[0] if found else []


def content(result: eptq_onnx.Result) -> bytes:
    return result.model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def alone() -> bytes:
    return content(run(None))


def test_a_run_that_ended_is_taken_whole(tmp_path, alone):
    first = run(tmp_path / "w")
    again = run(tmp_path / "w")
    assert (taken(first), taken(again)) == ([], ALL)
    assert content(first) == content(again) == alone
    ours, theirs = (
        {name: getattr(r.report, name) for name in ("layers", "optimization", "verification")}
        for r in (first, again)
    )
    assert ours == theirs
    assert again.report.seconds["reconstruct"] < first.report.seconds["reconstruct"]
    assert again.report.estimate.steps == 0


@pytest.mark.parametrize(
    ("change", "last"),
    [
        ({"measure_speed": True}, "verify"),
        ({"steps": 10}, "reconstruct"),
        ({"descent_passes": 1}, "ranges"),
        ({"max_noise": 0.2}, "calibrate"),
        ({"activation_range": "minmax"}, "equalize"),
        ({"rotate": False}, None),
        ({"seed": 1}, None),
        ({"target": "ort-x64-vnni"}, None),
    ],
)
def test_another_option_makes_anew_what_follows_from_it(tmp_path, change, last):
    run(tmp_path / "w")
    changed = run(tmp_path / "w", **change)
    assert taken(changed)[: len(ALL)] == ALL[: ALL.index(last) + 1 if last else 0] or set(
        taken(changed)
    ) < set(ALL)
    if last is not None:
        assert last in taken(changed)
    assert content(changed) == content(run(None, **change))
    # What was there stays there.
    assert taken(run(tmp_path / "w")) == ALL


def test_what_comes_out_the_same_is_not_made_anew_behind_it(tmp_path):
    run(tmp_path / "w")
    # Too small a change to leave anything else float.
    changed = taken(run(tmp_path / "w", max_noise=0.0501))
    # The written model names its options.
    assert changed == [name for name in ALL if name not in ("float fallback", "write", "pack", "verify")]


def test_other_samples_make_everything_anew(tmp_path):
    run(tmp_path / "w")
    assert taken(run(tmp_path / "w", seed=1)) == []


def test_another_version_makes_everything_anew(tmp_path, monkeypatch):
    run(tmp_path / "w")
    monkeypatch.setattr("eptq_onnx.resume._code", lambda: "another")
    assert taken(run(tmp_path / "w")) == []


@pytest.mark.parametrize("step", PIPELINE[:-1], ids=lambda step: step.name)
def test_a_run_that_ends_inside_a_pass_goes_on_before_it(tmp_path, monkeypatch, step, alone):
    if step.name not in ALL:
        pytest.skip("this network has no use for it")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(step), "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "w")
    again = run(tmp_path / "w")
    assert taken(again) == ALL[: ALL.index(step.name)]
    assert content(again) == alone


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "soft"}, {"optimizer": "radam", "start": "nearest"}, {"activation_bits": 4}]
)
@pytest.mark.parametrize("last", [1, 7, 13, 19])
def test_the_optimization_goes_on_from_its_last_check(tmp_path, options, last):
    def stop(step: str, done: int, total: int, detail: object = "") -> None:
        if step == "optimize" and done == last + 1:
            raise KeyboardInterrupt

    config = Config(**{**OPTIONS, "workdir": tmp_path / "w", "patience": 0, **options})
    with pytest.raises(KeyboardInterrupt):
        eptq_onnx.quantize(small_convnet(), images(40), config, progress=stop)
    steps = []
    again = eptq_onnx.quantize(
        small_convnet(),
        images(40),
        config,
        progress=lambda *told: steps.append(told[1]) if told[0] == "optimize" else None,
    )
    # A check every second step; the first is always kept, later ones as time allows.
    assert 1 <= steps[0] <= last + 1
    assert (steps[0] > 1) is (last > 1)
    before = "ranges" if options.get("start") == "nearest" else "reconstruct"
    assert taken(again)[-1] == (f"optimize (its first {steps[0] - 1} steps)" if last > 1 else before)
    assert content(again) == content(run(None, patience=0, **options))
    assert again.report.optimization is not None
    assert len(again.report.optimization.losses) == 20


def test_passes_that_are_left_out_for_want_of_gradients_stay_left_out(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise GradientError("none of this is differentiable.")

    monkeypatch.setattr(Score, "run", refuse)
    monkeypatch.setattr(Optimize, "run", refuse)
    first, again = run(tmp_path / "w"), run(tmp_path / "w")
    assert taken(again) == ALL
    assert [n for n in again.report.notes if not n.startswith(_TAKEN)] == list(first.report.notes)


def test_a_pass_that_sets_what_it_does_not_declare_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranges, "provides", ("nearest",))
    with pytest.raises(RuntimeError, match="ranges provides rounding without saying so"):
        run(tmp_path / "w")
    run(None)


def test_every_way_to_read_an_option_is_seen():
    config = Config(**OPTIONS)
    ways = {
        "an attribute": (lambda c: c.seed, {"seed"}),
        "a property": (lambda c: c.optimizes, {"optimizes"}),
        "all of them": (lambda c: c.model_dump(), set(Config.model_fields)),
        "some of them": (lambda c: c.model_dump(include={"seed", "steps"}), {"seed", "steps"}),
        "a copy": (lambda c: c.model_copy(update={"seed": 2}), set(Config.model_fields)),
        "its fields": (dict, set(Config.model_fields)),
        "comparison": (lambda c: c == config, set(Config.model_fields)),
        "its text": (lambda c: c.model_dump_json(), set(Config.model_fields)),
    }
    for name, (way, wanted) in ways.items():
        from eptq_onnx.watched import _WatchedConfig

        watched = _WatchedConfig.of(config)
        way(watched)
        assert watched.read == wanted, name


def test_every_way_to_read_a_state_is_seen():
    from dataclasses import replace

    from eptq_onnx.passes.base import UNSET, Context, State
    from eptq_onnx.watched import FIELDS

    model = small_convnet()
    ctx = Context(*[UNSET] * 13)
    digests = dict.fromkeys(FIELDS, "digest")
    ways = {
        "an attribute": (lambda s: s.plan, {"plan"}),
        "a property": (lambda s: s.network, {"executed", "plan", "calibration", "scores"}),
        "one that is not changed": (lambda s: s.changed(plan=None).noting("a").executed, {"executed"}),
        "a copy": (lambda s: replace(s, plan=None), set(FIELDS) - {"plan"}),
    }
    for name, (way, wanted) in ways.items():
        reads = Reads(replace(ctx, config=Config(), given=Config()), State(model, model, plan=UNSET))
        way(reads.state)
        assert set(reads.told(digests)["fields"]) == wanted, name


def test_a_workdir_in_use_is_refused_before_anything_else(tmp_path):
    with Workdir(tmp_path / "w"), pytest.raises(OutputError, match="in use"):
        run(tmp_path / "w")


_KILLED = """
import os, signal, sys
left = int(sys.argv.pop(1))
def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.link", "os.remove") and "/w/" in str(arguments[0]) and "tmp" in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.path[:0] = [sys.argv.pop(1)]
sys.argv[0] = "eptq-onnx"
from eptq_onnx.__main__ import main
sys.addaudithook(count)
main()
"""


@pytest.mark.once
@pytest.mark.parametrize("operation", np.random.default_rng(0).integers(1, 110, 4).tolist())
def test_a_run_that_is_killed_while_it_writes_goes_on_to_the_same_bytes(tmp_path, operation, alone):
    model, data, output = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "o.onnx"
    model.write_bytes(small_convnet().SerializeToString())
    np.savez(data, image=images(40))
    package = str(Path(eptq_onnx.__file__).parent.parent)
    command = [
        "quantize",
        str(model),
        "--data",
        str(data),
        "-o",
        str(output),
        "--workdir",
        str(tmp_path / "w"),
        "--steps",
        "20",
    ]
    command += ["--weight-bits", "4", "--no-measure-speed", "--target", OPTIONS["target"]]

    def start(*before: str) -> int:
        return subprocess.run(
            [sys.executable, *before, *command], capture_output=True, env={**os.environ}, check=False
        ).returncode

    assert start("-c", _KILLED, str(operation), package) == -signal.SIGKILL
    assert not output.exists()
    assert start("-c", _KILLED, str(10**6), package) == 0
    assert output.read_bytes() == alone
    assert not list((tmp_path / "w").rglob("*.tmp"))


def test_weights_in_files_go_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr(store, "_HEAVY", 256)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Optimize, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "w", max_memory="8GB")
    again = run(tmp_path / "w", max_memory="8GB")
    assert taken(again) == ALL[: ALL.index("optimize")]
    assert content(again) == content(run(None, max_memory="8GB"))


def test_what_is_left_float_is_kept_by_a_workdir(tmp_path):
    # A range that spoils the outputs, so that the input stays float.
    spoiling = {"name": "image", "bw": 8, "scale": [0.01], "offset": [0]}
    ranges = {"version": "1.0.0", "activation_encodings": [spoiling]}
    first, second = (run(tmp_path / "w", preset="fast", steps=0, encodings=ranges) for _ in "ab")
    assert any("quantizing image alone" in kept.reason for kept in first.report.kept_float)
    assert content(second) == content(first)
    assert "float fallback" in taken(second)
