"""Options that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from eptq_onnx.config.choices import Activations, Objective, WeightStorage
from eptq_onnx.config.widths import FLOAT_BITS

if TYPE_CHECKING:
    from eptq_onnx.config.config import Config


def conflicts(config: Config) -> Iterator[tuple[bool, str]]:
    """Yield every contradiction: whether it is there, and what to do."""
    what = "a budget" if config.width_budgets else "objective=bytes"
    yield (
        config.chooses_widths and bool(config.bits),
        f"{what} chooses the bits of all weights: leave bits with patterns out",
    )
    chooses = config.activation_budget is not None
    yield (
        chooses and bool(config.bits),
        "a budget of activations chooses the bits of all activations: leave bits with patterns out",
    )
    yield (
        chooses and config.activation_bits == FLOAT_BITS,
        "a budget of activations leaves none float: leave it out, or give activations other bits than 32",
    )
    yield (
        chooses and config.activations is Activations.DYNAMIC,
        "a budget of activations is for fixed ranges: leave it out, or choose activations=static",
    )
    yield (
        config.block is not None and not config.weights_only,
        "block is for weights alone: give activations 32 bits, as in bits w4a32",
    )
    yield (
        config.block is not None and config.chooses_widths,
        f"{what} chooses no bits of weights in blocks: leave it out, or leave block out",
    )
    yield (
        config.block is not None and bool(config.steps),
        "steps are not for weights in blocks, which no step learns: leave steps out",
    )
    yield (
        config.storage is WeightStorage.MATMULNBITS and config.block is None,
        "storage=matmulnbits is for weights in blocks: give block, such as 32",
    )
    units = [b.unit.value for b in config.budget]
    yield len(set(units)) < len(units), "a budget is given twice for one unit: leave one out"
    yield (
        config.objective is Objective.NOISE and not config.budget,
        "objective=noise needs a budget, such as time=SECONDS, bytes=COUNT or weights=BITS",
    )
    yield (
        config.seconds is not None and config.objective not in (Objective.NOISE, Objective.BYTES),
        f"budget time=SECONDS does not go with objective={config.objective.value}: give objective=noise"
        " or bytes, or leave the budget out",
    )
    yield (
        config.objective is Objective.BYTES and config.max_noise == 0,
        "objective=bytes needs a limit of noise: give max_noise above 0",
    )
    yield (
        config.timings is not None and not config.chooses_by_time,
        "timings are only for objective=time and budget time=SECONDS: leave timings out",
    )
