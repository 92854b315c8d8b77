from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import MODELS
from graphs import images, small_convnet
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from eptq_onnx import ConfigError, jobs
from eptq_onnx.cli import app
from eptq_onnx.endings import Ended, differing, fronts

SWEEP = """
data = "data.npz"
preset = "fast"
measure_speed = false

[sweep]
bits = ["w8a8", "w4a8"]
target = ["portable", "ort-x64"]

[[jobs]]
model = "f.onnx"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(small_convnet(), tmp_path / "f.onnx")
    np.savez(tmp_path / "data.npz", image=images(12))
    (tmp_path / "sweep.toml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["batch", *arguments], env={"COLUMNS": "160"})


def test_a_sweep_writes_all_files_and_a_page(folder):
    result = invoke("sweep.toml")
    assert result.exit_code == 0, result.output
    names = [f"f.{bits}.{target}" for bits in ("w8a8", "w4a8") for target in ("portable", "ort-x64")]
    for name in names:
        assert (folder / "sweep" / f"{name}.onnx").exists()
        assert json.loads((folder / "sweep" / f"{name}.json").read_text())["report"]["layers"]
        assert name in result.stdout
    page = (folder / "sweep" / "index.html").read_text()
    assert all(name in page for name in names)
    assert "<svg" in page
    assert "4 jobs of 1 model, all done" in result.stdout
    assert not any((folder / "sweep" / "work").iterdir())


def test_what_has_ended_is_not_done_again(folder, monkeypatch):
    assert invoke("sweep.toml").exit_code == 0
    done: list[str] = []
    perform = jobs.perform

    def noted(job):
        done.append(job.name)
        return perform(job)

    monkeypatch.setattr(jobs, "perform", noted)
    first = (folder / "sweep" / "index.html").read_bytes()
    assert invoke("sweep.toml").exit_code == 0
    assert not done
    assert (folder / "sweep" / "index.html").read_bytes() == first
    # A missing file, a damaged record and a changed option are done again, and nothing else.
    (folder / "sweep" / "f.w8a8.portable.onnx").unlink()
    (folder / "sweep" / "f.w4a8.portable.json").write_text("{")
    assert invoke("sweep.toml").exit_code == 0
    assert sorted(done) == ["f.w4a8.portable", "f.w8a8.portable"]
    (folder / "sweep.toml").write_text(SWEEP.replace('"fast"', '"fast"\nseed = 1'))
    assert invoke("sweep.toml").exit_code == 0
    assert len(done) == 6
    # So are all when the samples change.
    np.savez(folder / "data.npz", image=images(13))
    assert invoke("sweep.toml").exit_code == 0
    assert len(done) == 10


def test_a_job_that_fails_leaves_the_others(folder):
    (folder / "two.toml").write_text(
        'data = "data.npz"\npreset = "fast"\n[[jobs]]\nmodel = "missing.onnx"\n[[jobs]]\nmodel = "f.onnx"\n'
    )
    result = invoke("two.toml")
    assert result.exit_code == 1
    assert "missing failed: " in " ".join(result.stdout.split())
    assert (folder / "two" / "f.onnx").exists()
    assert "2 jobs of 2 models, 1 of them failed" in (folder / "two" / "index.html").read_text()


def test_a_hostile_name_is_harmless_in_the_page(folder):
    (folder / "x.toml").write_text(
        'data = "data.npz"\npreset = "fast"\n[[jobs]]\nmodel = "f.onnx"\nname = "<script>alert(1)</script>"\n'
        '[[jobs]]\nmodel = "<img src=x>.onnx"\n'
    )
    assert invoke("x.toml").exit_code == 1
    page = (folder / "x" / "index.html").read_text()
    assert "<script>alert" not in page
    assert "<img" not in page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"have no tables \[\[jobs\]\]"),
        ("jobs = 1", r"have no tables \[\[jobs\]\]"),
        ("[[jobs", "cannot be read"),
        ("[[jobs]]\nname='x'", "a job has no model"),
        ("colour=1\n[[jobs]]\nmodel='f.onnx'", "option colour is unknown"),
        ("workdir='x'\n[[jobs]]\nmodel='f.onnx'", "option workdir is not for jobs"),
        ("seed=-1\n[[jobs]]\nmodel='f.onnx'", "the job f: option seed=-1 is wrong"),
        ("output=1\n[[jobs]]\nmodel='f.onnx'", "output is no path: 1"),
        ("[sweep]\nbits='w8a8'\n[[jobs]]\nmodel='f.onnx'", r"each option in \[sweep\] needs a list"),
        ("[[jobs]]\nmodel='f.onnx'\n[[jobs]]\nmodel='F.onnx'", "several have the name F"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(text, told, tmp_path):
    (tmp_path / "jobs.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        jobs.read(tmp_path / "jobs.toml")


def test_a_missing_file_and_unknown_workers_are_told(folder):
    assert "cannot be read: No such file" in invoke("missing.toml").stderr
    assert "workers 'nobody' are unknown" in invoke("sweep.toml", "--workers", "nobody").stderr


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 5), st.integers(1, 5) | st.none(), st.booleans())
    )
)
def test_the_front_holds_what_nothing_beats(drawn):
    ended = [
        Ended(str(k), model, "no" if failed else "", bytes=size, sqnr_db=ratio)
        for k, (model, size, ratio, failed) in enumerate(drawn)
    ]
    found = {e.name: e for e in fronts(ended)}
    assert len(found) == len(ended)
    for one in found.values():
        better = [
            o
            for o in found.values()
            if not o.error and o.model == one.model
            if o.bytes <= one.bytes and o.quality >= one.quality
            if o.bytes < one.bytes or o.quality > one.quality
        ]
        assert one.best == (not one.error and not better)


def test_options_that_are_alike_are_not_shown():
    ended = [Ended(str(k), "m", options={"bits": k, "seed": 0}) for k in range(2)]
    assert differing(ended) == ["bits"]


def killed_twice(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a batch, kill it twice on the way, and let it end."""
    command = [sys.executable, "-m", "eptq_onnx", "batch", "sweep.toml", *options]
    environment = {**os.environ, "PYTHONPATH": str(MODELS.parent)}
    for wanted in (2, 5):
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list((folder / "sweep").glob("f.*.json"))) < wanted:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    return subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["threads", "ray"])
def test_a_sweep_of_twelve_jobs_survives_two_kills(folder, workers):
    if workers == "ray":
        pytest.importorskip("ray", reason="Ray is not installed here")
    text = SWEEP.replace('["w8a8", "w4a8"]', '["w8a8", "w4a8", "w6a8"]').replace(
        '"ort-x64"]', '"ort-x64"]\nseed = [0, 1]'
    )
    (folder / "sweep.toml").write_text(text.replace("measure_speed", 'objective = "integers"\nmeasure_speed'))
    result = killed_twice(folder, "--workers", workers)
    assert result.returncode == 0, result.stderr
    assert "12 jobs of 1 model, all done" in result.stdout
    killed = {p.name: p.read_bytes() for p in (folder / "sweep").glob("f.*.onnx")}
    assert len(killed) == 12
    (folder / "sweep").rename(folder / "before")
    assert invoke("sweep.toml").exit_code == 0
    for name, content in killed.items():
        assert (folder / "sweep" / name).read_bytes() == content
