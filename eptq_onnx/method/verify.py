"""Check the written model by running it in the target's runtime next to the float model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx import runtimes
from eptq_onnx.data.samples import Samples
from eptq_onnx.data.splits import Shares
from eptq_onnx.diagnosis import SampleNoise
from eptq_onnx.errors import ModelError, OutputError, one_line
from eptq_onnx.execute.pairing import Pairing, comparisons, within_bytes
from eptq_onnx.execute.walk import Walk, affordable_batches
from eptq_onnx.graph import io, nbits
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.meaning import meanings
from eptq_onnx.graph.narrow import emulated
from eptq_onnx.graph.replay import Replay
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.numerics.statistics import Comparison
from eptq_onnx.numerics.sums import NoiseSum
from eptq_onnx.ops import executed
from eptq_onnx.outcome import LAYER_SAMPLES, Verification
from eptq_onnx.proto import store
from eptq_onnx.proto.weights import light
from eptq_onnx.records import Plan
from eptq_onnx.runtimes.base import Kernel
from eptq_onnx.targets import ONNXRUNTIME, Target

RUNS, WALKS = 2.0, 2.0
"""Cost of the comparison of outputs for one sample, in float passes, and of that of layers, in walks."""
_WORST = 12
"""Samples that are named."""


@dataclass(frozen=True)
class Versions:
    """The float model and its quantized version.

    Parameters
    ----------
    whole : ModelProto
        The normalized float model.
    marked : ModelProto
        The written model, with resolved Ifs still marked and weights in int8.
    packed : ModelProto
        The same with weights as they are stored. Outputs, kernels and size are those of this one; layers are
        those of ``marked``, which can be cut anywhere between layers.
    stands_for : dict of str to str
        Quantized tensor to the tensor of the written model that holds its dequantized values.
    float_bytes : int
        Size of the original model.
    outputs : tuple of str
        Names of the outputs to compare; empty for all.
    """

    whole: ModelProto
    marked: ModelProto
    packed: ModelProto
    stands_for: Mapping[str, str]
    float_bytes: int
    outputs: tuple[str, ...] = ()


def verify(
    versions: Versions,
    plan: Plan,
    target: Target,
    samples: Samples,
    shares: Shares,
    found: Replay,
    progress: Callable[[int, int], None],
) -> Verification:
    """Compare outputs and layers, and count integer kernels.

    Outputs are those of the written model as a user would run it, sample by sample and with its own choices;
    only random numbers are those of the float model. Layers are compared on the choices of the float model,
    so that their rows match.

    Parameters
    ----------
    versions : Versions
    plan : Plan
    target : Target
        Provides the names of the integer kernels.
    samples : Samples
    shares : Shares
        Outputs are compared on ``unseen``.
    found : Replay
        The recorded draws and choices of the float network.
    progress : callable
        Called with the number of layers done and the total.

    Raises
    ------
    OutputError
        If the written model is not valid ONNX.
    ModelError
        If onnxruntime refuses the written model.
    """
    quantized = sink(versions.packed)
    _check(quantized, versions.whole)
    runnable = emulated(quantized)
    kernels = _all_kernels(runnable, target)
    parts = list(samples.batches(shares.unseen, samples.fixed_batch or 1))
    # The integer kernels of this machine say nothing about another runtime: without VNNI they overflow.
    integers = target.verifier == ONNXRUNTIME
    pairing = Pairing(versions.whole, samples, parts, found)
    count, compared, notes = _compare_outputs(versions, runnable, pairing, found, integers=integers)
    statistics = {name: comparison.result() for name, comparison in compared.items()}
    if runnable is not quantized:
        notes = (*notes, "bfloat16 was emulated for the comparison: onnxruntime does not compute in it")
    sums: defaultdict[str, NoiseSum] = defaultdict(NoiseSum)
    float_model = executed(versions.whole, found)
    flat = executed(versions.marked, found, versions.stands_for)
    size = samples.micro_batch()
    walked = list(samples.batches(shares.unseen[:LAYER_SAMPLES], size)) or parts
    most = affordable_batches(specialize(float_model, samples.two_batches(size)), 2, None)
    feeds = [samples.take(part) for part in walked[:most]]
    exact, quantized_walk = Walk(float_model, feeds), Walk(infer_shapes(flat), feeds, integers=integers)
    for k, layer in enumerate(plan.layers):
        pair = (
            exact.reach(layer.result),
            quantized_walk.reach(versions.stands_for.get(layer.result, layer.result)),
        )
        for value, other in zip(*pair, strict=True):
            sums[layer.node].add(value, other)
        progress(k + 1, len(plan.layers))
    return Verification(
        samples=count,
        held_out=shares.held_out,
        outputs={name: round(of.sqnr_db, 3) for name, of in statistics.items()},
        layers={layer.node: sums[layer.node].sqnr_db for layer in plan.layers},
        planned=_planned_kernels(plan, target, quantized),
        kernels=kernels,
        float_bytes=versions.float_bytes,
        quantized_bytes=store.model_bytes(quantized),
        notes=notes,
        statistics=statistics,
        worst=_worst(compared, parts),
    )


def _compare_outputs(
    versions: Versions, quantized: ModelProto, pairing: Pairing, found: Replay, *, integers: bool
) -> tuple[int, dict[str, Comparison], tuple[str, ...]]:
    """Return the number of samples compared, the comparison of each output, and notes."""
    # One session at a time, because each holds all weights.
    reference = within_bytes(pairing.outputs(executed(versions.whole, found.draws)))
    notes: tuple[str, ...] = ()
    draws = found.draws
    packed = emulated(versions.packed)
    other = executed(packed, draws, versions.stands_for) if draws.places else quantized
    try:
        results = list(pairing.outputs(other, len(reference), integers=integers))
    except ModelError as e:
        if not draws.places:
            raise
        # If lengths differ, so do the numbers of draws.
        followed = executed(packed, found, versions.stands_for)
        results = list(pairing.outputs(followed, len(reference), integers=integers))
        notes = (
            "in the comparison of outputs, lengths and places follow the float model: "
            f"with its own the draws do not fit ({e})",
        )
    compared = comparisons(pairing.pairs(reference, results), meanings(versions.whole))
    counted = {n: c for n, c in compared.items() if not versions.outputs or n in versions.outputs}
    return pairing.samples_of(len(reference)), counted, notes


def _worst(compared: Mapping[str, Comparison], parts: Sequence[NDArray[np.int64]]) -> tuple[SampleNoise, ...]:
    """Return the runs on which an output differs most, worst first."""
    ratios = {name: comparison.ratios for name, comparison in compared.items()}
    runs = min(map(len, ratios.values()), default=0)
    ranked = sorted((*min((own[k], name) for name, own in ratios.items()), k) for k in range(runs))
    return tuple(
        SampleNoise(int(parts[k][0]), name, round(ratio, 3))
        for ratio, name, k in ranked[:_WORST]
        if ratio < np.inf
    )


def look_at_file(
    quantized: ModelProto, whole: ModelProto, plan: Plan, target: Target, float_bytes: int
) -> Verification:
    """Check a file whose outputs nobody has samples for: its form, its kernels, its size.

    Parameters
    ----------
    quantized, whole : ModelProto
        The written model and the float one.
    plan : Plan
    target : Target
    float_bytes : int
        Size of the original model.

    Raises
    ------
    OutputError, ModelError
        As `verify` does.
    """
    _check(quantized, whole)
    kernels = _all_kernels(quantized, target)
    planned = _planned_kernels(plan, target, quantized)
    return Verification(0, {}, {}, planned, kernels, float_bytes, store.model_bytes(quantized))


def _planned_kernels(plan: Plan, target: Target, quantized: ModelProto) -> dict[str, int]:
    """Return the operators planned to run on integers; the target's kernels are for 8-bit types."""
    if any(q.spec.bits > 8 for q in plan.activations):
        return {}
    # Dynamic layers are products of matrices in the file.
    nodes = [*plan.integer_nodes.values(), *("MatMul" for layer in plan.layers if layer.dynamic)]
    counts = Counter(t for t in nodes if t in target.kernels)
    if target.verifier == ONNXRUNTIME and (products := nbits.products(quantized)):
        counts[nbits.MATMUL_NBITS] = products
    return dict(sorted(counts.items()))


