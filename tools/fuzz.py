"""Mutants of small models and calibration files through the whole command, and what becomes of them.

    python tools/fuzz.py --count 1000 --seed 0

Each mutant (see mutants.py) runs in a process of its own, forked from this one, with limits of time and
memory. A model that is refused is run by onnxruntime in another: what runs there with finite outputs should
not have been refused. The exit code is 1 if anything ended badly; ``--only K`` repeats mutant K of the seed
and shows what it says.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a forked process has no pool of threads

import faulthandler
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import onnx
import typer
from mutant_bases import Mutant
from mutants import mutant
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eptq_onnx import cli, probes, runtime

NEWER = "written in an opset that the runtime does not read"
WRITTEN, REFUSED, REFUSED_DATA, REFUSED_UNSAFE = (
    "written",
    "refused",
    "refused: calibration file",
    "refused: unsafe",
)
NOTHING, QUANTIZED = "refused: nothing to quantize", "refused: quantized in another form"
TOO_DEEP = "refused: onnxruntime takes too long to load it"
BAD = (
    "traceback", "crash", "hang", "memory", "more than a sentence", "written by a failed run", "left behind",
    "written but does not load",
    "refused though onnxruntime runs it",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Parameters
    ----------
    kind : str
    calibrated : bool
        It came as far as calibration.
    said : str
        Its standard error.
    seconds : float
    """

    kind: str
    calibrated: bool
    said: str
    seconds: float


@dataclass(frozen=True)
class Limits:
    """Of one process: wall time in seconds, and bytes of memory on top of what this process has."""

    seconds: int
    memory: int


