"""What a run writes never takes the place of what it reads, and never half."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from typer.testing import CliRunner

import eptq_onnx
from eptq_onnx import Config, OutputError, scratch
from eptq_onnx.cli import app
from eptq_onnx.files import Replacement, check_apart, check_writable, write_atomically
from eptq_onnx.graph import io
from eptq_onnx.proto import store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    onnx.save(
        small_convnet(), "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    np.savez("data.npz", image=images(12))
    return tmp_path


def _plain(path: str) -> str:
    return path


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _detour(path: str) -> str:
    return f"sub/../{path}"


def _symlink(path: str) -> str:
    os.symlink(os.path.abspath(path), "sub/link")
    return "sub/link"


def _symlink_of_a_symlink(path: str) -> str:
    os.symlink(f"../{path}", "sub/first")
    os.symlink("first", "sub/second")
    return "sub/second"


def _linked_folder(path: str) -> str:
    os.symlink(".", "here")
    return f"here/{path}"


def _hard_link(path: str) -> str:
    os.link(path, "sub/hard")
    return "sub/hard"


WAYS = [_plain, _absolute, _detour, _symlink, _symlink_of_a_symlink, _linked_folder, _hard_link]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("used", ["model.onnx", "weights.bin", "data.npz"])
@pytest.mark.parametrize("option", ["-o", "--report"])
def test_an_output_that_is_an_input_is_refused_before_anything_runs(folder, way, used, option, monkeypatch):
    monkeypatch.setattr("eptq_onnx.cli.quantize.run", lambda *a, **k: pytest.fail("it ran"))
    path = way(used)
    before = contents(folder)
    outputs = ["-o", path] if option == "-o" else ["-o", "out.onnx", "--report", path]
    result = CliRunner().invoke(app, ["quantize", "model.onnx", "--data", "data.npz", *outputs])
    assert result.exit_code == 2, result.output
    assert "would overwrite" in result.stderr
    assert path in result.stderr
    assert result.stderr.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("link", ["model", "data"])
def test_inputs_given_by_links_are_known(folder, way, link):
    """The other way round: the input is the link, the output its file."""
    used = {"model": "model.onnx", "data": "data.npz"}[link]
    given = {"model": "model.onnx", "data": "data.npz", link: way(used)}
    if link == "model":  # what it refers to is beside the link
        for place in {os.path.dirname(given["model"]) or "."} - {"."}:
            if not os.path.exists(f"{place}/weights.bin"):
                os.symlink("../weights.bin", f"{place}/weights.bin")
    result = CliRunner().invoke(app, ["quantize", given["model"], "--data", given["data"], "-o", used])
    assert result.exit_code == 2
    assert "would overwrite" in result.stderr


@pytest.mark.parametrize("link", [os.rename, os.link, os.symlink])
def test_the_data_of_a_large_output_spares_the_inputs(folder, link):
    link("weights.bin", "out.onnx.data")
    if not os.path.exists("weights.bin"):
        os.symlink("out.onnx.data", "weights.bin")
    result = CliRunner().invoke(app, ["quantize", "model.onnx", "--data", "data.npz", "-o", "out.onnx"])
    assert result.exit_code == 2
    assert (
        "the data file of the output out.onnx.data would overwrite the external data of the float model"
        in result.stderr
    )


@pytest.mark.parametrize("report", ["out.onnx", "./out.onnx", "sub/../out.onnx", "OUT.onnx", "out.onnx.data"])
def test_a_report_is_no_model(folder, report):
    result = CliRunner().invoke(
        app, ["quantize", "model.onnx", "--data", "data.npz", "-o", "out.onnx", "--report", report]
    )
    assert result.exit_code == 2
    assert "the report" in result.stderr


def test_samples_in_a_folder_scripts_and_target_files_are_inputs(folder):
    os.mkdir("feeds")
    for k in range(4):
        np.savez(f"feeds/{k}.npz", image=images(1))
    Path("loader.py").write_text("def load(): return None")
    Path("mine.toml").write_text("")
    for options in (["--data", "feeds", "-o", "feeds/2.npz"], ["--data", "loader:load", "-o", "loader.py"]):
        result = CliRunner().invoke(app, ["quantize", "model.onnx", *options])
        assert (result.exit_code, "would overwrite" in result.stderr) == (2, True), options
    result = CliRunner().invoke(
        app, ["quantize", "model.onnx", "--data", "data.npz", "-o", "mine.toml", "--target", "mine.toml"]
    )
    assert "would overwrite the target file" in result.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_result_knows_what_it_came_from(folder, way):
    result = eptq_onnx.quantize("model.onnx", "data.npz", Config(preset="fast"))
    for used in ("model.onnx", "weights.bin", "data.npz"):
        for made in ("sub/link", "sub/first", "sub/second", "sub/hard", "here"):
            if os.path.lexists(made):
                os.unlink(made)
        path = folder / way(used)
        before = contents(folder)
        os.chdir(folder.parent)
        with pytest.raises(OutputError, match="would overwrite"):
            result.save(path)
        os.chdir(folder)
        assert contents(folder) == before
    result.save("fine.onnx")
    onnx.checker.check_model("fine.onnx", full_check=True)


def test_paths_that_only_look_alike_are_fine(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"the same")
    check_apart(
        {"the output": tmp_path / "a.onnx"},
        [("the model", tmp_path / "b.onnx"), ("the data", tmp_path / "gone.npz")],
    )


@pytest.mark.parametrize("path", ["a\0b", "/dev/null", "pipe", "/dev/stdout"])
def test_what_is_no_ordinary_file_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(OutputError, match=r"ordinary file|null characters"):
        check_writable(path)


def failing(name: str, nth: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the nth call of a function of ``os`` fail."""
    real, calls = getattr(os, name), []

    def fail(*args: object, **options: Any) -> object:
        calls.append(1)
        if len(calls) == nth:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize(
    ("name", "nth"), [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("link", 1)]
)
@pytest.mark.parametrize("there", [True, False])
def test_two_files_are_replaced_together_or_not_at_all(tmp_path, monkeypatch, error, name, nth, there):
    paths = [tmp_path / "m.data", tmp_path / "m"]
    if there:
        for path in paths:
            path.write_text("before")
    elif name == "link":
        pytest.skip("nothing to keep")
    before = contents(tmp_path)
    failing(name, nth, error, monkeypatch)
    expected = OutputError if isinstance(error, OSError) else type(error)
    recovers = name == "link" and isinstance(
        error, OSError
    )  # a file system without hard links: a copy does it
    try:
        with Replacement(*paths) as temporary:
            for path in temporary:
                Path(path).write_text("after")
    except expected:
        assert not recovers
        assert contents(tmp_path) == before
    else:
        assert recovers
        assert set(contents(tmp_path).values()) == {b"after"}
    assert not scratch._process.files


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_what_was_there_survives_a_failure_while_writing(tmp_path, error):
    (tmp_path / "m").write_text("before")

    def write() -> None:
        with Replacement(tmp_path / "m") as (path,):
            Path(path).write_text("half")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        write()
    assert contents(tmp_path) == {str(tmp_path / "m"): b"before"}


