"""Build the integer program from regions and measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eptq_onnx.method.place.regions import Regions
from eptq_onnx.placement import Representation, Way
from eptq_onnx.program import TIME, Option, Program, Step, Tensor

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
"""Measured conversion (see `pieces.conversions_piece`) to the steps that it performs."""
_LAST = (_R.INTEGERS_LAST, _R.FLOAT_LAST)
_LAYOUTS = tuple(name for name in STEPS if name not in ("quantize", "dequantize"))
_REVERSE = {"float to blocked": "float from blocked"}
"""Conversion to the one whose time is used if the runtime lacks it.

onnxruntime does not reorder every number of channels into blocks.
"""


def steps_of(times: Mapping[str, float], *, layouts: bool = True) -> dict[Step, float]:
    """Return the seconds of each conversion step of one tensor.

    A tensor without four axes has one layout only. Quantizers that could not be timed cost nothing.

    Parameters
    ----------
    times : dict of str to float
        Conversion to seconds.
    layouts : bool
        False makes changes of layout free.
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
    """Return the integer program.

    Parameters
    ----------
    regions : Regions
    ways : sequence
        For each region, the ways to compute it in float and on integers. A region that could not be timed has
        none and stays as planned.
    conversions : dict of str to dict of str to float
        Tensor to the seconds of its conversions.
    layouts : bool
        False ignores the time of layout changes.
    fixed : sequence of bool or None, optional
        Whether each region is on integers; None leaves it to the solver.
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
        follows=_followers(regions, options, {k for k, (_, integers) in enumerate(ways) if integers}),
    )


def _followers(
    regions: Regions, options: Sequence[Sequence[Option]], timed: set[int]
) -> tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...]:
    """Return the options with channels last that depend on those of the region before.

    Integer convolutions bring this layout about themselves, and float ones never have it. Others have it only
    behind a region that has it: onnxruntime moves transposes forward, from the inputs towards the outputs.
    """
    found = []
    for link in regions.links:
        maker = link.maker
        if maker is not None and maker not in timed:
            continue
        last: tuple[tuple[int, int], ...] = ()
        if maker is not None:
            last = tuple((maker, o) for o, x in enumerate(options[maker]) if x.makes in _LAST)
        for k in link.readers:
            convolves = "Conv" in regions.regions[k].operators
            for o, x in enumerate(options[k]):
                if k in timed and x.reads in _LAST and not (convolves and x.on_integers):
                    found.append(((k, o), () if convolves else last))
    return tuple(found)


def _untimed(on_integers: bool) -> Option:
    place = _R.INTEGERS if on_integers else _R.FLOAT
    return Option(place, place, {TIME: 0.0})
