"""TensorRT-RTX, which builds engines without a GPU and logs their layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from onnx import GraphProto

from eptq_onnx.errors import CapabilityError, ModelError, one_line
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtimes.base import (
    Kernel,
    LoadCost,
    Loaded,
    Model,
    NodeTime,
    Verifier,
    graph_of,
    on_disk,
    ports_of,
)
from eptq_onnx.runtimes.feeds import default_feeds
from eptq_onnx.runtimes.named import Named, with_node_names

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: "
)
_TACTIC = re.compile(r", TacticName: (?P<tactic>[^,]*),")
_TYPE = re.compile(r"Datatype: (\w+)")
_SOURCE = re.compile(r"\[ONNX Layer: (.*?)\](?=[^\w]?\[ONNX|\s*$)")
_TYPES = {
    "Float": "float32", "Half": "float16", "BF16": "bfloat16", "BFloat16": "bfloat16", "Int8": "int8",
    "UInt8": "uint8", "Int4": "int4", "FP8": "float8e4m3fn", "FP4": "float4e2m1", "Int32": "int32",
    "Int64": "int64", "Bool": "bool",
}  # fmt: skip
_GENERATED = "kgen"
"""Type of layers with generated code: elementwise arithmetic, quantizers, small matrix products."""
_WAITS = frozenset({"signal", "wait"})
"""Types of layers that only synchronize."""
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NO_GPU = "TensorRT-RTX {} on a GPU only: eptq-onnx only builds its engines and reads their layers."


@dataclass(frozen=True)
class _Layer:
    name: str
    kind: str
    precision: str
    tactic: str
    sources: tuple[str, ...]


class TensorRtRtx(Verifier):
    """TensorRT-RTX's parser and builder, for GPUs of compute capability 8.9."""

    name = "tensorrt-rtx"
    about = "TensorRT-RTX: parses and builds, without a GPU; needs tensorrt-rtx"
    measures = False

    @classmethod
    def available(cls) -> str | None:
        """Return None if tensorrt-rtx can be imported, else why not."""
        try:
            import_module("tensorrt_rtx")
        except ModuleNotFoundError:
            return 'tensorrt-rtx is not installed: pip install "eptq-onnx[tensorrt]".'
        except (ImportError, OSError, RuntimeError) as e:
            return f"tensorrt-rtx is installed but cannot be imported ({one_line(e)}): reinstall it."
        return None

    @property
    def version(self) -> str:
        """Return the version of TensorRT-RTX."""
        return str(import_module("tensorrt_rtx").__version__)

    def load(self, model: Model, threads: int = 1) -> AbstractContextManager[Loaded]:
        """Raise CapabilityError: engines run on a GPU only."""
        raise CapabilityError(_NO_GPU.format("runs models"))

    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """Raise CapabilityError: engines load on a GPU only."""
        raise CapabilityError(_NO_GPU.format("loads engines"))

    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Raise CapabilityError: engines run on a GPU only."""
        raise CapabilityError(_NO_GPU.format("times models"))

    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Build an engine and return its layers from the builder's log.

        Raises
        ------
        ModelError
            If the parser or the builder rejects the model.
        """
        named = with_node_names(model)
        graph = graph_of(named)
        with on_disk(named) as path:
            log = _build(path, feeds or default_feeds(ports_of(graph)))
        layers = list(_layers(log))
        if not layers:
            raise ModelError("TensorRT-RTX's log does not list the layers of the engine.")
        return tuple(_kernels(layers, graph))


def _build(path: Path, feeds: Feeds) -> list[str]:
    """Build an engine and return the log."""
    trt = import_module("tensorrt_rtx")
    log, said = _logger(trt)
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [one_line(Exception(parser.get_error(k).desc())) for k in range(parser.num_errors)]
        reason = errors[0] if errors else "no reason given"
        raise ModelError(f"TensorRT-RTX's parser refuses the model: {reason}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    sizes = builder.create_optimization_profile()
    for k in range(network.num_inputs):
        name = network.get_input(k).name
        shape = list(feeds[name].shape)
        sizes.set_shape(name, shape, shape, shape)
    config.add_optimization_profile(sizes)
    if builder.build_serialized_network(network, config) is None:
        errors = [text for severity, text in said if severity <= trt.ILogger.ERROR]
        reason = one_line(Exception(errors[-1])) if errors else "no reason given"
        raise ModelError(f"TensorRT-RTX cannot build the model: {reason}")
    return [text for _, text in said]


def _logger(trt: Any) -> tuple[Any, list[tuple[Any, str]]]:
    """Return a logger, and the list that it appends all messages to."""
    said: list[tuple[Any, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            """Append a message to the list."""
            said.append((severity, text))

    return Log(), said


def _layers(log: list[str]) -> Iterator[_Layer]:
    """Yield the layers that a log lists."""
    for line in (line for text in log for line in text.splitlines()):
        found = _LAYER.match(line)
        if found is None or found["kind"] in _WAITS:
            continue
        types, tactic = _TYPE.findall(found["inputs"]), _TACTIC.search(line)
        yield _Layer(
            found["name"],
            found["kind"],
            _TYPES.get(types[0], types[0]) if types else "",
            tactic["tactic"] if tactic else "",
            tuple(_SOURCE.findall(line.partition("Metadata: ")[2])),
        )


def _kernels(layers: list[_Layer], graph: GraphProto) -> Iterator[Kernel]:
    named = Named(graph)
    origins = [named.nodes(layer.sources) for layer in layers]
    apart = {
        n for layer, own in zip(layers, origins, strict=True) if layer.kind != _GENERATED for n in own.nodes
    }
    for layer, own in zip(layers, origins, strict=True):
        # Generated layers before and after a convolution also name it, but do not compute it.
        nodes = tuple(n for n in own.nodes if layer.kind != _GENERATED or n not in apart)
        kinds = set(named.operators(nodes))
        linear = [kind for kind in _LINEAR if kind in kinds]
        operator = linear[0] if linear else kinds.pop() if len(kinds) == 1 else layer.kind
        if not nodes and own.quantizers:
            operator = own.quantizers[-1]
        border = own.border if own.quantizers and not nodes else ""
        yield Kernel(layer.name, f"{layer.kind} {layer.tactic}", operator, layer.precision, nodes, border)