def test_a_full_disk_spares_the_model_and_its_data(tmp_path, monkeypatch):
    """The old pair stays a pair, whichever write fails."""
    model = small_convnet()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "spare"))
    model.graph.node.append(onnx.helper.make_node("Identity", ["spare"], ["s"]))
    monkeypatch.setattr(io, "PROTOBUF_LIMIT", 1000)
    monkeypatch.setattr(store, "LARGE", 1000)
    io.save(model, tmp_path / "m.onnx")
    before = contents(tmp_path)
    assert len(before) == 2
    for name, nth in (("replace", 1), ("replace", 2), ("fsync", 1), ("fsync", 2)):
        with monkeypatch.context() as patched:
            failing(name, nth, OSError(28, "No space left on device"), patched)
            with pytest.raises(OutputError, match=r"m\.onnx cannot be written: No space left on device"):
                io.save(model, tmp_path / "m.onnx")
        assert contents(tmp_path) == before


def test_a_killed_process_leaves_the_file_whole(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"before")
    script = f"""
import os, signal
from eptq_onnx.files import Replacement
with Replacement({str(target)!r}) as (path,):
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert target.read_bytes() == b"before"


def test_a_report_that_cannot_be_written_does_not_cost_the_model(folder, monkeypatch):
    os.mkdir("reports")
    Path("out.onnx").write_text("before")

    def gone(path: object, data: bytes) -> None:
        raise OutputError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr("eptq_onnx.cli.quantize.write_atomically", gone)
    arguments = [
        "model.onnx",
        "--data",
        "data.npz",
        "-o",
        "out.onnx",
        "--report",
        "reports/r.json",
        "--preset",
        "fast",
    ]
    result = CliRunner().invoke(app, ["quantize", *arguments])
    assert result.exit_code == 2
    assert (
        "out.onnx was written, but not the report: reports/r.json cannot be written: No space left on device."
        in result.stderr
    )
    onnx.checker.check_model("out.onnx", full_check=True)


@pytest.mark.parametrize("name", ["x" * 250, "ü→.onnx", "[red].onnx", " leading", "-dash"])
def test_any_name_that_the_file_system_takes(tmp_path, name):
    write_atomically(tmp_path / name, b"data")
    assert contents(tmp_path) == {str(tmp_path / name): b"data"}
