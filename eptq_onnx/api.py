"""The public functions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import ModelProto

from eptq_onnx import engines, gate, pipeline, runtimes, scratch, targets
from eptq_onnx.config import Config, Gate
from eptq_onnx.data.readers import Source
from eptq_onnx.data.readers import files_of as files_of_data
from eptq_onnx.data.sheet import contact_sheet
from eptq_onnx.data.splits import share_out
from eptq_onnx.errors import ConfigError
from eptq_onnx.files import check_apart, check_writable, model_outputs
from eptq_onnx.gate import Verified
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.external import files_of as files_of_model
from eptq_onnx.memory import peak_memory
from eptq_onnx.method.estimate import multiplications
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.ops import check_roles, executed
from eptq_onnx.parallel import owned_threads
from eptq_onnx.passes.base import Context, Progress, State
from eptq_onnx.prepare import counting, final, prepare
from eptq_onnx.proto import store
from eptq_onnx.report import Report
from eptq_onnx.resume import Resume
from eptq_onnx.rules import Lint
from eptq_onnx.rules import lint as check_rules
from eptq_onnx.runtime import custom_operators
from eptq_onnx.runtimes.bench import Bench, effort_of
from eptq_onnx.runtimes.bench import bench as measured
from eptq_onnx.runtimes.feeds import inputs_of
from eptq_onnx.summary import Costs, report_of
from eptq_onnx.targets import Target
from eptq_onnx.workdir import Workdir


def _silent(step: str, done: int, total: int, detail: object = "") -> None:
    return None


@dataclass(frozen=True)
class Result:
    """The quantized model with its report.

    Parameters
    ----------
    model : ModelProto
    report : Report
    inputs : tuple of (str, path)
        Files that the run read, each with a description.
    contact_sheet : bytes
        A PNG of what the network saw, if the samples are pictures that a recipe prepared; else empty.
    """

    model: ModelProto
    report: Report
    inputs: tuple[tuple[str, Path], ...] = ()
    contact_sheet: bytes = b""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; see `eptq_onnx.graph.io.save`.

        Raises
        ------
        OutputError
            If the model cannot be written, or would overwrite a file that the run read.
        """
        check_apart(model_outputs(path), self.inputs)
        io.save(self.model, path)