def forked(act: Callable[[], int], limits: Limits, output: Path) -> int:
    """Run ``act`` in a forked process, whose streams go to a file; returns its exit code, or minus the signal
    that ended it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _child(act, limits, output)


def _child(act: Callable[[], int], limits: Limits, output: Path) -> NoReturn:
    code = 70
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        faulthandler.enable(all_threads=False)
        signal.alarm(limits.seconds)
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.memory, used + limits.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = act()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 70 if e.code else 0
    except MemoryError:
        code = 71
    except BaseException:  # whatever it is, it is a fault to be shown
        os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def run(found: Mutant, folder: Path, limits: Limits, extra: list[str]) -> Outcome:
    """One mutant through the command."""
    temporary = folder / "temporary"
    temporary.mkdir()
    places = folder / "in", folder / "out"
    for place in places:
        place.mkdir()
    model, data = found.write(places[0])
    result, log = places[1] / "result.onnx", folder / "log"

    def command() -> int:
        tempfile.tempdir = str(temporary)
        arguments = [
            "quantize",
            str(model),
            "--data",
            str(data),
            "-o",
            str(result),
            "--preset",
            "fast",
            "--no-measure-speed",
            *extra,
        ]
        cli.app(arguments, prog_name="eptq-onnx")
        return 0

    began = time.monotonic()
    code = forked(command, limits, log)
    seconds = time.monotonic() - began
    said = log.read_text(encoding="utf-8", errors="replace") + (
        "" if code in (0, 2) else f"\nexit code {code}"
    )
    calibrated = any(line == "calibrate" for line in said.splitlines())
    kind = _kind(code, said, result, places[1], temporary)
    if kind == WRITTEN and forked(lambda: _loads(result), limits, folder / "loaded"):
        newer = (
            max(o.version for o in onnx.load(result).opset_import if not o.domain)
            > probes.newest_readable()[0]
        )
        kind, said = (
            NEWER if newer else "written but does not load",
            said + (folder / "loaded").read_text(encoding="utf-8", errors="replace"),
        )
    if kind == REFUSED:
        kind = _why(found, said)
    if kind == REFUSED and not forked(lambda: _runs(model, found.samples), limits, folder / "float"):
        kind = "refused though onnxruntime runs it"
    return Outcome(kind, calibrated, said, seconds)


def _kind(code: int, said: str, result: Path, folder: Path, temporary: Path) -> str:
    if code == -signal.SIGALRM:
        return "hang"
    if code == 71 or "MemoryError" in said:
        return "memory"
    if code < 0:
        return "crash"
    if code and result.exists():
        return "written by a failed run"
    if set(os.listdir(folder)) - {result.name} or os.listdir(temporary):
        return "left behind"
    if code == 0:
        return WRITTEN if result.exists() else "traceback"
    if code != 2 or "Traceback" in said:
        return "traceback"
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return REFUSED if len(lines) == 1 and said.splitlines()[-1] == lines[0] else "more than a sentence"


def _why(found: Mutant, said: str) -> str:
    last = said.splitlines()[-1]
    if "nothing to quantize" in last:
        return NOTHING
    if "quantized in a form" in last:
        return QUANTIZED
    if "nested more than" in last:
        return TOO_DEEP
    if found.in_data:
        return REFUSED_DATA
    if "external data" in last and any(
        m.startswith("external data") and "valid" not in m for m in found.said
    ):
        return REFUSED_UNSAFE
    return REFUSED


def _session(path: Path) -> runtime.Session:
    return runtime.Session(path)


def _loads(path: Path) -> int:
    _session(path)
    onnx.load(path)
    return 0


def _runs(path: Path, samples: dict[str, NDArray[np.generic]]) -> int:
    """0 if onnxruntime runs the model on all samples, as one batch or one by one, and the outputs are finite.

    Neither way may give other outputs: what the whole batch decides differs from what single samples decide.
    """
    session = _session(path)
    count = min(len(v) for v in samples.values())
    ways = (
        [samples],
        [{n: v[k : k + 1] for n, v in samples.items()} for k in range(count)],
        [{n: v[k] for n, v in samples.items()} for k in range(count)],
    )
    runs = False
    for way in filter(None, ways):
        try:
            results = [session.run({n: v for n, v in f.items() if n in session.inputs}) for f in way]
        except Exception as e:
            print(e)
            continue
        values = [v for found in results for v in found.values()]
        if not all(np.isfinite(v).all() for v in values if isinstance(v, np.ndarray) and v.dtype.kind == "f"):
            return 1
        runs = True
    return 0 if runs else 1


def main(
    count: Annotated[int, typer.Option(help="Mutants.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the mutants.")] = 0,
    limit: Annotated[int, typer.Option(help="Seconds that one may take.")] = 120,
    memory: Annotated[
        int, typer.Option(help="Bytes of memory that one may take on top of the loaded program.")
    ] = 2 * 10**9,
    only: Annotated[int | None, typer.Option(help="Number of the one mutant to run, and to show.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Folder to write the files of that mutant to.")] = None,
) -> None:
    """Print the table."""
    console = Console(highlight=False, soft_wrap=True)
    probes.newest_readable()
    probes.channel_block()
    counts: Counter[str] = Counter()
    bad: dict[str, list[str]] = defaultdict(list)
    calibrated, began = 0, time.monotonic()
    for number in range(count) if only is None else [only]:
        found = mutant(seed, number)
        extra = ["--steps", "2"] if number % 10 == 7 else []
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(found, Path(folder), Limits(limit, memory), extra)
        counts[outcome.kind] += 1
        calibrated += outcome.calibrated
        said = "; ".join(s[:120] for s in found.said)
        label = f"seed {seed}, number {number}, {found.name} {' '.join(extra)}: {said}"
        if outcome.kind in BAD:
            bad[outcome.kind].append(label)
            last = (outcome.said.strip().splitlines() or [""])[-1]
            console.print(Text(f"{outcome.kind}: {label} ({outcome.seconds:.1f} s)\n    {last[:300]}"))
        if only is not None:
            console.print(Text(f"{label}\n{outcome.kind}\n{outcome.said}"))
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                found.write(keep)
    table = Table("outcome", "mutants")
    for kind, n in sorted(counts.items(), key=lambda item: (item[0] in BAD, item[0])):
        table.add_row(kind, str(n), style="red" if kind in BAD else "")
    total = sum(counts.values())
    console.print(table)
    console.print(
        f"{total} mutants of seed {seed} in {time.monotonic() - began:.0f} s; "
        f"{calibrated / max(total, 1):.0%} reached calibration"
    )
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
