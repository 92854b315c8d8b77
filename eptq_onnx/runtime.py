"""The only module that imports onnxruntime: checks of the installation, and sessions."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TypeProto

from eptq_onnx import devices, parallel, scratch
from eptq_onnx.errors import ConfigError, EptqError, InstallError, ModelError, OutputError, one_line
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto import store, weights
from eptq_onnx.proto.types import has_8_bit_floats, value_type
from eptq_onnx.recipe import Recipe, made

PROTOBUF_LIMIT = 2**31 - 2**20
"""Limit on the size of a protobuf message: 2 GiB, less some room for what onnxruntime adds."""

LAYOUT_DOMAIN = "com.microsoft.nchwc"
"""Domain of the operators that compute on blocks of channels."""

OWN_DOMAINS = frozenset((
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training",
    "com.microsoft", LAYOUT_DOMAIN,
))  # fmt: skip
"""Domains of onnxruntime's own operators; operators of all other domains are custom."""

NO_KERNEL = "NOT_IMPLEMENTED"
"""Part of onnxruntime's error message if it has no kernel for an operator and type."""

_VARIANTS = ("", "-gpu", "-directml", "-openvino", "-training", "-training-cpu")
_DISTRIBUTIONS = tuple(f"onnxruntime{variant}" for variant in _VARIANTS)
_INSTALL = (
    'install it with: pip install "eptq-onnx[standard]", '
    'or "eptq-onnx[training]" on Linux x86-64 with Python up to 3.12'
)


@cache  # every session asks, and looking takes ten times as long as making a small session
def installed_distributions() -> dict[str, str]:
    """Return name and version of every installed distribution that provides the ``onnxruntime`` package."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _conflict(found: dict[str, str]) -> InstallError:
    listing = " and ".join(f"{name} {version}" for name, version in found.items())
    return InstallError(
        f"{listing} share one package folder and overwrote each other: uninstall them all "
        f"(pip uninstall -y {' '.join(found)}), then {_INSTALL}."
    )


def load() -> ModuleType:
    """Import onnxruntime.

    Raises
    ------
    InstallError
        If it is not installed, or two builds have overwritten each other.
    """
    found = installed_distributions()
    try:
        import onnxruntime
        from onnxruntime.capi import _pybind_state
    except ImportError as e:
        if len(found) > 1:
            raise _conflict(found) from e
        if found:
            raise InstallError(
                f"onnxruntime is installed but cannot be imported ({e}): reinstall it, or {_INSTALL}."
            ) from e
        raise InstallError(f"onnxruntime is not installed: {_INSTALL}.") from e
    if not hasattr(onnxruntime, "InferenceSession") or not hasattr(_pybind_state, "InferenceSession"):
        raise (
            _conflict(found)
            if len(found) > 1
            else InstallError(f"onnxruntime is damaged: reinstall it, or {_INSTALL}.")
        )
    if len(found) > 1 and onnxruntime.__version__ not in found.values():
        raise _conflict(found)
    onnxruntime.set_default_logger_severity(4)
    module: ModuleType = onnxruntime
    return module


def is_training_build() -> bool:
    """Return True if the installed onnxruntime can build gradient graphs.

    Raises
    ------
    InstallError
        If a training build is installed, but another build has overwritten it.
    """
    load()
    from onnxruntime.capi import _pybind_state

    if hasattr(_pybind_state, "GradientGraphBuilder"):
        return True
    found = installed_distributions()
    if any("training" in name for name in found) and len(found) > 1:
        raise _conflict(found)
    return False


def load_gradient_builder() -> Any:
    """Return the pybind module that has ``GradientGraphBuilder``.

    Raises
    ------
    InstallError
        If the installed onnxruntime is not a training build.
    """
    if not is_training_build():
        raise InstallError(
            f"onnxruntime {load().__version__} has no gradient builder, which the engine 'training' needs: "
            "choose the engine 'standard', or uninstall it "
            f"(pip uninstall -y {' '.join(installed_distributions()) or 'onnxruntime'}), "
            'then pip install "eptq-onnx[training]" (Linux x86-64, Python up to 3.12).'
        )
    from onnxruntime.capi import _pybind_state

    return _pybind_state


def deepest_nesting() -> int:
    """Return the deepest nesting of subgraphs that the installed onnxruntime loads in reasonable time.

    Up to 1.28, loading takes twice as long for each level (1 s at 16, minutes at 24); 1.30 does not have this
    problem. protobuf itself does not allow many more levels.
    """
    major, minor = (int(n) for n in load().__version__.split(".")[:2])
    return 28 if (major, minor) >= (1, 30) else 16


_OFF = ["ReluQuantRewrite", "ClipQuantRewrite"]
"""Optimizers of onnxruntime (1.18 to 1.32) that drop Relu and Clip in front of quantizers to 8-bit floats."""
_custom_operators: ContextVar[tuple[str, ...]] = ContextVar("custom_operators", default=())
"""Custom operator libraries of the current run; worker threads inherit them from their caller."""


@contextmanager
def custom_operators(libraries: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Register shared libraries of custom operators with all sessions that are created inside this context.

    Raises
    ------
    ConfigError
        If a library does not exist, or onnxruntime cannot load it.
    """
    paths = tuple(os.path.abspath(library) for library in libraries)
    options = _session_options()
    for path in paths:
        if not os.path.isfile(path):
            raise ConfigError(f"the library of custom operators {path} does not exist.")
        try:
            options.register_custom_ops_library(path)
        except Exception as e:
            # onnxruntime's pybind exceptions have no common base but Exception.
            raise ConfigError(
                f"the library of custom operators {path} cannot be loaded: {one_line(e, 400)}"
            ) from e
    token = _custom_operators.set(paths)
    try:
        yield
    finally:
        _custom_operators.reset(token)


