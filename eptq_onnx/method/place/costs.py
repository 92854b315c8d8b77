"""Join measured times and regions into the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eptq_onnx.method.place.program import TIME, Option, Program, Step, Tensor
from eptq_onnx.method.place.regions import Regions
from eptq_onnx.placement import Representation, Way

_R = Representation
STEPS: Mapping[str, Sequence[Step]] = {
    "quantize": [(_R.FLOAT, _R.INTEGERS), (_R.FLOAT_LAST, _R.INTEGERS_LAST)],
    "dequantize": [(_R.INTEGERS, _R.FLOAT), (_R.INTEGERS_LAST, _R.FLOAT_LAST)],
    "float to blocked": [(_R.FLOAT, _R.FLOAT_BLOCKED)],
    "float from blocked": [(_R.FLOAT_BLOCKED, _R.FLOAT)],
    "float to last": [(_R.FLOAT, _R.FLOAT_LAST)],
    "float from last": [(_R.FLOAT_LAST, _R.FLOAT)],
    "integers to last": [(_R.INTEGERS, _R.INTEGERS_LAST)],
    "integers from last": [(_R.INTEGERS_LAST, _R.INTEGERS)],
}
"""The steps that each measured conversion (see `pieces.CONVERSIONS`) does."""
_LAYOUTS = tuple(name for name in STEPS if name not in ("quantize", "dequantize"))
_REVERSE = {"float to blocked": "float from blocked"}
"""What stands for a conversion that the runtime has not: some numbers of channels are not blocked."""


def steps_of(times: Mapping[str, float], *, layouts: bool = True) -> dict[Step, float]:
    """Return the steps of one tensor's conversions; without ``layouts`` those that change layouts are free.

    A tensor that does not have four axes has only one. What could not be timed is free.
    """
    known = {"quantize": 0.0, "dequantize": 0.0, **times}
    for name, other in _REVERSE.items():
        if name not in known and other in known:
            known[name] = known[other]
    found: dict[Step, float] = {}
    for name, seconds in known.items():
        for step in STEPS[name]:
            found[step] = seconds if layouts or name not in _LAYOUTS else 0.0
    if not any(name in known for name in _LAYOUTS):
        found = {s: t for s, t in found.items() if set(s) <= {_R.FLOAT, _R.INTEGERS}}
    return found


def program_of(
    regions: Regions,
    ways: Sequence[tuple[Sequence[Way], Sequence[Way]]],
    conversions: Mapping[str, Mapping[str, float]],
    *,
    layouts: bool = True,
    fixed: Sequence[bool | None] | None = None,
) -> Program:
    """Return the program.

    Parameters
    ----------
    regions : Regions
    ways : sequence
        Of each region the ways in float and on integers. A region that could not be timed has none, and stays
        what it is.
    conversions : dict of str to dict of str to float
        Tensor to the seconds of its conversions.
    layouts : bool
        False leaves the time of changes of layout out.
    fixed : sequence of bool or None, optional
        Whether each region is on integers, where that is given.
    """
    options = []
    for k, (region, (exact, integers)) in enumerate(zip(regions.regions, ways, strict=True)):
        wanted = fixed[k] if fixed is not None else None
        own = [Option(w.reads, w.makes, {TIME: w.seconds}) for w in (*exact, *integers)]
        if not region.movable:
            own = [Option(w.reads, w.makes, {TIME: w.seconds}) for w in exact] or [_untimed(False)]
        elif not exact or not integers:
            own = [_untimed(True)] if wanted is None else [_untimed(wanted)]
        if wanted is not None and region.movable:
            own = [o for o in own if o.on_integers == wanted]
        options.append(tuple(own))
    tensors = tuple(
        Tensor(x.maker, x.readers, x.is_output, steps_of(conversions.get(x.tensor, {}), layouts=layouts))
        for x in regions.links
    )
    free = fixed is None
    return Program(
        tuple(options),
        tensors,
        regions.needs if free else (),
        regions.bound if free else (),
        regions.layers if free else frozenset(),
    )


def _untimed(on_integers: bool) -> Option:
    place = _R.INTEGERS if on_integers else _R.FLOAT
    return Option(place, place, {TIME: 0.0})
