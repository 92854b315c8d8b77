"""Console output: any name, any encoding, a terminal of 80 columns or none."""

from __future__ import annotations

import codecs
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.data.origin import Origin
from eptq_onnx.estimates import Estimate
from eptq_onnx.records import KeptFloat
from eptq_onnx.report.console import _Bars, _Lines, _Stream, _Table, duration, line, shown
from eptq_onnx.report.progress import Remaining

pytestmark = pytest.mark.once

NASTY = [
    "[/red]", "[bold]", "[link=http://x]y[/link]", "[/]", "[[", "\\[", ":smile:", "a\nb", "a\r\nb",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x00", "\x07\x08", "\x7f", "\x9b31m",
    "\u202egnp.exe", "\u2028", "\ud800", "日本語" * 40, "e\u0301" * 30,
    "🙂👩\u200d👧", "x" * 100_000, "", " ", "→×ü", "%s {0} {x}",
]  # fmt: skip
names = st.one_of(
    st.sampled_from(NASTY),
    st.text(max_size=40),
    st.text(st.characters(categories=("Cs", "Cc", "Cf", "Zl", "So")), max_size=10),
)


def slow(*values: object) -> list[Any]:
    """More such names, in slow tests because each takes a process."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def report():
    return eptq_onnx.quantize(small_convnet(), images(12), Config(preset="fast")).report


def renamed(report, name: str):
    from dataclasses import replace

    return replace(
        report,
        model=name,
        target=name,
        layers=tuple(replace(x, node=name, op_type=name) for x in report.layers),
        kept_float=(KeptFloat(name, name, name),),
        notes=(name,),
        verification=replace(report.verification, outputs={name: 3.0}, planned={name: 2}),
    )


def assert_harmless(text: str) -> None:
    """Check that a terminal shows this text and obeys no control sequence in it."""
    odd = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert not odd, odd


@settings(max_examples=150, deadline=None)
@given(
    name=names,
    encoding=st.sampled_from(["utf-8", "cp1252", "ascii", "latin-1", "utf-16"]),
    width=st.integers(20, 200),
)
def test_a_report_of_any_names_is_shown_as_it_is(report, name, encoding, width):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    renamed(report, name).print(Console(file=cast(Any, _Stream(stream, "stdout")), width=width))
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert_harmless(text)
    if name in ("[/red]", "[bold]", ":smile:", "[/]") and width >= 100:
        assert f"note: {name}" in text


@pytest.mark.parametrize("name", NASTY)
def test_a_report_of_any_names_is_valid_json(report, name):
    import json

    assert json.loads(renamed(report, name).to_json())["notes"] == [name]


@settings(max_examples=300, deadline=None)
@given(names)
def test_shown_is_one_line_that_keeps_what_is_printable(text):
    result = shown(text)
    assert "\n" not in result
    assert_harmless(result)
    assert len(result) <= 2010
    if text.isprintable() and len(text) < 1000:
        assert result == text
    assert str(line(text)) == result


@pytest.mark.parametrize(
    ("encoding", "arrow"), [("utf-8", "→ ×"), ("cp1252", "-> ×"), ("latin-1", "-> ×"), ("ascii", "-> x")]
)
def test_what_does_not_encode_is_replaced(encoding, arrow):
    raw = io.BytesIO()
    stream = _Stream(io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    stream.write("→ × 漢 ü")
    assert raw.getvalue().decode(encoding).startswith(arrow)
    assert callable(codecs.lookup_error("eptq-onnx.replace"))


def test_a_reader_that_went_away_is_no_error_and_a_full_device_is_told():
    class Broken(io.StringIO):
        error: OSError = BrokenPipeError(32, "Broken pipe")

        def write(self, text: str) -> int:
            raise self.error

        def fileno(self) -> int:
            raise OSError

    stream = _Stream(Broken(), "standard output")
    assert stream.write("a") == 1
    stream.flush()
    Broken.error = OSError(28, "No space left on device")
    with pytest.raises(eptq_onnx.OutputError, match="standard output cannot be written: No space left"):
        _Stream(Broken(), "standard output").write("a")
    assert _Stream(Broken()).write("a") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "less than 10 seconds"), (9.9, "less than 10 seconds"), (10, "about 10 seconds"),
        (58, "about 60 seconds"), (61, "about 1 min"), (100, "about 1 min 40 s"), (599, "about 10 min"),
        (3000, "about 50 min"), (3599, "about 1 h 0 min"), (8000, "about 2 h 13 min"),
    ],
)  # fmt: skip
def test_durations_are_rounded(seconds, text):
    assert duration(seconds) == text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few_flushed_and_tell_what_goes_on():
    class Counting(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    clock, stream = Clock(), Counting()
    lines = _Lines(Console(file=stream), "balanced", clock)
    lines("estimate", 1, 1, Estimate(200.0, 100, {"calibrate": 1.0, "optimize": 200.0}))
    for k in range(10):
        clock.now += 0.01
        lines("calibrate", k + 1, 10)
    for k in range(2000):
        clock.now += 0.1
        lines("optimize", k + 1, 2000, f"loss {k}")
    text = stream.getvalue().splitlines()
    assert text[0].startswith("preset balanced: about 3 minutes")
    assert text[1:3] == ["calibrate", "optimize"]
    assert 18 <= len(text[3:-1]) <= 20
    assert re.fullmatch(r"optimize: 1\d\d of 2000, loss 1\d\d, about \d min( \d0 s)? left", text[3]), text[3]
    assert text[-1] == "optimize: 200 s"
    assert stream.flushed >= len(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(small_convnet(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", image=images(24))
    return tmp_path


COMMAND = [
    sys.executable,
    "-m",
    "eptq_onnx",
    "quantize",
    "model.onnx",
    "--data",
    "data.npz",
    "-o",
    "out.onnx",
]


def environment(**variables: str) -> dict[str, str]:
    skipped = (
        "CI",
        "NO_COLOR",
        "FORCE_COLOR",
        "COLUMNS",
        "LINES",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
        "PYTHONIOENCODING",
    )
    return {
        **{k: v for k, v in os.environ.items() if k not in skipped},
        "PYTHONPATH": os.getcwd(),
        "TERM": "xterm-256color",
        **variables,
    }


def on_terminal(folder: Path, *extra: str, columns: int = 80, **variables: str) -> tuple[int, str]:
    """Return the exit code and the text sent to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *extra],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(**variables),
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    return process.wait(), b"".join(parts).decode()