def custom_libraries() -> tuple[str, ...]:
    """Return the libraries of custom operators of the current run; see `custom_operators`."""
    return _custom_operators.get()


def _session_options() -> Any:
    return load().SessionOptions()


@contextmanager
def _as_here(libraries: Sequence[str], device: str) -> Iterator[None]:
    with custom_operators(libraries), computing_on(device):
        yield


@contextmanager
def computing_on(device: str) -> Iterator[None]:
    """Let sessions of float networks and gradients compute on a device; see `eptq_onnx.devices`.

    Raises
    ------
    ConfigError
        If there is no such device.
    CapabilityError
        If the installed onnxruntime has no provider for it.
    """
    known = load().get_available_providers() if device != devices.CPU else []
    found = ", ".join(f"{name} {version}" for name, version in installed_distributions().items())
    with devices.on(device, known, found or "onnxruntime"):
        yield


def session_options() -> Any:
    """Return the options of a silent onnxruntime session with the custom operators of the current run."""
    options = _session_options()
    options.log_severity_level = 4
    for path in _custom_operators.get():
        options.register_custom_ops_library(path)
    return options


class Session:
    """An onnxruntime CPU session.

    Parameters
    ----------
    model : ModelProto or path
        A large ModelProto is passed through a temporary folder.
    optimize : bool
        False runs the graph as written, without fusions.
    save_optimized : path, optional
        File to which onnxruntime writes the optimized graph.
    threads : int
        Threads of one operator; 0 for one per core. The default is 1, as batches run in parallel instead: see
        `eptq_onnx.parallel`.
    integers : bool
        False keeps operators between quantizers in float, as training requires.
    profile : path, optional
        Prefix of the file name of a profile: onnxruntime times every operator until `end_profiling`.

    Raises
    ------
    ModelError
        If onnxruntime refuses the model.
    """

    _disabled: ClassVar[tuple[str, ...]] = ()
    """Optimizers that are not used; onnxruntime ignores names that it does not know."""
    _moves: ClassVar[bool] = False
    """True if it computes on the device of the current run, as far as that can."""
    _arena: ClassVar[bool] = True
    """True if the tensors of a session share memory, which is faster where none of them is kept."""

    def __init__(
        self,
        model: ModelProto | str | os.PathLike[str],
        *,
        optimize: bool = True,
        save_optimized: Path | None = None,
        threads: int = 1,
        integers: bool = True,
        profile: Path | None = None,
    ) -> None:
        ort = load()
        options = session_options()
        self._recipe: Recipe | None = None
        if parallel.are_distant() and isinstance(model, ModelProto):
            how = {"optimize": optimize, "threads": threads, "integers": integers}
            # Other machines see the files of weights only where they are told to; see `store.LARGE`.
            whole = model if store.is_large(model) else store.load_all(model)
            self._recipe = Recipe.of(
                self, whole, how, partial(_as_here, custom_libraries(), devices.chosen())
            )
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = self._arena
        floats = isinstance(model, ModelProto) and has_8_bit_floats(model)
        if floats or not integers:  # with floats it makes operators that it then refuses
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
        if isinstance(model, ModelProto) and store.folder_of(model) is not None:
            if store.is_large(model):
                # Weights stay in their files, mapped into memory; prepacking would add a copy of each.
                options.add_session_config_entry("session.disable_prepacking", "1")
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "optimized.data"
            )
        try:
            with source(model) as given:
                disabled = [*self._disabled, *(_OFF if floats else ())]
                self._session = devices.session(ort, given, options, disabled, moves=self._moves)
        except EptqError:
            raise
        except OSError as e:
            raise OutputError(
                f"a model cannot be written to the temporary folder ({e.strerror or e}): "
                "set TMPDIR to a folder with enough room."
            ) from e
        except Exception as e:
            # onnxruntime's pybind exceptions have no common base but Exception.
            hint = (
                "; give the library of its custom operators with --custom-ops"
                if "is not a registered function/op" in str(e)
                else ""
            )
            raise ModelError(f"onnxruntime refuses the model: {one_line(e, 400)}{hint}") from e
        self.inputs: tuple[str, ...] = tuple(i.name for i in self._session.get_inputs())
        self.signature = [(o.name, str(o.type), list(o.shape)) for o in self._session.get_outputs()]
        self.outputs: tuple[str, ...] = tuple(name for name, _, _ in self.signature)

    def taken(self, feeds: Feeds) -> Feeds:
        """Return the feeds that the model has inputs for; a part of a model has fewer than the whole."""
        return {name: value for name, value in feeds.items() if name in self.inputs}

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run the model and return the named outputs, by default all."""
        names = list(outputs or self.outputs)
        try:
            # numpy returns scalars for sums of 0-d arrays; onnxruntime does not accept them.
            values = self._session.run(names, {n: np.asarray(v) for n, v in feeds.items()})
        except Exception as e:
            raise ModelError(f"onnxruntime cannot run the model: {one_line(e, 400)}") from e
        return dict(zip(names, values, strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        if self._recipe is None:
            raise TypeError("only sessions that were made of models, for distant workers, can be sent")
        return made, (self._recipe, self._recipe.digest)

    def end_profiling(self) -> Path:
        """Stop profiling and return the file with the times (Chrome trace events, as JSON)."""
        return Path(self._session.end_profiling())


class ExactSession(Session):
    """A session in which only what the model quantizes is quantized.

    By default, newer versions of onnxruntime (1.32) also quantize the float weight of a layer between
    quantizers, with one scale for the whole weight, so that nobody could measure what quantized activations
    alone cost.
    """

    _moves = True
    # Up to 1.19 the second one fails where a Clip reads an input, as it may in a piece of a network.
    _disabled = ("WeightBiasQuantization", "ClipQuantRewrite")


class KeptSession(ExactSession):
    """An exact session whose outputs are kept for long: none keeps the memory of all tensors."""

    _arena = False


def tensor_types(model: ModelProto, names: Sequence[str]) -> dict[str, TypeProto]:
    """Return the types of tensors, sequences, maps and optionals as onnxruntime infers them.

    onnxruntime reports an unknown shape as one without axes; such types are returned without a shape. Axes of
    unknown size have no size, or a symbolic name.

    Raises
    ------
    ModelError
        If onnxruntime refuses the model.
    """
    exposed = ModelProto()
    exposed.CopyFrom(model)
    outputs = {o.name for o in model.graph.output}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    session = Session(exposed, optimize=False)
    return {name: value_type(kind, shape or None) for name, kind, shape in session.signature if name in names}


def imported_opsets(model: ModelProto) -> dict[str, int]:
    """Return the versions of the operator sets that onnxruntime reads a model with.

    For domains that the model does not import, this is the newest version that onnxruntime has.

    Raises
    ------
    ModelError
        If onnxruntime refuses the model.
    """
    with scratch.folder() as folder:
        path = Path(folder) / "model.onnx"
        Session(model, optimize=False, save_optimized=path)
        return {o.domain: int(o.version) for o in onnx.load(path, load_external_data=False).opset_import}


@contextmanager
def source(model: ModelProto | str | os.PathLike[str]) -> Iterator[bytes | str]:
    """Provide a model in the form that runtimes read: bytes, or a temporary file for a large model."""
    if not isinstance(model, ModelProto):
        yield str(model)
        return
    if store.folder_of(model) is None and model.ByteSize() < store.LARGE:
        yield bytes(model.SerializeToString())
        return
    with scratch.folder() as folder:
        light = model if store.folder_of(model) is not None else weights.stored(model, folder)
        # onnxruntime looks for weights only beside the model, so the file goes to the folder of the weights.
        path = os.path.join(store.folder_of(light) or folder, f"{secrets.token_hex(8)}.onnx")
        try:
            with open(path, "xb") as file:
                file.write(store.with_file_names(light).SerializeToString())
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
