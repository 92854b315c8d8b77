"""How a part of a quantized network is spared: with more bits, or in floating point."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from eptq_onnx.config import FLOAT_BITS, Config
from eptq_onnx.graph.patterns import exactly, of_tensor
from eptq_onnx.graph.view import GraphView
from eptq_onnx.records import ActivationQuantizer, DynamicQuantizer, Layer, Plan
from eptq_onnx.targets import Target

_FULL = 8
"""Bits that weights and activations have at most, unless they are spared further."""


@dataclass(frozen=True)
class Spare:
    """One way to spare a part.

    Parameters
    ----------
    nodes : tuple of str
        Nodes whose weights, or whose inputs, get more bits; with ``leaves_float`` those that stay float.
    weight_bits, activation_bits : int or None
        The bits; None for those that stay as they are.
    tensor : str
        The tensor that stays float.
    left : float
        Share of the part's noise that is left.
    """

    nodes: tuple[str, ...] = ()
    weight_bits: int | None = None
    activation_bits: int | None = None
    tensor: str = ""
    left: float = 0.0

    @property
    def leaves_float(self) -> bool:
        """Return True if nothing of the part is quantized."""
        return self.weight_bits is None and self.activation_bits is None

    @property
    def runs_float(self) -> bool:
        """Return True if what runs on integers otherwise computes in float."""
        return self.leaves_float or self.activation_bits == FLOAT_BITS


@dataclass(frozen=True)
class Rules:
    """What spares several parts, as the options of a run.

    Parameters
    ----------
    bits, exclude : tuple of str
        See `eptq_onnx.Config`.
    """

    bits: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def on_command_line(self) -> str:
        """Return the arguments of the command."""
        words = [w for rule in self.bits for w in ("--bits", rule)]
        return shlex.join([*words, *(w for pattern in self.exclude for w in ("--exclude", pattern))])

    def added_to(self, config: Config) -> Config:
        """Return options with these rules behind the user's own."""
        return config.model_copy(
            update={"bits": (*config.bits, *self.bits), "exclude": (*config.exclude, *self.exclude)}
        )


def of_weights(layers: Sequence[Layer]) -> Iterator[Spare]:
    """Yield the ways to spare the weights that layers share, the mildest first."""
    nodes, bits = tuple(x.node for x in layers), layers[0].weight_spec.bits
    if bits < _FULL:
        yield Spare(nodes, weight_bits=_FULL, left=_noise_left(bits, _FULL))
    yield Spare(nodes)


def of_activation(quantizer: ActivationQuantizer, readers: Sequence[str], most: int) -> Iterator[Spare]:
    """Yield the ways to spare activations with one scale, the mildest first.

    Parameters
    ----------
    quantizer : ActivationQuantizer
    readers : sequence of str
        The integer nodes that read them.
    most : int
        Most bits that help; see `most_bits`.
    """
    bits = quantizer.spec.bits
    for wider in (_FULL, 16):
        if bits < wider <= most:
            # The bits of a tensor are the most that any of its readers asks for.
            yield Spare((readers[0],), activation_bits=wider, left=_noise_left(bits, wider))
    yield Spare(tensor=quantizer.name)


def of_dynamic(quantizer: DynamicQuantizer) -> Iterator[Spare]:
    """Yield the way to spare activations whose ranges are found in every run: weights stay as they are."""
    yield Spare(quantizer.nodes, activation_bits=FLOAT_BITS)


def most_bits(target: Target) -> int:
    """Return the most bits of activations that a target computes with as integers."""
    return 16 if target.activation.wide else _FULL


def rules(spares: Iterable[Spare], plan: Plan, view: GraphView, config: Config) -> Rules:
    """Return the options that spare several parts at once.

    Parameters
    ----------
    spares : iterable of Spare
        Of one part, the last counts.
    plan : Plan
        Gives the bits that stay.
    view : GraphView
    config : Config
    """
    wanted: dict[str, tuple[int, int]] = {}
    exclude: dict[str, None] = {}
    for spare in spares:
        if spare.tensor:
            exclude[of_tensor(spare.tensor)] = None
        elif spare.leaves_float:
            exclude |= dict.fromkeys(map(exactly, spare.nodes))
        else:
            for node in spare.nodes:
                weight, activation = wanted.get(node) or _bits_of(node, plan, config)
                wanted[node] = spare.weight_bits or weight, spare.activation_bits or activation
    order = {n.name: k for k, n in enumerate(view.nodes)}
    rules_of = sorted(wanted.items(), key=lambda item: order.get(item[0], 0))
    return Rules(tuple(f"{exactly(node)}=w{w}a{a}" for node, (w, a) in rules_of), tuple(exclude))


def _bits_of(node: str, plan: Plan, config: Config) -> tuple[int, int]:
    """Return the bits of a node's weights and of the activations that it reads."""
    layer = next((x for x in plan.layers if x.node == node), None)
    if layer is None:
        return config.weight_bits, config.activation_bits
    if layer.stored:
        return layer.weight_spec.bits, FLOAT_BITS
    # Inputs with a range of each run have the bits of the options.
    quantizer = plan.quantizer_of.get(layer.input)
    return layer.weight_spec.bits, config.activation_bits if quantizer is None else quantizer.spec.bits


def _noise_left(before: int, after: int) -> float:
    """Return the share of the noise that is left: each bit more divides it by four."""
    return float(4.0 ** (before - after))
