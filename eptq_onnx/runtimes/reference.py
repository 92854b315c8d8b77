"""onnx's reference evaluator: the standard in numpy, without the kernels of any runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from eptq_onnx.errors import CapabilityError, ModelError, one_line
from eptq_onnx.graph.view import opset_of
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto import store
from eptq_onnx.runtimes.base import Kernel, LoadCost, Loaded, Model, NodeTime, Timed, Verifier, timed
from eptq_onnx.runtimes.base import clock_of as clock
from eptq_onnx.runtimes.loading import load_cost

_FIRST_DEQUANTIZE = 19
"""First opset with a DequantizeLinear in the evaluator."""
_NO_KERNELS = "onnx's reference evaluator {}: it computes node by node with numpy, unlike any product."


class _Evaluator(Loaded):
    def __init__(self, model: Model) -> None:
        super().__init__(model)
        whole = store.load_all(model) if isinstance(model, ModelProto) else str(Path(model))
        try:
            self._evaluator = ReferenceEvaluator(whole, new_ops=_missing(model))
        except Exception as e:
            # The evaluator raises whatever numpy, protobuf or its own code does.
            raise ModelError(f"onnx's reference evaluator refuses the model: {one_line(e)}") from e

    def run(self, feeds: Feeds) -> Feeds:
        own = self.fed(feeds)
        try:
            values = self._evaluator.run(None, own)
        except Exception as e:
            raise ModelError(f"onnx's reference evaluator cannot run the model: {one_line(e)}") from e
        return {name: np.asarray(v) for name, v in zip(self._evaluator.output_names, values, strict=True)}

    def bind(self, feeds: Feeds) -> Timed:
        return timed(lambda: self.run(feeds), clock(1))


class DequantizeLinear(OpRun):
    """DequantizeLinear of opsets 10 to 18, which onnx's evaluator lacks."""

    op_domain = ""

    def _run(
        self, x: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any] | None = None, **given: Any
    ) -> tuple[NDArray[Any]]:
        axis = given.get("axis")
        shape = [1] * x.ndim
        if scale.ndim and scale.size > 1:
            shape[1 if axis is None else axis] = scale.size
        shift = 0 if zero is None else zero.astype(np.int32).reshape(shape)
        return (((x.astype(np.int32) - shift) * scale.reshape(shape)).astype(scale.dtype),)


def _missing(model: Model) -> list[type[OpRun]]:
    """Return the operators that the evaluator knows in later opsets only than the model's."""
    known = model if isinstance(model, ModelProto) else onnx.load(model, load_external_data=False)
    return [] if opset_of(known) >= _FIRST_DEQUANTIZE else [DequantizeLinear]


class Reference(Verifier):
    """onnx's reference evaluator."""

    name = "reference"
    about = "onnx's reference evaluator: slow, and its times mean nothing"
    measures = False

    @classmethod
    def available(cls) -> str | None:
        """Return None: onnx is always installed."""
        return None

    @property
    def version(self) -> str:
        """Return the version of onnx."""
        return str(onnx.__version__)

    @contextmanager
    def load(self, model: Model, threads: int = 1) -> Iterator[Loaded]:
        """See `Verifier.load`; numpy chooses the number of threads."""
        yield _Evaluator(model)

    def load_cost(self, path: Path, threads: int = 1) -> LoadCost:
        """See `Verifier.load_cost`."""
        return load_cost(self.name, path, threads)

    def kernels(self, model: Model, feeds: Feeds | None = None) -> tuple[Kernel, ...]:
        """Raise CapabilityError: the evaluator has no kernels."""
        raise CapabilityError(_NO_KERNELS.format("has no kernels"))

    def profile(self, model: Model, feeds: Feeds, threads: int = 1) -> tuple[NodeTime, ...]:
        """Raise CapabilityError: the evaluator's times mean nothing."""
        raise CapabilityError(_NO_KERNELS.format("times no nodes"))
