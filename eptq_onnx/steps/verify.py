"""Step 9: check the written model by running it in the target's runtime, beside the float model."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx import quant_math
from eptq_onnx.data import Samples
from eptq_onnx.errors import OutputError
from eptq_onnx.graph import edit, io
from eptq_onnx.graph.view import GraphView, all_nodes
from eptq_onnx.parallel import ordered_map
from eptq_onnx.runtime import PROTOBUF_LIMIT, Session
from eptq_onnx.targets import Target
from eptq_onnx.types import Feeds, Plan, Verification

_SAMPLES = 32


def verify(
    model: ModelProto,
    flat: ModelProto,
    quantized: ModelProto,
    plan: Plan,
    stands_for: dict[str, str],
    target: Target,
    samples: Samples,
    indices: NDArray[np.int64],
    float_bytes: int,
    progress: Callable[[int, int], None],
) -> Verification:
    """Compare outputs and layers, and count integer kernels.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    flat : ModelProto
        The written model without settled Ifs: its layers are compared.
    quantized : ModelProto
        The written model: its outputs are compared.
    plan : Plan
    stands_for : dict of str to str
        Quantized tensor to the tensor of the written model that holds its values.
    target : Target
        Names the integer kernels.
    samples : Samples
    indices : ndarray of shape (n_samples,)
        Samples that the optimization has not seen; at most 32 are used (or what one batch needs).
    float_bytes : int
        Size of the original model.
    progress : callable
        Called with samples done and samples in all.

    Raises
    ------
    OutputError
        If the written model is not valid ONNX.
    ModelError
        If onnxruntime refuses it.
    """
    if quantized.ByteSize() < PROTOBUF_LIMIT:
        try:
            io.check(quantized, full=True)
        except Exception as e:
            raise OutputError(f"the quantized model is not valid ONNX: {' '.join(str(e).split())[:300]}") from e
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = Session(quantized, save_optimized=optimized)
        kernels = count_kernels(onnx.load(optimized, load_external_data=False), target)
    view = GraphView(model)
    outputs = [o for o in view.outputs if view.is_float(o)]
    pairs = {x.node: (x.result, stands_for.get(x.result, x.result)) for x in plan.layers}
    reference = Session(edit.exposing(model, [float_name for float_name, _ in pairs.values()]))
    inside = Session(edit.exposing(flat, [quantized_name for _, quantized_name in pairs.values()]))
    # A model that prescribes more samples at a time than were held out is compared on some that were not.
    chosen = indices[:_SAMPLES] if len(indices) >= (samples.fixed_batch or 1) else np.arange(samples.fixed_batch or 0)
    power: dict[str, float] = defaultdict(float)
    noise: dict[str, float] = defaultdict(float)
    done = 0

    def run(part: NDArray[np.int64]) -> tuple[Feeds, Feeds, Feeds]:
        feeds = samples.take(part)
        return reference.run(feeds), session.run(feeds, outputs) if outputs else {}, inside.run(feeds)

    parts = list(samples.batches(chosen, samples.micro_batch()))
    for part, (expected, got, layers) in zip(parts, ordered_map(run, parts), strict=True):
        for name in outputs:
            _measure(f"output {name}", expected[name], got[name], power, noise)
        for node, (float_name, quantized_name) in pairs.items():
            _measure(f"layer {node}", expected[float_name], layers[quantized_name], power, noise)
        done += len(part)
        progress(done, len(chosen))

    def ratio(key: str) -> float:
        return round(quant_math.sqnr_db(power[key], noise[key]), 3)

    return Verification(
        samples=done,
        outputs={name: ratio(f"output {name}") for name in outputs},
        layers={node: ratio(f"layer {node}") for node in pairs},
        planned=_planned_kernels(plan, target),
        kernels=kernels,
        float_bytes=float_bytes,
        quantized_bytes=quantized.ByteSize(),
    )


def _planned_kernels(plan: Plan, target: Target) -> dict[str, int]:
    """Operators that shall run on integers; the target's kernels are for types of 8 bits."""
    if any(q.spec.bits > 8 for q in plan.activations):
        return {}
    return dict(sorted(Counter(t for t in plan.integer_nodes.values() if t in target.kernels).items()))


def count_kernels(optimized: ModelProto, target: Target) -> dict[str, int]:
    """Integer kernels in a graph that onnxruntime optimized, by the operator that they stand for."""
    counts = Counter(node.op_type for node in all_nodes(optimized.graph))
    found = {op: sum(counts[name] for name in names) for op, names in sorted(target.kernels.items())}
    return {op: n for op, n in found.items() if n}


def _measure(key: str, expected: NDArray[Any], got: NDArray[Any], power: dict[str, float], noise: dict[str, float]) -> None:
    reference = expected.astype(np.float64)
    power[key] += float(np.square(reference).sum())
    # Of outputs whose size depends on their values (boxes that a threshold passes, say) another size counts as a loss of all.
    difference = reference - got if got.shape == reference.shape else reference
    noise[key] += float(np.square(difference).sum())
