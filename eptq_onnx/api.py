"""The public functions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto
from typing_extensions import Unpack

from eptq_onnx import gate, runtimes, scratch
from eptq_onnx.comparison import LEAST_DB, SAMPLES, Compared, Sample, samples_of
from eptq_onnx.comparison import compare as side_by_side
from eptq_onnx.config import Accuracy, Config, Gate, Reading
from eptq_onnx.config.accuracy import AccuracyOptions
from eptq_onnx.config.reading import ReadingOptions
from eptq_onnx.control import controlled
from eptq_onnx.data.readers import Nothing, Source, is_nothing
from eptq_onnx.data.readers import files_of as files_of_data
from eptq_onnx.data.sheet import contact_sheet
from eptq_onnx.dataless import without_data
from eptq_onnx.encodings import encodings_of
from eptq_onnx.errors import ConfigError
from eptq_onnx.files import check_apart, check_writable, model_outputs
from eptq_onnx.gate import Verified
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.external import files_of as files_of_model
from eptq_onnx.inspection import Inspection
from eptq_onnx.inspection import inspect as look_at
from eptq_onnx.memory import peak_memory
from eptq_onnx.parallel import owned_threads
from eptq_onnx.passes.base import Progress
from eptq_onnx.prepare import final
from eptq_onnx.proto import store
from eptq_onnx.ranking import sensitivity as ranking
from eptq_onnx.report import Report
from eptq_onnx.resume import Resume
from eptq_onnx.rules import Lint
from eptq_onnx.rules import lint as check_rules
from eptq_onnx.runtime import custom_operators
from eptq_onnx.runtimes.bench import Bench, effort_of
from eptq_onnx.runtimes.bench import bench as measured
from eptq_onnx.runtimes.feeds import inputs_of
from eptq_onnx.scoring import evaluate_of
from eptq_onnx.sensitivities import Sensitivity
from eptq_onnx.start import silent, start, surroundings, target_of
from eptq_onnx.summary import Costs, report_of
from eptq_onnx.workdir import Workdir


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
    encodings : dict of str to object
        The scales of activations and weights in AIMET's schema 1.0; see the option ``encodings`` of `Config`.
    """

    model: ModelProto
    report: Report
    inputs: tuple[tuple[str, Path], ...] = ()
    contact_sheet: bytes = b""
    encodings: Mapping[str, Any] = field(default_factory=dict)

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
    data: Source | None = None,
    config: Config | None = None,
    *,
    progress: Progress = silent,
    **accuracy: Unpack[AccuracyOptions],
) -> Result:
    """Quantize a float ONNX model with EPTQ.

    Parameters
    ----------
    model : path, bytes or ModelProto
        The float model; it is never modified.
    data : Source, optional
        Calibration samples without labels: one array per model input, samples along the first axis; or feeds,
        loaders, data sets, files, folders, or a function that gives them. `Data` around it says how to read
        it, such as ``Data("photos", image="imagenet")``. None where no ranges are needed: with
        ``activations="dynamic"``, and where only weights are quantized.
    config : Config, optional
    progress : callable, optional
    **accuracy
        ``evaluate``, a function that scores a model, and ``max_drop``, how much worse than the float model's
        the score may be; ``higher_is_better`` and ``max_evaluations``. The function takes an object with
        ``run(names, feeds)``, ``get_inputs()`` and ``get_outputs()`` as onnxruntime's sessions have them, and
        returns a number. See `Accuracy`.

    Returns
    -------
    Result

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    config, kept_score = config or Config(), Accuracy(**accuracy)
    data = Nothing() if data is None else data
    inputs = tuple(input_files(model, data, config))
    if config.timings is not None and not config.timings.exists():
        check_writable(config.timings)
    kept = Workdir(config.workdir) if config.workdir is not None else nullcontext()
    with surroundings(config), scratch.folder() as folder, kept as workdir:
        found = _quantize(model, data, (config, kept_score), progress, _Places(folder, workdir))
        return replace(found, inputs=inputs)


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
    rules = target_of(target)
    with scratch.folder() as folder:
        return check_rules(io.load(model, folder, quantized=True), rules)


def inspect(
    model: str | os.PathLike[str] | bytes | ModelProto,
    config: Config | None = None,
    **reading: Unpack[ReadingOptions],
) -> Inspection:
    """Look at a float model without data: what it takes, what would run on integers, what a run costs.

    Parameters
    ----------
    model : path, bytes or ModelProto
        The float model; it is never modified.
    config : Config, optional
        The options that `quantize` would get.
    **reading
        What is known of the data: ``samples`` (250 by default), ``image``, ``audio``, ``tokenizer``; see
        `Data`.

    Returns
    -------
    Inspection

    Raises
    ------
    EptqError
        If there is nothing to quantize, or something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    config = config or Config()
    with owned_threads(config.threads), custom_operators(config.custom_ops), scratch.folder() as folder:
        return look_at(model, config, Reading(**reading), folder)


