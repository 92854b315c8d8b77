"""Ctrl-C and SIGTERM at any moment: nothing temporary stays, nothing half-written, one line, and the exit
code of the signal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, small_convnet

pytestmark = pytest.mark.once

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}


TWO_STEPS = """
    from dataclasses import replace
    from eptq_onnx.training import loop
    class Short(loop.Effort):
        @classmethod
        def of(cls, *given): return replace(super().of(*given), steps=2, checks=(2,))
    loop.Effort = Short
"""
"""Code that ends the optimization after two steps."""


class Run:
    """A command on a model that is stored in the temporary folder, as large ones are."""

    def __init__(self, folder: Path, body: str = "") -> None:
        onnx.save(small_convnet(), folder / "model.onnx")
        np.savez(folder / "data.npz", image=images(24))
        (folder / "out.onnx").write_bytes(b"before")
        (folder / "tmp").mkdir()
        self.folder = folder
        arguments = [
            "quantize",
            "model.onnx",
            "--data",
            "data.npz",
            "-o",
            "out.onnx",
            "--steps",
            "100000",
            "--report",
            "r.json",
        ]
        # Whoever runs the tests may have had signals ignored, as nohup does.
        script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
from eptq_onnx.interrupts import command
with command():
    print("ready", file=sys.stderr, flush=True)
    from eptq_onnx.proto import store
    store.LARGE = 1000
{body}
    from eptq_onnx.cli import app
    app({arguments!r}, prog_name="eptq-onnx")
"""
        environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONPATH": os.getcwd()}
        options: dict[str, Any] = {
            "cwd": folder,
            "env": environment,
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        self.process = subprocess.Popen([sys.executable, "-c", script], **options)
        self.messages: list[str] = []
        self._limit = threading.Timer(120, self.process.kill)
        self._limit.daemon = True
        self._limit.start()

    def wait_for(self, *words: str) -> None:
        """Until a line begins so."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            self.messages.append(text)
            if text.startswith(words):
                return
            assert not text.startswith("verify"), f"there is no step {words}"
        raise AssertionError("".join(self.messages))

    def end(self, *signals: int, pause: float = 0.0) -> tuple[int, float]:
        """Send signals; gives the exit code, and how long it took."""
        began = time.monotonic()
        for number in signals:
            self.process.send_signal(number)
            time.sleep(pause)
        _, rest = self.process.communicate(timeout=60)
        self._limit.cancel()
        self.messages.extend(rest.splitlines(keepends=True))
        return self.process.returncode, time.monotonic() - began

    def assert_clean(self, number: int) -> None:
        assert not list((self.folder / "tmp").iterdir())
        assert sorted(p.name for p in self.folder.iterdir()) == ["data.npz", "model.onnx", "out.onnx", "tmp"]
        assert (self.folder / "out.onnx").read_bytes() == b"before"
        assert self.messages[-1] == f"{WORDS[signal.Signals(number)]}: nothing was written\n"
        assert "Traceback" not in "".join(self.messages)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(tmp_path, number):
    run = Run(tmp_path)
    run.wait_for("optimize")
    assert list((tmp_path / "tmp").iterdir())
    code, _ = run.end(number)
    assert code == 128 + number
    run.assert_clean(number)


DRAWN = random.Random(26)
STEPS = ["ready", "calibrate", "score", "equalize", "closed", "optimize"]
MOMENTS = [(DRAWN.choice(list(WORDS)), DRAWN.choice(STEPS), DRAWN.uniform(0, 1.5)) for _ in range(25)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "step", "delay"), MOMENTS)
def test_a_signal_at_any_moment_ends_a_run_cleanly(tmp_path, number, step, delay):
    run = Run(tmp_path)
    run.wait_for(step)
    time.sleep(delay)
    code, _ = run.end(number)
    assert code == 128 + number
    run.assert_clean(number)


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 0.001, 0.01, 0.05, 0.3])
def test_a_second_signal_ends_it_as_cleanly(tmp_path, pause):
    run = Run(tmp_path)
    run.wait_for("optimize")
    run.process.send_signal(signal.SIGINT)
    time.sleep(pause)
    code, _ = run.end(*([signal.SIGINT] if run.process.poll() is None else []))
    assert code == 130
    run.assert_clean(signal.SIGINT)


STUCK = """
    import time
    import eptq_onnx.passes.calibrate
    def stuck(*arguments, **options):
        print("stuck", file=sys.stderr, flush=True)
        for _ in range(300):
            try:
                time.sleep(0.2)
            except BaseException:
                pass
    eptq_onnx.passes.calibrate.calibrate = stuck
"""


def test_a_second_signal_does_not_wait_for_work_that_does_not_end(tmp_path):
    run = Run(tmp_path, STUCK)
    run.wait_for("stuck")
    code, seconds = run.end(signal.SIGINT, signal.SIGINT, pause=0.5)
    assert code == 130
    assert seconds < 4
    run.assert_clean(signal.SIGINT)


@pytest.mark.slow
def test_one_signal_waits_for_it_a_few_seconds(tmp_path):
    run = Run(tmp_path, STUCK)
    run.wait_for("stuck")
    code, seconds = run.end(signal.SIGTERM)
    assert code == 143
    assert 4 < seconds < 15
    run.assert_clean(signal.SIGTERM)


LOST = """
    import os, signal, gc
    import eptq_onnx.passes.calibrate
    class Odd:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))
    def odd(*arguments, **options):
        Odd()
        import time
        time.sleep(60)
    eptq_onnx.passes.calibrate.calibrate = odd
"""


def test_a_signal_inside_a_destructor_is_not_lost(tmp_path):
    run = Run(tmp_path, LOST)
    code, _ = run.end()
    assert code == 130
    run.assert_clean(signal.SIGINT)


SAVING = """
    import os, signal
    real = os.{name}
    def during(*arguments, **options):
        if any(str(a).endswith((".tmp", ".onnx")) or isinstance(a, int) for a in arguments) and "eptq_onnx.files" in sys.modules:
            import traceback
            if any("files.py" in frame.filename for frame in traceback.extract_stack()):
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)
    os.{name} = during
"""


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_signal_while_the_model_is_written_leaves_the_former_file(tmp_path, name):
    run = Run(
        tmp_path,
        SAVING.format(name=name) + TWO_STEPS,
    )
    code, _ = run.end()
    assert code == 143, run.messages
    run.assert_clean(signal.SIGTERM)


def test_a_signal_after_the_model_was_written_says_so(tmp_path):
    body = """
    import os, signal
    import eptq_onnx.report
    def late(*arguments, **options): os.kill(os.getpid(), signal.SIGINT)
    eptq_onnx.report.Report.print = late
"""
    body += TWO_STEPS
    run = Run(tmp_path, body)
    code, _ = run.end()
    assert code == 130
    assert run.messages[-1] == "interrupted: wrote out.onnx\n"
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    assert not list((tmp_path / "tmp").iterdir())


def test_what_the_parent_made_the_process_ignore_stays_ignored(tmp_path):
    run = Run(
        tmp_path,
        "    import signal; print('hup', signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN, file=sys.stderr)\n",
    )
    run.wait_for("hup True")
    run.end(signal.SIGKILL)
    script = "trap '' HUP; exec " + sys.executable + " -c 'import signal; from eptq_onnx.interrupts import command\nwith command(): " \
        "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)'"  # fmt: skip
    assert (
        subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == "True\n"
    )