def quantize(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    config: Config | None = None,
    *,
    progress: Progress = _silent,
) -> Result:
    """Quantize a float ONNX model with EPTQ.

    Parameters
    ----------
    model : path, bytes or ModelProto
        The float model; it is never modified.
    data : Source
        Calibration samples without labels: one array per model input, samples along the first axis; or feeds,
        loaders, data sets, files, folders, or a function that gives them. `Data` around it says how to read
        it, such as ``Data("photos", image="imagenet")``.
    config : Config, optional
    progress : callable, optional

    Returns
    -------
    Result

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    config = config or Config()
    inputs = tuple(input_files(model, data, config))
    if config.timings is not None and not config.timings.exists():
        check_writable(config.timings)
    kept = Workdir(config.workdir) if config.workdir is not None else nullcontext()
    with (
        owned_threads(config.threads),
        custom_operators(config.custom_ops),
        scratch.folder() as folder,
        kept as workdir,
    ):
        return replace(_quantize(model, data, config, progress, _Places(folder, workdir)), inputs=inputs)


def lint(model: str | os.PathLike[str] | bytes | ModelProto, target: str = "auto") -> Lint:
    """Check a Q/DQ model, from this or any other tool, against the rules of a target.

    Parameters
    ----------
    model : path, bytes or ModelProto
        The quantized model; it is never modified.
    target : str
        Name of a shipped target, or path of a target file; see the option ``target`` of `Config`.

    Returns
    -------
    Lint

    Raises
    ------
    ModelError
        If the model cannot be read.
    ConfigError
        If there is no such target.
    """
    rules = _target(target)
    with scratch.folder() as folder:
        return check_rules(io.load(model, folder, quantized=True), rules)


def input_files(
    model: str | os.PathLike[str] | bytes | ModelProto, data: Source, config: Config
) -> list[tuple[str, Path]]:
    """List the files that `quantize` reads, with descriptions; none may be overwritten."""
    target = (
        [("the target file", Path(os.path.abspath(config.target)))] if config.target.endswith(".toml") else []
    )
    libraries = [("a custom-operator library", path) for path in config.custom_ops]
    timings = [("the timings file", config.timings)] if config.timings is not None else []
    return [*files_of_model(model), *files_of_data(data), *target, *libraries, *timings]


def _target(name: str) -> Target:
    """Read a target and check that its rows match the operator table."""
    found = targets.load(name)
    check_roles(found)
    return found


@dataclass(frozen=True)
class _Places:
    """Where a run keeps its files.

    Parameters
    ----------
    folder : str
        Temporary folder for the weights of a large model.
    workdir : Workdir or None
        Keeps results of passes beyond the run.
    """

    folder: str
    workdir: Workdir | None


def _quantize(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    given: Config,
    progress: Progress,
    places: _Places,
) -> Result:
    """Quantize a model; see `quantize`."""
    runner = pipeline.Runner(pipeline.PIPELINE)
    target = _target(given.target)
    target.storage_for(given.storage)
    target.check_bits(given)
    chosen = engines.choose(given.engine)
    engine = chosen() if given.needs_gradients else None
    with runner.timed("normalize"):
        prepared = prepare(model, data, target, given, places.folder)
        samples = prepared.samples
        if prepared.origin.recipe or prepared.origin.made_up:
            progress("data", 1, 1, prepared.origin)
        float_model = executed(prepared.model, prepared.found)
    with runner.timed("plan"):
        plan = make_plan(prepared.model, target, given)
        config, state = runner.affordable(
            counting(given, prepared), State(prepared.model, float_model, plan), samples
        )
        fit = targets.fit_of(given.target, target)
        state = state if fit is None else state.noting(fit)
    ctx = Context(
        given=given,
        config=config,
        target=target,
        engine=engine,
        samples=samples,
        shares=share_out(samples, config),
        found=prepared.found,
        multiplications=multiplications(float_model, plan, samples),
        source=model,
        folder=places.folder,
        float_bytes=prepared.float_bytes,
        rest=prepared.rest,
        progress=progress,
    )
    if places.workdir is not None:
        runner.resume = Resume(places.workdir, state, ctx)
    with runner.timed("estimate"):
        expected = runner.estimate(state, ctx)
    state = runner.run(state, replace(ctx, expected=expected.seconds))
    report = report_of(prepared, state, ctx, Costs(expected, runner.seconds, peak_memory()))
    sheet = contact_sheet(samples, prepared.origin, prepared.model)
    return Result(store.load_all(final(sink(state.packed), prepared)), report, contact_sheet=sheet)


def bench(
    float_model: str | os.PathLike[str],
    quantized: str | os.PathLike[str],
    data: Source | None = None,
    *,
    runtime: str = runtimes.DEFAULT,
    threads: int = 1,
    seconds: float = 10.0,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
) -> Bench:
    """Measure two files of one model side by side in a runtime.

    They run in turn, in pairs. With one thread, seconds are those of CPU time, which other load on the
    machine affects little; with more, they are wall-clock time.

    Parameters
    ----------
    float_model, quantized : path
        Any two ONNX files with the same inputs.
    data : Source, optional
        Samples, the first of which is run; see `quantize`. By default inputs are made up, and notes say how.
    runtime : str
        Name of the runtime: ``onnxruntime``, ``openvino``, ``openvino-f32``, ``web`` or ``node``.
    threads : int
        Threads of one operator; 0 for one per core.
    seconds : float
        Seconds to spend on the latency of both files.
    custom_ops : sequence of path
        Shared libraries of custom operators, for onnxruntime.

    Returns
    -------
    Bench

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    if custom_ops and runtime != runtimes.DEFAULT:
        raise ConfigError(f"{runtime} takes no libraries of custom operators: leave custom_ops out.")
    verifier, pair = runtimes.make(runtime), (Path(float_model), Path(quantized))
    with custom_operators(custom_ops):
        inputs = inputs_of(verifier, pair, data)
        return measured(verifier, pair, inputs, threads, effort_of(seconds))


def verify(
    float_model: str | os.PathLike[str],
    quantized: str | os.PathLike[str],
    data: Source,
    target: str = "auto",
    required: Gate | None = None,
) -> Verified:
    """Check a quantized file, from this or any other tool, before it is used.

    Checks the target's rules, compares outputs, and counts kernels and measures the latency in the target's
    runtime, if it is installed. What cannot be found out is listed with the reason.

    Parameters
    ----------
    float_model, quantized : path
        Two ONNX files of one model.
    data : Source
        Samples on which outputs are compared, best those that calibration has not seen; see `quantize`.
    target : str
        Name of a shipped target, or path of a target file; see the option ``target`` of `Config`.
    required : Gate, optional
        What the file has to meet besides the rules, and how much is run.

    Returns
    -------
    Verified

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    rules = _target(target)
    pair = Path(float_model), Path(quantized)
    required = required or Gate()
    with custom_operators(required.custom_ops), scratch.folder() as folder:
        return gate.verify(pair, data, rules, required, folder)


def bench_files(
    float_model: str | os.PathLike[str], quantized: str | os.PathLike[str], data: Source | None
) -> list[tuple[str, Path]]:
    """List the files that `bench` reads, with descriptions; none may be overwritten."""
    read = files_of_data(data) if data is not None else []
    return [*files_of_model(float_model), *files_of_model(quantized), *read]
