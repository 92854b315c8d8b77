"""Many runs: a list of models, or a sweep over options, with what has ended kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eptq_onnx._version import __version__
from eptq_onnx.api import input_files, quantize
from eptq_onnx.config import Accuracy, Config, Reading
from eptq_onnx.config.files import SECTIONS
from eptq_onnx.data.readers import Data, Nothing
from eptq_onnx.endings import Ended
from eptq_onnx.errors import ConfigError, EptqError, OutputError, WorkerError, one_line
from eptq_onnx.files import write_atomically
from eptq_onnx.report import Report
from eptq_onnx.report.speed import pace_in_words
from eptq_onnx.workers import make

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OF_JOBS = ("model", "data", "name")
"""What a job has beside options."""
_WORK = "work"
"""Folder, in that of the results, where jobs that have not ended keep theirs."""
_OWN = ("workdir", "workers")
"""Options that the batch chooses for its jobs."""


@dataclass(frozen=True)
class Job:
    """One run.

    Parameters
    ----------
    name : str
        Of its files.
    model : str
        Path of the float model.
    data : str or None
        Calibration samples, as the option ``--data`` takes them.
    options : dict of str to object
        Of `Config`, `Reading` and `Accuracy`.
    folder : str
        Where the results go.
    """

    name: str
    model: str
    data: str | None
    options: Mapping[str, Any]
    folder: str

    @property
    def output(self) -> Path:
        """The quantized model."""
        return Path(self.folder) / f"{self.name}.onnx"

    @property
    def record(self) -> Path:
        """What tells that it has ended, and how."""
        return Path(self.folder) / f"{self.name}.json"

    @property
    def work(self) -> Path:
        """Where it keeps results of passes until it has ended."""
        return Path(self.folder) / _WORK / self.name

    @property
    def config(self) -> Config:
        """The options of the run."""
        return Config(**{name: value for name, value in self.options.items() if name in Config.model_fields})

    @property
    def source(self) -> Data:
        """The samples."""
        own = {name: value for name, value in self.options.items() if name in Reading.model_fields}
        return Data(Nothing() if self.data is None else self.data, **own)

    @property
    def accuracy(self) -> dict[str, Any]:
        """The options on a score of one's own."""
        return {name: value for name, value in self.options.items() if name in Accuracy.model_fields}

    @property
    def digest(self) -> str:
        """What the result depends on: options, version, and the files that it reads, by size and time."""
        files = [path for _, path in input_files(self.model, self.source, self.config)]
        stamps = [(str(f), s.st_size, s.st_mtime_ns) for f in files if f.exists() and (s := f.stat())]
        counted = {name: value for name, value in self.options.items() if name != "threads"}
        told = json.dumps([__version__, self.model, self.data, counted, stamps], default=str)
        return hashlib.sha256(told.encode()).hexdigest()


