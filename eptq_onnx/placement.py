"""Records of the choices by time, noise and size. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Representation(str, Enum):
    """Number format and memory layout of a tensor.

    Runtimes compute convolutions in blocked (float) or channels-last (integer) layouts, and convert tensors
    between these and the plain layout, which has channels first.
    """

    FLOAT = "float"
    FLOAT_BLOCKED = "float, blocked"
    FLOAT_LAST = "float, channels last"
    INTEGERS = "integers"
    INTEGERS_LAST = "integers, channels last"

    @property
    def is_integer(self) -> bool:
        """Return True for integers."""
        return self in (Representation.INTEGERS, Representation.INTEGERS_LAST)


@dataclass(frozen=True)
class Way:
    """A way to compute a piece of a network.

    Parameters
    ----------
    reads, makes : Representation
        Representations of its inputs and of its outputs.
    seconds : float
        Time of the kernels, without conversions at the ends.
    """

    reads: Representation
    makes: Representation
    seconds: float


@dataclass(frozen=True)
class TimedRegion:
    """Times of a region, the nodes that the runtime computes together, in float and on integers.

    Parameters
    ----------
    nodes : tuple of str
    operators : str
        Their operators, joined by "+".
    float_seconds, integer_seconds : float
        Time of the fastest way in each form, without conversions.
    on_integers : bool
        True if integers were chosen.
    """

    nodes: tuple[str, ...]
    operators: str
    float_seconds: float
    integer_seconds: float
    on_integers: bool


@dataclass(frozen=True)
class Candidate:
    """A choice that was timed as a whole model, in turn with the model that is all integers.

    Parameters
    ----------
    name : str
    regions : int
        Number of regions on integers.
    predicted : float
        Sum of the times of all regions and conversions, in seconds.
    seconds : float
        Median time of one run of the whole model.
    ratio, low, high : float
        Its time divided by that of the all-integer model: the median and its confidence interval.
    noise : float or None
        Noise of its quantized activations at the outputs, as a share of their power; None if not measured.
    """

    name: str
    regions: int
    predicted: float
    seconds: float
    ratio: float
    low: float
    high: float
    noise: float | None = None


@dataclass(frozen=True)
class InFloat:
    """The bytes of a weight of layers that compute in float.

    Parameters
    ----------
    exact : int
        Of the float weight, less those of the nodes and constants around the integers of layers on integers.
    stored : int or None
        By which nodes and constants around stored integers take more than those; None if the weight cannot be
        stored.
    """

    exact: int
    stored: int | None


@dataclass(frozen=True)
class FrontPoint:
    """A choice with the least noise for its time and size, all as foreseen.

    Parameters
    ----------
    noise : float
        Noise at the outputs, as a share of their power: that of activations if regions were chosen, and that
        of weights if widths were.
    seconds : float or None
        Time of one run, if regions were chosen.
    regions : int or None
        Number of regions on integers.
    bytes : int or None
        Size of the file, at most, if widths were chosen.
    bits : float or None
        Mean bits of a quantized weight.
    activation_bits : float or None
        Mean bits of an activation's value, if only those were chosen.
    chosen : bool
        True for the choice that was taken.
    """

    noise: float
    seconds: float | None = None
    regions: int | None = None
    bytes: int | None = None
    bits: float | None = None
    activation_bits: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class Placement:
    """The choice by time, and the measurements it is based on.

    Parameters
    ----------
    runtime, machine : str
        Runtime and machine of the measurements.
    threads : int
    chosen : str
        Name of the chosen candidate.
    candidates : tuple of Candidate
        The all-integer model comes first, the float model second.
    regions : tuple of TimedRegion
        The regions that can run on integers and were timed.
    untimed : int
        Number of regions that can run on integers and were not timed alone.
    kept_float : dict of str to str
        Nodes that stay float, each with the reason.
    exact : tuple of str
        Weights that stay float, because nothing else keeps within the limits.
    front : tuple of FrontPoint
        The least noise at several times of one run, and at several sizes if widths were chosen along with
        regions; empty if only the time counted.
    why : str
        Why the plan stands without times of regions; empty if they were timed.
    complete : bool
        False if the time limit left regions untimed.
    """

    runtime: str
    machine: str
    threads: int
    chosen: str
    candidates: tuple[Candidate, ...]
    regions: tuple[TimedRegion, ...]
    untimed: int = 0
    kept_float: Mapping[str, str] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    why: str = ""
    complete: bool = True

    @property
    def taken(self) -> Candidate | None:
        """The candidate that was chosen; None if none was timed."""
        return next((c for c in self.candidates if c.name == self.chosen), None)


@dataclass(frozen=True)
class Timings:
    """The content of a timings file.

    Parameters
    ----------
    network : str
        Digest of the network, its plan and the shapes of a run.
    placement : Placement
    pieces : dict of str to tuple of Way
        Digest of each piece to the ways to compute it.
    conversions : dict of str to dict of str to float
        Type and shape of a tensor to the seconds of each conversion.
    """

    network: str
    placement: Placement
    pieces: Mapping[str, tuple[Way, ...]] = field(default_factory=dict)
    conversions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
