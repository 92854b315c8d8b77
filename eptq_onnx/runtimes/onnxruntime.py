"""onnxruntime on the CPU, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from eptq_onnx import runtime, scratch
from eptq_onnx.errors import InstallError
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtimes import ort_graph, ort_profile
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
    repeated,
    timed,
)
from eptq_onnx.runtimes.loading import load_cost
from eptq_onnx.runtimes.named import with_node_names


class _Session(Loaded):
    def __init__(self, model: Model, threads: int) -> None:
        super().__init__(model)
        self._session, self._clock = runtime.Session(model, threads=threads), clock_of(threads)

    def run(self, feeds: Feeds) -> Feeds:
        return self._session.run(self.fed(feeds))

    def bind(self, feeds: Feeds) -> Timed:
        own = self.fed(feeds)
        return timed(lambda: self._session.run(own), self._clock)


class OnnxRuntime(Verifier):
    """onnxruntime's CPU provider, with default options."""

    name = "onnxruntime"
    about = "onnxruntime on the CPU"

    @classmethod
    def available(cls) -> str | None:
        """Return None if onnxruntime can be imported, else why not."""
        try:
            runtime.load()
        except InstallError as e:
            return str(e)
        return None

    @property
    def version(self) -> str:
        """Return the version of onnxruntime."""
        return str(runtime.load().__version__)

    @contextmanager
    def load(self, model: Model, threads: int = 1) -> Iterator[Loaded]:
        """See `Verifier.load`."""
        yield _Session(model, threads)

    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """See `Verifier.load_cost`."""
        return load_cost(self.name, path, threads)

    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Return the nodes of the optimized graph."""
        named = with_node_names(model)
        with scratch.folder() as folder:
            optimized = Path(folder) / "optimized.onnx"
            runtime.Session(named, save_optimized=optimized)
            return optimized_kernels(named, optimized)

    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Return the times of onnxruntime's profiler."""
        named = with_node_names(model)
        with scratch.folder() as folder:
            optimized = Path(folder) / "optimized.onnx"
            session = runtime.Session(
                named, threads=threads, profile=Path(folder) / "profile", save_optimized=optimized
            )
            own = session.taken(feeds)
            count = repeated(lambda: session.run(own))
            events = ort_profile.parse(session.end_profiling().read_text(encoding="utf-8", errors="replace"))
            return ort_profile.node_times(events, optimized_kernels(named, optimized), count)


def optimized_kernels(model: Model, optimized: Path) -> tuple[Kernel, ...]:
    """Return the kernels in the optimized graph of a model, read from the file that onnxruntime wrote."""
    return ort_graph.kernels(graph_of(model), onnx.load(optimized, load_external_data=False).graph)