def screen_lines(sent: str) -> list[str]:
    """Return all lines that were ever on the screen."""
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in re.split(r"[\r\n]+", sent)]


@pytest.mark.parametrize("columns", [80, *slow(60, 40)])
def test_a_narrow_terminal_shows_bars_and_one_time_that_is_left(folder, columns):
    code, sent = on_terminal(folder, "--steps", "40", columns=columns)
    assert code == 0, sent
    lines = screen_lines(sent)
    assert max(len(x) for x in lines if not x.startswith("  eptq-onnx ")) <= columns, "commands are copied"
    bars = [x for x in lines if x.startswith("optimize") and x.count("━") >= 8]
    assert bars
    assert any(re.search(r"\b\d+%", x) for x in bars)
    assert any("loss" in x for x in bars) or columns < 80
    assert any(re.fullmatch(r"(less than|about) .* left", x) for x in lines)
    assert any(x.startswith("preset balanced: ") for x in lines)
    assert not any("left" in x for x in bars), "one time for the whole run, not one a step"
    assert sent.count("\x1b[?25h") >= sent.count("\x1b[?25l") > 0, "the cursor comes back"


def test_a_terminal_without_colours_still_has_bars(folder):
    code, sent = on_terminal(folder, "--steps", "20", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*[349][0-7]", sent)
    assert any(x.startswith("optimize") and "━" in x for x in screen_lines(sent))


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, *slow({"CI": "true"})])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(folder, variables):
    code, sent = on_terminal(folder, "--steps", "5", **variables)
    assert code == 0, sent
    assert "optimize\r\n" in sent
    assert not re.search(r"\x1b\[\d*[AKJ]|\x1b\[\?25", sent)


