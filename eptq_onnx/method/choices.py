"""Find the activations that must stay float so that choices by value select the same rows.

Where TopK selects rows for later layers, or ArgMax the row of a table, a small error of the scores makes the
network select other rows, and everything downstream is unrelated to the float network's values. The cost is
measured: the network with quantized activations and weights rounded to nearest runs once with its own choices
and once with those of the float network. If its own choices cause more noise than everything else, the
tensors that they are computed from stay float, as far upstream as necessary: near ties leave no room for
error.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.data.samples import Samples, spread
from eptq_onnx.errors import ModelError
from eptq_onnx.execute.pairing import Pairing, comparisons, within_bytes
from eptq_onnx.graph.replay import Replay
from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops import executed
from eptq_onnx.records import Plan

SAMPLES, _LEAST_SAMPLES, _MULTIPLICATIONS = 128, 16, 20e9
"""Most and fewest samples, and the multiplications that they may take.

Near ties are rare, so it takes many samples to meet some; large models get fewer.
"""
FLOAT_PASSES = 3.0
"""Cost per sample of running the float network and a quantized one twice; more is seldom needed."""
_MOST_BYTES = 2**28
"""Memory limit of the float outputs that are kept, in bytes."""
_HARM, _CURED = 3.0, 2.0
"""Noise with own choices over noise with the float network's choices: limit to act above, and target."""
_UNNOTICED = 0.002
"""Noise-to-signal ratio of the outputs below which nothing is done: 27 dB."""
_SHARE = 0.25
"""Largest share of the multiplications, and of the weights, that may stay float for the sake of choices."""
_FEW_MULTIPLICATIONS, _FEW_WEIGHTS = 4_000_000, 100_000
"""Amounts that may always stay float: a millisecond of one core, and half a megabyte."""

Quantized = Callable[[Mapping[str, str]], tuple[ModelProto, Mapping[str, str]]]
"""Takes tensors that must stay float, each with the reason.

Returns the quantized model, and a mapping from each tensor to the one that stands for it in that model.
"""


def deciding_activations(
    model: ModelProto,
    plan: Plan,
    quantized: Quantized,
    samples: Samples,
    multiplications: Mapping[str, float],
    found: Replay,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, str], str | None]:
    """Return the tensors that must stay float to preserve the float network's choices, with reasons.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    quantized : callable
        Builds the quantized model; see `Quantized`.
    samples : Samples
        16 to 128 of them are run, one at a time.
    multiplications : mapping of str to float
        Multiplications of each layer for one sample, by node.
    found : Replay
        The recorded draws and choices of the float network.
    progress : callable
        Called with the number of networks run and the most there may be.

    Returns
    -------
    dict of str to str
        Tensor to the reason.
    str or None
        A note, if choices cause most of the noise.
    """
    choices = _choices(model, plan, found)
    if not choices:
        return {}, None
    view = GraphView(model)
    before = view.upstream(source for sources in choices.values() for source in sources)
    path = [group for group in _groups(plan, view) if not before.isdisjoint(group)]
    operations = {layer.node: multiplications[layer.node] for layer in plan.layers}
    count = np.clip(_MULTIPLICATIONS / max(sum(operations.values()), 1), _LEAST_SAMPLES, SAMPLES)
    chosen = spread(samples.count, int(count))
    harm = _Harm(model, samples, list(samples.batches(chosen, samples.fixed_batch or 1)), found)
    most, done = 3 + max(len(path), 1).bit_length(), 1
    own, followed = harm(*quantized({}))
    progress(done, most)
    if own <= max(_UNNOTICED, _HARM * followed):
        return {}, None
    lost = 10 * np.log10(own / max(followed, 1e-9))
    where = ", ".join(list(choices)[:3]) + (" and others" if len(choices) > 3 else "")
    reason = (
        f"{where} would choose other rows, and the outputs would be {lost:.1f} dB noisier "
        "than with those of the float model"
    )
    tensors = [[t for group in path[len(path) - count :] for t in group] for count in range(len(path) + 1)]
    afforded = _afforded(model, plan, operations, tensors)

    def settled(count: int) -> bool:
        nonlocal done
        noise, rest = harm(*quantized(dict.fromkeys(tensors[count], reason)))
        done += 1
        progress(min(done, most), most)
        return noise <= max(_UNNOTICED, _CURED * rest)

    try:
        if afforded and settled(afforded):
            count = bisect.bisect_left(range(1, afforded), True, key=settled) + 1
            share = f"{count} of {len(plan.activation_names)} activations"
            left = f"{share} in front of choices by value stay float: {reason}"
            return dict.fromkeys(tensors[count], reason), left
    except ModelError:
        # Nothing would be left to quantize.
        pass
    finally:
        progress(most, most)
    why = (
        "the tensors that they depend on are most of the network, too much to stay float"
        if afforded < len(path)
        else "keeping them float does not help"
    )
    return {}, f"{reason}: {why}"


