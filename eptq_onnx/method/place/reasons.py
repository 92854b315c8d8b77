"""Say why nodes stay float."""

from __future__ import annotations

from collections.abc import Iterable

from eptq_onnx.method.place.goal import in_ms
from eptq_onnx.method.place.regions import Region
from eptq_onnx.placement import TimedRegion


def reasons(times: Iterable[TimedRegion], kept: Iterable[Region]) -> dict[str, str]:
    """Return for each node kept float the reason, with the total times of regions of the same operators."""
    wanted = {r.nodes for r in kept}
    totals: dict[str, list[float]] = {}
    for time in times:
        if time.nodes in wanted:
            total = totals.setdefault(time.operators, [0.0, 0.0])
            total[0] += time.float_seconds
            total[1] += time.integer_seconds
    found = {}
    for region in kept:
        exact, integers = totals.get(region.operators, (0.0, 0.0))
        if region.operators not in totals:
            why = "the whole model is faster with it in float"
        elif integers > exact:
            why = f"integers would be slower here: {in_ms(integers)} instead of {in_ms(exact)}"
        else:
            why = (
                "integers would not pay off here: the conversions around it would cost more than the "
                f"{in_ms(exact - integers)} that the kernels save"
            )
        found.update(dict.fromkeys(region.nodes, why))
    return found
