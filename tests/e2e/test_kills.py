"""A run that is killed at any moment goes on from its workdir to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
KILLS = int(os.environ.get("EPTQ_KILLS", "20"))


@pytest.mark.slow
@pytest.mark.once
def test_default_runs_that_are_killed_at_random_times_go_on_to_the_same_bytes():
    models = ROOT / "models"
    command = [
        sys.executable,
        str(ROOT / "tools" / "kills.py"),
        str(models / "digits_resnet.onnx"),
        str(models / "digits_calib.npz"),
    ]
    done = subprocess.run(
        [*command, "--runs", str(KILLS)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{KILLS} of {KILLS} runs wrote the same bytes" in done.stdout
