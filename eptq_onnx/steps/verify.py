"""Step 9: check the written model by running it in the target's runtime, beside the float model."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx import quant_math
from eptq_onnx.data import Samples
from eptq_onnx.errors import OutputError
from eptq_onnx.graph import io, store
from eptq_onnx.graph.bodies import all_nodes
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.graph.walk import Walk
from eptq_onnx.graph.weights import light
from eptq_onnx.parallel import ordered_map
from eptq_onnx.runtime import Session
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
        Called with layers done and layers in all.

    Raises
    ------
    OutputError
        If the written model is not valid ONNX.
    ModelError
        If onnxruntime refuses it.
    """
    try:
        io.check(light(quantized)[0], full=True)
    except Exception as e:
        raise OutputError(f"the quantized model is not valid ONNX: {' '.join(str(e).split())[:300]}") from e
    # A model that prescribes more samples at a time than were held out is compared on some that were not.
    chosen = indices[:_SAMPLES] if len(indices) >= (samples.fixed_batch or 1) else np.arange(samples.fixed_batch or 0)
    parts = list(samples.batches(chosen, samples.micro_batch()))
    feeds = [samples.take(part) for part in parts]
    power: dict[str, float] = defaultdict(float)
    noise: dict[str, float] = defaultdict(float)
    view = GraphView(model)
    outputs = [o for o in view.outputs if view.is_float(o)]
    # One session at a time: each holds all weights.
    expected = _outputs(Session(model), feeds, outputs)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = Session(quantized, save_optimized=optimized)
        kernels = count_kernels(onnx.load(optimized, load_external_data=False), target)
    for wanted, got in zip(expected, _outputs(session, feeds, outputs), strict=True):
        for name in outputs:
            _measure(f"output {name}", wanted[name], got[name], power, noise)
    del session, expected
    exact, rough = Walk(model, feeds), Walk(infer_shapes(flat), feeds)
    for k, layer in enumerate(plan.layers):
        pair = exact.reach(layer.result), rough.reach(stands_for.get(layer.result, layer.result))
        for value, other in zip(*pair, strict=True):
            _measure(f"layer {layer.node}", value, other, power, noise)
        progress(k + 1, len(plan.layers))

    def ratio(key: str) -> float:
        return round(quant_math.sqnr_db(power[key], noise[key]), 3)

    return Verification(
        samples=sum(map(len, parts)),
        outputs={name: ratio(f"output {name}") for name in outputs},
        layers={layer.node: ratio(f"layer {layer.node}") for layer in plan.layers},
        planned=_planned_kernels(plan, target),
        kernels=kernels,
        float_bytes=float_bytes,
        quantized_bytes=store.model_bytes(quantized),
    )


def _outputs(session: Session, feeds: Sequence[Feeds], names: Sequence[str]) -> list[Feeds]:
    return list(ordered_map(lambda f: session.run({n: v for n, v in f.items() if n in session.inputs}, names), feeds)) if names else []


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
    finite = np.isfinite(reference)
    power[key] += float(np.square(reference[finite]).sum())
    # Of outputs whose size depends on their values (boxes that a threshold passes, say) another size counts as a loss of all.
    difference = np.where(finite, reference, 0)
    if got.shape == reference.shape:
        # Where the float network has no number there is nothing to compare; where the other has none, all is lost.
        np.subtract(reference, got, out=difference, where=finite & np.isfinite(got))
    noise[key] += float(np.square(difference).sum())
