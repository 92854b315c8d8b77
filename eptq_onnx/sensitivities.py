"""Records of what each part of a network does to the outputs. Pure data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from eptq_onnx.report.plain import plain

_HIDDEN = 1.5
"""How many times the sum of its members' noise a group must cause to say that single parts hide it."""


@dataclass(frozen=True)
class Part:
    """The weights of a layer, or an activation.

    Parameters
    ----------
    name : str
        The layer's node, or the activation's tensor.
    what : str
        ``"weights"`` or ``"activation"``.
    operator : str
        The layer's operator, or the operators that read the activation.
    bits : int
    nodes : tuple of str
        The layers that share the weights, or the integer nodes that read the activation.
    noise : float
        Noise-to-signal power ratio at the outputs if this part alone is quantized.
    share : float
        Its share of the noise of all weights, or of all activations, if they are added up.
    option : str
        What spares it, as it is written on the command line.
    left_db : float or None
        SQNR in dB that the outputs are expected to keep with it; None if nothing else causes noise.
    """

    name: str
    what: str
    operator: str
    bits: int
    nodes: tuple[str, ...]
    noise: float
    share: float
    option: str
    left_db: float | None


@dataclass(frozen=True)
class Group:
    """Parts around some nodes, measured together.

    Parameters
    ----------
    pattern : str
        Selects the nodes, as in the options ``bits`` and ``exclude``.
    parts : int
        Weights of these nodes, and activations that no other node reads.
    noise : float
        Noise at the outputs if the group alone is quantized.
    of_members : float
        The noise that its members cause one by one, added up.
    left_db : float or None
        SQNR in dB of the outputs, measured, if all but this group is quantized; None without any noise.
    option : str
        What spares it, as it is written on the command line.
    """

    pattern: str
    parts: int
    noise: float
    of_members: float
    left_db: float | None
    option: str

    @property
    def hidden(self) -> bool:
        """Return True if its members look quieter one by one than they are together."""
        return self.noise > _HIDDEN * self.of_members


@dataclass(frozen=True)
class Sensitivity:
    """The parts of a network, ranked by the noise that each causes at the outputs.

    All weights are rounded to nearest, which no later step makes worse. Noise is the squared error of the
    outputs as a share of their variance, each part of them in units of its own.

    Parameters
    ----------
    model, target : str
    samples : int
        Samples on which each part was measured.
    given : int
        Samples that were given.
    float_passes : float
        What that took, calibration included: runs of all given samples through the float model.
    total, weights, activations : float
        Noise of the quantized network, of its weights alone, and of its activations alone.
    parts : tuple of Part
        Loudest first.
    groups : tuple of Group
        All nodes of an operator, and neighbourhoods; loudest first.
    notes : tuple of str
    """

    model: str
    target: str
    samples: int
    given: int
    float_passes: float
    total: float
    weights: float
    activations: float
    parts: tuple[Part, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...] = ()

    @property
    def sqnr_db(self) -> float | None:
        """Return the SQNR of the outputs in dB; None without any noise."""
        return in_decibels(self.total)

    def to_json(self) -> str:
        """Return everything as JSON."""
        found = {"sqnr_db": self.sqnr_db, **asdict(self)}
        for own, group in zip(found["groups"], self.groups, strict=True):
            own["hidden"] = group.hidden
        return json.dumps(plain(found), indent=2)


def in_decibels(noise: float) -> float | None:
    """Return the SQNR in dB of a noise-to-signal power ratio; None if there is no noise."""
    return -10 * math.log10(noise) if noise > 0 else None
