"""OpenVINO on the CPU: at its default precision, which is bfloat16 if the CPU supports it, or in float32."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from onnx import GraphProto

from eptq_onnx.errors import ModelError, one_line
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtimes.base import (
    Kernel,
    LoadCost,
    Loaded,
    Model,
    NodeTime,
    Timed,
    Verifier,
    clock_of,
    graph_of,
    on_disk,
    repeated,
    timed,
)
from eptq_onnx.runtimes.loading import load_cost
from eptq_onnx.runtimes.named import Named, with_node_names

_IDLE = frozenset({"Input", "Parameter", "Output", "Result", "Const", "Constant"})
"""Layer types of OpenVINO's runtime model that compute nothing."""
_TYPES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "u8": "uint8", "i8": "int8",
    "u4": "uint4", "i4": "int4", "i32": "int32", "i64": "int64", "boolean": "bool",
}  # fmt: skip
_LAYERS = {
    "Convolution": "Conv",
    "Deconvolution": "ConvTranspose",
    "Concatenation": "Concat",
    "Interpolate": "Resize",
    "Reorder": "layout",
    "StridedSlice": "Slice",
    "MHA": "Attention",
}
"""Layer types that may fuse the operators after them, to the ONNX operator that they implement."""


class _Compiled(Loaded):
    def __init__(self, model: Model, compiled: Any, threads: int) -> None:
        super().__init__(model)
        self._request, self._clock = compiled.create_infer_request(), clock_of(threads)
        self._ports = [(port.get_names(), port) for port in compiled.inputs]

    def _own(self, feeds: Feeds) -> dict[Any, Any]:
        fed = self.fed(feeds)
        return {port: fed[name] for names, port in self._ports for name in names if name in fed}

    def _infer(self, own: dict[Any, Any]) -> Any:
        try:
            return self._request.infer(own)
        except RuntimeError as e:
            raise ModelError(f"OpenVINO cannot run the model: {one_line(e, 400)}") from e

    def run(self, feeds: Feeds) -> Feeds:
        values = self._infer(self._own(feeds))
        names = [output.name for output in graph_of(self._model).output]
        return {name: np.array(values[k]) for k, name in enumerate(names)}

    def bind(self, feeds: Feeds) -> Timed:
        own = self._own(feeds)
        return timed(lambda: self._infer(own), self._clock)

    def profile(self, feeds: Feeds) -> dict[str, list[float]]:
        """Return the seconds of each executed node, one value per run."""
        own = self._own(feeds)
        found: dict[str, list[float]] = defaultdict(list)

        def run() -> None:
            self._infer(own)
            for info in self._request.get_profiling_info():
                if str(info.status).endswith(".EXECUTED"):
                    found[info.node_name].append(info.real_time.total_seconds())

        repeated(run)
        return found


class OpenVino(Verifier):
    """OpenVINO's CPU plugin, with its default precision."""

    name = "openvino"
    about = "OpenVINO on the CPU with its default precision; needs openvino"
    hints: ClassVar[dict[str, str]] = {}

    @classmethod
    def available(cls) -> str | None:
        """Return None if openvino is installed, else how to install it."""
        if find_spec("openvino") is None:
            return 'openvino is not installed: pip install "eptq-onnx[openvino]".'
        return None

    @property
    def version(self) -> str:
        """Return the version of OpenVINO without the commit hash."""
        return str(import_module("openvino").__version__).partition("-")[0]

    @contextmanager
    def load(self, model: Model, threads: int = 1) -> Iterator[Loaded]:
        """See `Verifier.load`."""
        with self._compiled(model, threads) as compiled:
            yield _Compiled(model, compiled, threads)

    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """See `Verifier.load_cost`."""
        return load_cost(self.name, path, threads)

    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Return the nodes of OpenVINO's runtime model."""
        named = with_node_names(model)
        with self._compiled(named, 1) as compiled:
            return _kernels(graph_of(named), compiled)

    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Return the times of OpenVINO's performance counters, which have a resolution of 1 µs."""
        named = with_node_names(model)
        with self._compiled(named, threads, PERF_COUNT="YES") as compiled:
            spent = _Compiled(named, compiled, threads).profile(feeds)
            return tuple(
                NodeTime(kernel, min(spent[kernel.node]))
                for kernel in _kernels(graph_of(named), compiled)
                if kernel.node in spent
            )

    @contextmanager
    def _compiled(self, model: Model, threads: int, **more: str) -> Iterator[Any]:
        core = import_module("openvino").Core()
        # With pinning, two models that are compared would share the same cores.
        options = {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": "NO", **self.hints, **more}
        if threads:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        with on_disk(model) as path:
            try:
                compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
            except RuntimeError as e:
                raise ModelError(f"OpenVINO refuses the model: {one_line(e, 400)}") from e
            yield compiled


class OpenVinoFloat32(OpenVino):
    """OpenVINO's CPU plugin, with float32 for what is not quantized."""

    name = "openvino-f32"
    about = "OpenVINO on the CPU, float32 for what is not quantized; needs openvino"
    hints: ClassVar[dict[str, str]] = {"INFERENCE_PRECISION_HINT": "f32"}


def _kernels(graph: GraphProto, compiled: Any) -> tuple[Kernel, ...]:
    named = Named(graph)
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.value) for key, value in node.get_rt_info().items()}
        if info["layerType"] not in _IDLE:
            found.append(_kernel(node.get_friendly_name(), info, named))
    return tuple(found)


def _kernel(name: str, info: dict[str, str], named: Named) -> Kernel:
    layer = info["layerType"]
    own = named.nodes(info.get("originalLayersNames", "").split(","))
    operator, border = _LAYERS.get(layer, ""), ""
    if not operator:
        operator = _operator(layer, named.operators(own.nodes))
    if not own.nodes and own.quantizers:
        operator = own.quantizers[-1]
    if operator == "layout":
        border = named.ahead(name)
    elif not own.nodes:
        border = own.border
    precision = _TYPES.get(info["runtimePrecision"], info["runtimePrecision"])
    return Kernel(name, f"{layer} {info['primitiveType']}", operator, precision, own.nodes, border)


def _operator(layer: str, kinds: Sequence[str]) -> str:
    """Return the operator that represents a layer: a matrix product if it has one, the only ONNX operator
    that it computes, or else OpenVINO's layer type."""
    layers = [kind for kind in kinds if kind in ("MatMul", "Gemm")]
    if layers:
        return layers[0]
    return kinds[0] if len(set(kinds)) == 1 else layer
