"""Measure the cost of loading a model, in a separate process.

``python -m eptq_onnx.runtimes.loading NAME FILE THREADS LIBRARY ...`` prints it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from eptq_onnx import runtimes
from eptq_onnx.errors import EptqError, ModelError
from eptq_onnx.memory import peak_memory
from eptq_onnx.runtime import custom_libraries, custom_operators
from eptq_onnx.runtimes.base import LoadCost, clock_of


def load_cost(name: str, path: Path, threads: int) -> LoadCost:
    """Return the cost of loading a model file with a verifier in a fresh process.

    Raises
    ------
    ModelError
        If it cannot be loaded.
    """
    libraries = custom_libraries()
    command = [sys.executable, "-m", __name__, name, str(path), str(threads), *libraries]
    # The child must import the same modules as this process, however this one was started.
    places = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    done = subprocess.run(command, env=places, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        raise ModelError(f"{path} cannot be loaded in a separate process: {lines[-1]}")
    return LoadCost(**json.loads(done.stdout.splitlines()[-1]))


def _measured(name: str, path: Path, threads: int) -> LoadCost:
    verifier, clock = runtimes.make(name), clock_of(threads)
    before, began = psutil.Process().memory_info().rss, clock()
    with verifier.load(path, threads):
        return LoadCost(clock() - began, max(peak_memory() - before, 0))


if __name__ == "__main__":
    try:
        with custom_operators(sys.argv[4:]):
            cost = _measured(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except EptqError as e:
        sys.exit(str(e))
    print(json.dumps(vars(cost)))
