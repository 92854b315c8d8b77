"""Mixed precision: choose the bit widths of weights and activations within limits, by an integer program.

Each candidate width of each layer is tried on the inputs of the float network: the weight is rounded with
error compensation, and the error of every output channel, on samples that the rounding has not seen, is
weighted by the channel's Hessian score. The effect on the network's outputs is measured for one width, by
running the float network with this one weight rounded; the effects of the other widths follow from the ratios
of their errors. The measurement is needed because scores treat the errors at all positions as independent,
although the errors of one weight add up, for instance in a mean over positions. The effects of layers add up,
so the best choice is an integer linear program; see `eptq_onnx.program`.
"""

from eptq_onnx.method.allocate.activations import (
    Activation,
    Work,
    front_of_activations,
    joint_program,
    mean_bits,
    measured,
    operations,
    widths_of,
)
from eptq_onnx.method.allocate.choice import (
    Goal,
    front_of,
    keeps_within,
    program_of,
    solve,
    with_widths,
)
from eptq_onnx.method.allocate.effects import SAMPLES, WIDTHS, Candidates, candidates

__all__ = [
    "SAMPLES",
    "WIDTHS",
    "Activation",
    "Candidates",
    "Goal",
    "Work",
    "candidates",
    "front_of",
    "front_of_activations",
    "joint_program",
    "keeps_within",
    "mean_bits",
    "measured",
    "operations",
    "program_of",
    "solve",
    "widths_of",
    "with_widths",
]