def encoded(*names: str) -> list[dict[str, str]]:
    return [{"PYTHONIOENCODING": name} for name in names]


@pytest.mark.parametrize(
    "variables",
    [
        {"FORCE_COLOR": "1"}, *encoded("cp1252"),
        *slow({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, *encoded("ascii", "latin-1")),
    ],
    ids=str,
)  # fmt: skip
def test_a_pipe_gets_plain_lines_in_any_encoding(folder, variables):
    done = subprocess.run(
        [*COMMAND, "--steps", "5"], cwd=folder, env=environment(**variables), capture_output=True, check=False
    )
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    messages, summary = done.stderr.decode(encoding), done.stdout.decode(encoding)
    assert done.returncode == 0, messages
    assert_harmless(messages)
    assert {"calibrate", "optimize", "verify"} <= set(messages.split("\n"))
    assert "wrote out.onnx" in summary
    assert ("\x1b[" in summary) == ("FORCE_COLOR" in variables)


@pytest.mark.parametrize(
    "name", ["[/red]\x1b[2J→", *slow("[/red]", "[bold]x", "a\nb", "\x1b[2J", "ü→漢", "\u202e", "x" * 3000)]
)
@pytest.mark.parametrize("encoding", ["ascii", *slow("utf-8")])
def test_names_in_a_model_and_in_errors_are_shown_as_they_are(folder, name, encoding):
    model = small_convnet()
    for k, node in enumerate(model.graph.node):
        node.name = f"{name}{k}"
    onnx.save(model, folder / "model.onnx")
    model.graph.node.add(op_type="QLinearConv", name=name, input=["image"] * 8, output=["quantized"])
    onnx.save(model, folder / "broken.onnx")
    options: dict[str, Any] = {
        "cwd": folder,
        "env": environment(PYTHONIOENCODING=encoding),
        "capture_output": True,
    }
    good = subprocess.run([*COMMAND, "--preset", "fast"], check=False, **options)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([x.replace("model.onnx", "broken.onnx") for x in COMMAND], check=False, **options)
    assert bad.returncode == 2
    assert bad.stderr.count(b"\n") == 1
    for text in (good.stdout, good.stderr, bad.stderr):
        assert_harmless(text.decode(encoding))
    if name.startswith("[/red]"):
        assert b"[/red]" in bad.stderr


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_leaves_early_costs_nothing(folder, both):
    errors = "2>&1" if both else "2>errors"
    command = f"{' '.join(COMMAND)} --preset fast {errors} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("\n0\n"), done.stdout
    onnx.checker.check_model(folder / "out.onnx", full_check=True)
    if not both:
        assert "Traceback" not in (folder / "errors").read_text()
        assert "Broken" not in (folder / "errors").read_text()


def test_closed_streams_and_a_full_device(folder):
    closed = subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} --preset fast >&- 2>&-"],
        cwd=folder,
        env=environment(),
        check=False,
    )
    assert closed.returncode == 0
    before = (folder / "out.onnx").read_bytes()
    onnx.checker.check_model(folder / "out.onnx", full_check=True)
    command = ["bash", "-c", f"{' '.join(COMMAND)} --preset fast >/dev/full"]
    full = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert (
        full.stderr.splitlines()[-1] == "error: standard output cannot be written: No space left on device."
    )
    assert (folder / "out.onnx").read_bytes() == before


def test_where_samples_come_from_is_said_before_the_run_on_any_console():
    origin = Origin("photos", {"image": "size=8,fit=crop"}, ("size (the model's input)",))
    text = "data: photos; --image 'size=8,fit=crop'; guessed: size (the model's input)\n"
    out = io.StringIO()
    table = _Table(Console(file=out, force_terminal=True, width=40), Remaining())
    _Bars(table, "fast")("data", 1, 1, origin)
    table.stop()
    assert text in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "")
    plain = io.StringIO()
    _Lines(Console(file=plain, width=40), "fast")("data", 1, 1, origin)
    assert plain.getvalue() == text