def _all_kernels(model: ModelProto, target: Target) -> dict[str, int]:
    """Return the integer kernels that onnxruntime runs, and those of weights in blocks."""
    found = runtimes.make().kernels(model)
    blocked = sum(kernel.kernel == nbits.MATMUL_NBITS for kernel in found)
    return count_kernels(found, target) | ({nbits.MATMUL_NBITS: blocked} if blocked else {})


def count_kernels(found: Iterable[Kernel], target: Target) -> dict[str, int]:
    """Count the integer kernels among those that a runtime executes, by the operator that they implement."""
    counts = Counter(kernel.kernel for kernel in found)
    by_operator = {op: sum(counts[name] for name in names) for op, names in sorted(target.kernels.items())}
    return {op: n for op, n in by_operator.items() if n}


def _check(quantized: ModelProto, whole: ModelProto) -> None:
    try:
        io.check(light(quantized)[0], full=True)
    except Exception as e:
        # Objections that the float model also raises are ignored: onnxruntime runs some models that onnx
        # rejects.
        if not _is_valid(whole):
            return
        raise OutputError(f"the quantized model is not valid ONNX: {one_line(e)}") from e


def _is_valid(model: ModelProto) -> bool:
    try:
        io.check(light(model)[0], full=True)
    except Exception:
        return False
    return True
