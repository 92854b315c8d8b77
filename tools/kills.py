"""Kill runs that keep a workdir, run them again, and compare what they write with what an undisturbed run
writes.

    python tools/kills.py models/digits_resnet.onnx models/digits_calib.npz --runs 20
    python tools/kills.py MODEL DATA --kills 5 --option weight_bits=4

Each run is killed (SIGKILL, at times drawn uniformly over the time of an undisturbed run), and the same
command then goes on from the workdir. The exit code is 1 if anything but the same bytes comes out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Command:
    """The command that is killed.

    Parameters
    ----------
    model, data : str
    options : sequence of str
        Further arguments.
    """

    model: str
    data: str
    options: Sequence[str] = ()

    def start(self, output: Path, workdir: Path | None) -> subprocess.Popen[bytes]:
        """Start it in a process group of its own."""
        kept = [] if workdir is None else ["--workdir", str(workdir)]
        arguments = [
            sys.executable,
            "-m",
            "eptq_onnx",
            "quantize",
            self.model,
            "--data",
            self.data,
            "-o",
            str(output),
        ]
        return subprocess.Popen(
            [*arguments, *kept, *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def finish(self, output: Path, workdir: Path | None) -> str:
        """Run it to its end; returns the digest of what it writes."""
        process = self.start(output, workdir)
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(
                f"the command ended with exit code {process.returncode}: {errors.decode()[-500:]}"
            )
        return digest(output)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disturbed(command: Command, folder: Path, waits: Sequence[float], right: str) -> tuple[str, int]:
    """Kill a run again and again, each time after a while, and then let it end.

    Returns
    -------
    str
        What is wrong; empty if nothing is.
    int
        Kills that came before the run had ended.
    """
    output, workdir, kills = folder / "output.onnx", folder / "workdir", 0
    for wait in waits:
        process = command.start(output, workdir)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if output.exists() and digest(output) != right:
            return "a killed run left a file that is not the result", kills
    return "" if command.finish(output, workdir) == right else "another result", kills


def main() -> int:
    """Print one line a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--runs", type=int, default=1, help="runs, each with a workdir of its own")
    parser.add_argument("--kills", type=int, default=1, help="kills of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the command, without dashes",
    )
    given = parser.parse_args()
    options = [
        part
        for option in given.option
        for part in ("--" + option.partition("=")[0], option.partition("=")[2])
    ]
    command, rng = Command(given.model, given.data, options), np.random.default_rng(given.seed)
    bad = 0
    with tempfile.TemporaryDirectory() as top:
        began = time.perf_counter()
        right = command.finish(Path(top) / "undisturbed.onnx", None)
        seconds = time.perf_counter() - began
        print(f"undisturbed: {seconds:.1f} s, {right[:16]}", flush=True)
        for run in range(given.runs):
            folder = Path(top) / str(run)
            folder.mkdir()
            times = np.sort(rng.uniform(0, seconds, given.kills))
            wrong, kills = disturbed(command, folder, np.diff(times, prepend=0.0).tolist(), right)
            bad += bool(wrong)
            when = ", ".join(f"{t:.1f}" for t in times)
            print(f"run {run}: {kills} kills, after {when} s: {wrong or 'the same bytes'}", flush=True)
    print(f"{given.runs - bad} of {given.runs} runs wrote the same bytes")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