def _groups(plan: Plan, view: GraphView) -> list[tuple[str, ...]]:
    """Return the tensors that are quantized together, in topological order."""
    made = {name: k for k, name in enumerate([*view.inputs, *(o for n in view.nodes for o in n.output)])}
    groups = {q.name: q.tensors for q in plan.activations}
    for q in plan.dynamic:
        groups.setdefault(q.name, (q.name,))
    return sorted(groups.values(), key=lambda group: made[group[0]])


def _choices(model: ModelProto, plan: Plan, found: Replay) -> dict[str, list[str]]:
    """Return the nodes that choose rows for later layers, with the tensors that decide."""
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    read = {layer.input for layer in plan.layers}
    result: dict[str, list[str]] = {}
    for place in found.places:
        node = nodes.get(place.node)
        if (
            node is not None
            and not place.draws
            and not read.isdisjoint(view.downstream(o for o in node.output if o))
        ):
            result.setdefault(node.name, []).append(place.source(node))
    return result


def _afforded(
    model: ModelProto, plan: Plan, operations: Mapping[str, float], tensors: list[list[str]]
) -> int:
    """Return how much of the path to the choices may stay float, as an index into ``tensors``.

    Each entry of ``tensors`` contains the ones before it.
    """
    view = GraphView(model)
    weights = {layer.node: float(np.prod(view.constant_shape(layer.weight))) for layer in plan.layers}
    limits = [
        (counts, max(few, _SHARE * sum(counts.values())))
        for counts, few in ((operations, _FEW_MULTIPLICATIONS), (weights, _FEW_WEIGHTS))
    ]

    def too_many(count: int) -> bool:
        gone = set(tensors[count])
        left = [layer.node for layer in plan.layers if not gone.isdisjoint(layer.tensors)]
        return any(sum(counts[node] for node in left) > limit for counts, limit in limits)

    return bisect.bisect_left(range(len(tensors)), True, key=too_many) - 1


class _Harm:
    """Noise-to-signal power ratio at the outputs, about their channel means.

    A call returns it with the network's own choices and with those of the float network.
    """

    def __init__(
        self, model: ModelProto, samples: Samples, parts: list[NDArray[np.int64]], found: Replay
    ) -> None:
        self._found = found
        self._pairing = Pairing(model, samples, parts, found)
        self._reference = within_bytes(self._pairing.outputs(executed(model, found.draws)), _MOST_BYTES)

    def __call__(self, marked: ModelProto, stands_for: Mapping[str, str]) -> tuple[float, float]:
        followed = self._noise(executed(marked, self._found, stands_for))
        try:
            return self._noise(executed(marked, self._found.draws, stands_for)), followed
        except ModelError:
            # If lengths differ, so do the numbers of draws, and the outputs cannot be compared.
            return followed, followed

    def _noise(self, model: ModelProto) -> float:
        compared = comparisons(
            self._pairing.pairs(self._reference, self._pairing.outputs(model, len(self._reference)))
        )
        return float(np.mean([10 ** (-c.result().centred_sqnr_db / 10) for c in compared.values()] or [0.0]))
