"""Records of the choice between integers and floating point by time. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Representation(str, Enum):
    """How a tensor lies in memory.

    Runtimes compute convolutions on blocks of channels (float) or with channels last (integers), and convert
    between these.
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
    seconds : float
        Time of the kernels, without conversions at the ends.
    """

    reads: Representation
    makes: Representation
    seconds: float


@dataclass(frozen=True)
class RegionTime:
    """A region, which is what the runtime computes together, in float and on integers.

    Parameters
    ----------
    nodes : tuple of str
    operators : str
        Their operators, joined by "+".
    float_seconds, integer_seconds : float
        The fastest way of each, without conversions.
    on_integers : bool
        What was chosen.
    """

    nodes: tuple[str, ...]
    operators: str
    float_seconds: float
    integer_seconds: float
    on_integers: bool


@dataclass(frozen=True)
class Candidate:
    """A plan that was timed as a whole model beside the plan with all integers, in turn.

    Parameters
    ----------
    name : str
    regions : int
        Regions on integers.
    predicted : float
        Sum of the times of all regions and conversions, in seconds.
    seconds : float
        Median time of one run of the whole model.
    ratio, low, high : float
        Its time divided by that of the plan with all integers: median, and the interval of the median.
    """

    name: str
    regions: int
    predicted: float
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Placement:
    """What was chosen by time, and the measurements.

    Parameters
    ----------
    runtime, machine : str
        What it was measured with.
    threads : int
    chosen : str
        Name of the candidate that was taken.
    candidates : tuple of Candidate
        The plan with all integers comes first, the float model second.
    regions : tuple of RegionTime
        The regions that may be on integers and were timed.
    untimed : int
        Regions that could not be timed and stay as planned.
    kept_float : dict of str to str
        Nodes that stay float, each with the reason.
    notes : tuple of str
    """

    runtime: str
    machine: str
    threads: int
    chosen: str
    candidates: tuple[Candidate, ...]
    regions: tuple[RegionTime, ...]
    untimed: int = 0
    kept_float: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