def sensitivity(
    model: str | os.PathLike[str] | bytes | ModelProto,
    data: Source,
    config: Config | None = None,
    *,
    progress: Progress = silent,
) -> Sensitivity:
    """Rank the weights and activations of a float model by what they do to the outputs if quantized alone.

    Takes at most 60 float passes (runs of all samples through the float model), calibration included.

    Parameters
    ----------
    model : path, bytes or ModelProto
        The float model; it is never modified.
    data : Source
        Calibration samples; see `quantize`.
    config : Config, optional
        The options that `quantize` would get; bits, patterns and target say what is quantized, and how.
        Weights are rounded to nearest, and all operators with an integer kernel run on integers.
    progress : callable, optional

    Returns
    -------
    Sensitivity

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    config = config or Config()
    with surroundings(config), scratch.folder() as folder:
        return ranking(model, data, config, folder, progress)


def compare(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    data: Source,
    *,
    most: int = SAMPLES,
    below: float = LEAST_DB,
) -> Compared:
    """Compare two models on samples: outputs, the layers where they part, the worst samples.

    Operators are computed as ONNX defines them. `verify` runs the kernels of a target's runtime.

    Parameters
    ----------
    first, second : path
        Two files with the same inputs, float or quantized. The first is the reference.
    data : Source
        Samples, best those that calibration has not seen; see `quantize`.
    most : int
        Most samples to compare outputs on.
    below : float
        Ratio in dB below which a tensor counts as the place where they part.

    Returns
    -------
    Compared

    Raises
    ------
    EptqError
        If something is wrong; see `eptq_onnx.errors` for the subclasses.
    """
    with owned_threads(None), scratch.folder() as folder:
        return side_by_side((Path(first), Path(second)), data, folder, most, below)


def samples(model: str | os.PathLike[str] | bytes | ModelProto, data: Source) -> Iterator[Sample]:
    """Yield samples as a model takes them, with the names of their files: for a metric of one's own.

    Parameters
    ----------
    model : path, bytes or ModelProto
    data : Source
        See `quantize`, such as ``Data("photos", image="imagenet")``.

    Yields
    ------
    Sample

    Raises
    ------
    EptqError
        If the data does not fit, or the model takes several samples a run.
    """
    if isinstance(model, (str, os.PathLike)):
        return samples_of(io.read_file(Path(model)), data)
    return samples_of(io.load(model, quantized=True), data)


def input_files(
    model: str | os.PathLike[str] | bytes | ModelProto, data: Source, config: Config
) -> list[tuple[str, Path]]:
    """List the files that `quantize` reads, with descriptions; none may be overwritten."""
    target = (
        [("the target file", Path(os.path.abspath(config.target)))] if config.target.endswith(".toml") else []
    )
    libraries = [("a custom-operator library", path) for path in config.custom_ops]
    timings = [("the timings file", config.timings)] if config.timings is not None else []
    given = config.encodings.file if config.encodings is not None else ""
    ranges = [("the encodings", Path(given))] if given else []
    return [*files_of_model(model), *files_of_data(data), *target, *libraries, *timings, *ranges]


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
    options: tuple[Config, Accuracy],
    progress: Progress,
    places: _Places,
) -> Result:
    """Quantize a model; see `quantize`."""
    given, accuracy = options
    if is_nothing(data) and accuracy.evaluate is not None:
        raise ConfigError(
            "option evaluate needs samples, from which the search knows what to spare: give some with --data."
        )
    if is_nothing(data) and given.weights_only:
        made, report = without_data(model, given, places.folder, progress)
        return Result(store.load_all(made), report)
    if accuracy.evaluate is not None:
        evaluate_of(accuracy.evaluate)  # what cannot be imported is said before anything runs
    begun = start(model, data, given, places.folder, progress)
    runner, prepared, state, ctx = begun.runner, begun.prepared, begun.state, begun.ctx
    if places.workdir is not None:
        runner.resume = Resume(places.workdir, state, ctx)
    with runner.timed("estimate"):
        expected = runner.estimate(state, ctx)
    ctx, trail = replace(ctx, expected=expected.seconds), None
    if accuracy.evaluate is None:
        state = runner.run(state, ctx)
    else:
        kept = controlled(begun, ctx, accuracy, places.workdir)
        state, ctx, trail = kept.state, kept.ctx, kept.trail
    found = report_of(prepared, state, ctx, Costs(expected, runner.seconds, peak_memory()))
    if trail is not None:
        # The options that were asked for lead to the same file again, by the same path.
        asked = {**given.model_dump(mode="json"), **prepared.reading, **accuracy.given()}
        found = replace(found, config=asked, trail=trail, notes=(*found.notes, *trail.unavailable))
    sheet = contact_sheet(ctx.samples, prepared.origin, prepared.model)
    written = store.load_all(final(sink(state.packed), prepared.opset, prepared.ir_version))
    return Result(written, found, contact_sheet=sheet, encodings=encodings_of(state.plan, state.rounding))


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
    rules = target_of(target)
    pair = Path(float_model), Path(quantized)
    required = required or Gate()
    with custom_operators(required.custom_ops), scratch.folder() as folder:
        return gate.verify(pair, data, rules, required, folder)