def read(path: Path) -> list[Job]:
    """Read a file of jobs.

    Raises
    ------
    ConfigError
        If it cannot be read, or a job is wrong; the message names the job.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"the jobs {path} cannot be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise ConfigError(f"the jobs {path} cannot be read: {one_line(e)}.") from e
    listed, sweep = given.pop("jobs", None), given.pop("sweep", {})
    folder = given.pop("output", str(path.with_suffix("")))
    if not isinstance(listed, list) or not listed or not all(isinstance(j, dict) for j in listed):
        raise ConfigError(f"the jobs {path} have no tables [[jobs]]: give one for each model.")
    if not isinstance(folder, str):
        raise ConfigError(f"the jobs {path}: output is no path: {folder!r}.")
    if not isinstance(sweep, dict) or not all(isinstance(v, list) and v for v in sweep.values()):
        raise ConfigError(f"the jobs {path}: each option in [sweep] needs a list of values.")
    jobs = []
    for own in listed:
        for values in itertools.product(*sweep.values()):
            swept = dict(zip(sweep, values, strict=True))
            jobs.append(_job({**given, **swept, **own}, swept, folder, path))
    doubles = [j.name for k, j in enumerate(jobs) if j.name.lower() in {i.name.lower() for i in jobs[:k]}]
    if doubles:
        raise ConfigError(f"the jobs {path}: several have the name {doubles[0]}: give each a name.")
    return jobs


def _job(given: Mapping[str, Any], swept: Mapping[str, Any], folder: str, path: Path) -> Job:
    if not isinstance(given.get("model"), str):
        raise ConfigError(f"the jobs {path}: a job has no model: give its path.")
    options = {name: value for name, value in given.items() if name not in _OF_JOBS}
    for name in options:
        if name not in SECTIONS:
            raise ConfigError(f"the jobs {path}: option {name} is unknown.")
        if name in _OWN:
            raise ConfigError(f"the jobs {path}: option {name} is not for jobs: give it to the command.")
    words = [given["name"]] if "name" in given else [Path(given["model"]).stem]
    words += [_word(given[name]) for name in swept]
    job = Job(re.sub(r"[^\w.=-]+", "-", ".".join(words)), given["model"], given.get("data"), options, folder)
    try:
        Accuracy(**job.accuracy)
        job.config, job.source  # noqa: B018 (both check themselves)
    except EptqError as e:
        raise ConfigError(f"the job {job.name}: {e}") from e
    return job


def _word(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def run(jobs: Sequence[Job], workers: str) -> Iterator[Ended]:
    """Run all jobs that have not ended, and yield how each has, as they end; first those of former runs.

    Parameters
    ----------
    jobs : sequence of Job
    workers : str
        Name of the backend. In threads of this process they run one after the other, each on all cores; as
        tasks of Ray side by side, each on as many cores as its option ``threads`` says, by default 1.

    Raises
    ------
    ConfigError
        If there are no such workers.
    InstallError, WorkerError
        If there are no workers of that kind here.
    OutputError
        If the folder of the results cannot be written to.
    """
    backend = make(workers)
    try:
        for job in jobs:
            (Path(job.folder) / _WORK).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the folder {jobs[0].folder} cannot be made: {e.strerror or e}.") from e
    left = []
    for job in jobs:
        known = _known(job)
        if known is None:
            left.append(job)
        else:
            yield known
    if not left:
        return
    threads = 1 if backend.apart else None
    given = [replace(job, options={"threads": threads, **job.options}) for job in left]
    for number, found in backend.tasks(perform, given, lambda job: job.config.threads or 1):
        if isinstance(found, WorkerError):
            yield Ended(left[number].name, left[number].model, error=str(found))
        else:
            yield found


def perform(job: Job) -> Ended:
    """Run a job, write its files, and return how it has ended. It goes on from where it was interrupted."""
    try:
        digest = job.digest
        config = job.config.model_copy(update={"workdir": job.work})
        result = quantize(job.model, job.source, config, **job.accuracy)
        result.save(job.output)
        ended = _summary(job, result.report)
        held = {"digest": digest, "ended": asdict(ended), "report": _plain(result.report)}
        write_atomically(job.record, (json.dumps(held, indent=2) + "\n").encode())
    except EptqError as e:
        return Ended(job.name, job.model, error=str(e), options=job.options)
    shutil.rmtree(job.work, ignore_errors=True)
    return ended


def _plain(report: Report) -> Any:
    return json.loads(report.to_json())


def _summary(job: Job, report: Report) -> Ended:
    v = report.verification
    ratios = [s for s in v.outputs.values() if math.isfinite(s)]
    return Ended(
        job.name,
        job.model,
        output=str(job.output),
        verdict=report.verdict.assurance.value,
        sqnr_db=min(ratios) if ratios else None,
        bytes=v.quantized_bytes,
        float_bytes=v.float_bytes,
        ratio=None if report.speed is None else report.speed.ratio,
        pace="" if report.speed is None else pace_in_words(report.speed),
        seconds=sum(report.seconds.values()),
        options={n: value for n, value in job.options.items() if n != "threads"},
    )


def _known(job: Job) -> Ended | None:
    """Return how a job has ended in a former run, if its result is there and nothing has changed."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads(job.record.read_text(encoding="utf-8"))
        if held["digest"] == job.digest and job.output.exists():
            return Ended(**held["ended"])
    return None
