"""Find the activations that must stay float because a choice by value would fall on other rows.

Where TopK takes rows that further layers work on, or ArgMax the row of a table, a small error of the scores
makes the network take another row, and what follows has nothing to do with what it was. How much that costs
is measured: the network with its activations quantized and its weights rounded to nearest runs with choices
of its own, and with those of the float network. If its own make more noise than all the rest, what they are
made from stays float, as far back as it takes: near ties leave no room for error.
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
"""Near ties are rare: it takes many samples to meet some; fewer where all of them would take more
multiplications than that."""
FLOAT_PASSES = 3.0
"""What the float network and a quantized one, with own choices and without, cost a sample; seldom more is
needed."""
_MOST_BYTES = 2**28
"""Of the float outputs, which are kept."""
_HARM, _CURED = 3.0, 2.0
"""Times the noise that is left with the float network's choices: where own choices make more, something is
done; and how much may stay."""
_UNNOTICED = 0.002
"""Noise-to-signal ratio of outputs that no cure is worth: 27 dB."""
_SHARE = 0.25
"""Of the multiplications, and of the weights, that may stay float for the sake of choices."""
_FEW_MULTIPLICATIONS, _FEW_WEIGHTS = 4_000_000, 100_000
"""Where fewer stay float it costs nothing that is noticed: a millisecond of one core, and half a megabyte."""

Quantized = Callable[[Mapping[str, str]], tuple[ModelProto, Mapping[str, str]]]
"""Makes the quantized model in which further tensors stay float, each with the reason; and what stands for a
tensor in it."""


def deciding_activations(
    model: ModelProto,
    plan: Plan,
    quantized: Quantized,
    samples: Samples,
    multiplications: Mapping[str, float],
    found: Replay,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, str], str | None]:
    """Tensors that must stay float for choices by value to fall as in the float network, each with the
    reason.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    quantized : callable
    samples : Samples
        16 to 128 of them are run, one at a time.
    multiplications : mapping of str to float
        Of each layer, by node, for one sample.
    found : Replay
        What the float network drew and chose.
    progress : callable
        Called with networks run and the most there may be.

    Returns
    -------
    dict of str to str
    str or None
        A note, if choices make most of the noise.
    """
    choices = _choices(model, plan, found)
    if not choices:
        return {}, None
    before = GraphView(model).upstream(source for sources in choices.values() for source in sources)
    path = [q for q in plan.activations if not q.constant and not before.isdisjoint(q.tensors)]
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
    reason = f"{where} would choose other rows, and the outputs would be {lost:.1f} dB noisier than with those of the float model"
    tensors = [[t for q in path[len(path) - count :] for t in q.tensors] for count in range(len(path) + 1)]
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
            left = f"{count} of {len(plan.activations)} activations in front of choices by value stay float: {reason}"
            return dict.fromkeys(tensors[count], reason), left
    except ModelError:
        # Nothing would be left to quantize.
        pass
    finally:
        progress(most, most)
    why = (
        "what they are made from is most of the network, too much to stay float"
        if afforded < len(path)
        else "floats do not help"
    )
    return {}, f"{reason}: {why}"


def _choices(model: ModelProto, plan: Plan, found: Replay) -> dict[str, list[str]]:
    """The nodes that choose what layers work on, with the tensors that decide."""
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
    """How far back the path to the choices may be float: an index of ``tensors``, of which each holds those
    before it."""
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
    """Noise-to-signal power ratio at the outputs, about the mean of their channels, with own choices and with
    the float network's."""

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
            # Other lengths want other numbers of draws: they cannot be compared.
            return followed, followed

    def _noise(self, model: ModelProto) -> float:
        compared = comparisons(
            self._pairing.pairs(self._reference, self._pairing.outputs(model, len(self._reference)))
        )
        return float(np.mean([10 ** (-c.result().centred_sqnr_db / 10) for c in compared.values()] or [0.0]))
