"""tools/fuzz.py: damaged models and calibration files end in a file that loads, or in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent


def fuzzed(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "fuzz.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")
def test_a_limit_that_is_too_tight_is_told_with_the_number_of_the_mutant():
    done = fuzzed("--count", "1", "--seed", "4", "--memory", "1000000")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed 4, number 0" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked processes")
def test_no_mutant_ends_badly():
    done = fuzzed("--count", "100", "--seed", "26")
    assert done.returncode == 0, done.stdout + done.stderr
