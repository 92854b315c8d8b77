"""The rows of a target file: what a runtime says about weights, activations, biases and operators."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from eptq_onnx.numerics.formats import FLOATS
from eptq_onnx.numerics.scales import ScaleRule

Runs = Literal["layer", "arithmetic", "equal scale", "absorbed", "float"]
"""How an operator runs, in the order of the roles in the operator table."""
Shift = Literal["product", "bias", "sum", "spread"]
"""Distances between scales that a target that shifts can limit, as the rule `shift` computes them."""
Size = Literal[
    "input_channels", "output_channels", "groups", "group_divisor", "kernel", "M", "K", "N", "rank",
    "counted_pads",
]  # fmt: skip
"""Sizes that a target can limit, as computed by `eptq_onnx.ops.sizes`."""


class Row(BaseModel):
    """A table of a target file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Quantized(Row):
    """``scale``: the scales that the runtime accepts."""

    scale: ScaleRule = ScaleRule.ANY


class WeightRules(_Quantized):
    """How the runtime expects weights: container, one scale per channel or tensor, and the 8-bit range.

    Their zero point is always 0. Numbers of a floating-point container have their own range, so that
    ``range_8_bits`` does not matter. ``depthwise_range_8_bits``: the 8-bit range of depthwise convolutions,
    if it differs. ``storage``: widths below 8 bits that the runtime supports as ONNX types. ``packed``: the
    runtime folds the nodes that unpack weights below 8 bits before it looks for quantizers.
    """

    container: str
    per_channel: bool
    range_8_bits: tuple[int, int]
    depthwise_range_8_bits: tuple[int, int] | None = None
    storage: tuple[Literal[2, 4], ...] = ()
    packed: bool = True

    @field_validator("container")
    @classmethod
    def _signed(cls, value: str) -> str:
        if value not in ("int8", *FLOATS):
            known = " or ".join(FLOATS)
            raise ValueError(f"weights are int8, because their zero point is 0, or {known}")
        return value

    @field_validator("range_8_bits", "depthwise_range_8_bits")
    @classmethod
    def _of_int8(cls, value: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        if value is not None and not -128 <= value[0] < 0 < value[1] <= 127:
            raise ValueError("a range starts at -128 to -1 and ends at 1 to 127")
        # A depthwise range equal to the general one is dropped, so that both ways to say it hash alike.
        return None if info.field_name != "range_8_bits" and value == info.data.get("range_8_bits") else value


class BlockRules(Row):
    """How the runtime reads weights with a scale for each block of terms.

    Parameters
    ----------
    sizes : tuple of int
        Blocks that DequantizeLinear may have, for storage in ONNX types; none if the runtime reads no blocks.
    zero_points : bool
        False if their zero points are always 0.
    matmul_nbits : tuple of int
        Widths for which the runtime has onnxruntime's operator MatMulNBits.
    accuracy_level : int
        What MatMulNBits computes in: 4 for int8, into which it rounds activations block by block; 1 for
        float32.
    """

    sizes: tuple[int, ...] = ()
    zero_points: bool = True
    matmul_nbits: tuple[Literal[2, 4, 8], ...] = ()
    accuracy_level: Literal[1, 2, 3, 4] = 4


class ActivationRules(_Quantized):
    """How the runtime expects activations, which always have one scale per tensor.

    ``symmetric``: the zero point is 0. ``narrow``: the runtime accepts a Clip between QuantizeLinear and
    DequantizeLinear, which limits values to fewer than 8 bits. ``least_range``: the smallest real range that
    the integers cover. ``wide``: integer operators compute with 16 bits, too.
    """

    container: str
    symmetric: bool
    narrow: bool = True
    least_range: float = Field(0.0, ge=0)
    wide: bool = False

    @field_validator("container")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (known := ("int8", "uint8", *FLOATS)):
            raise ValueError(f"choose one of {', '.join(known)}")
        return value

    @field_validator("symmetric")
    @classmethod
    def _fitting(cls, value: bool, info: ValidationInfo) -> bool:
        container = info.data.get("container")
        if value and container == "uint8":
            raise ValueError(
                "uint8 with the zero point 0 holds no negative values: symmetric activations are int8"
            )
        if not value and container in FLOATS:
            raise ValueError(f"{container} has no zero point: its activations are symmetric")
        return value

    def type_name(self, bits: int) -> str:
        """Return the ONNX type of activations of a width."""
        wide = bits > 8 and self.container not in FLOATS
        return self.container.replace("8", "16") if wide else self.container


class BiasRules(Row):
    """``integer``: the bias is stored as integers with the zero point 0; otherwise it stays float.

    ``container``: see `eptq_onnx.numerics.biases.BiasSpec`. ``zero_point``: DequantizeLinear of an integer
    bias is written with its zero point, which is optional.
    """

    integer: bool
    container: Literal["int32", "int8"] = "int32"
    zero_point: bool = True


class RestRules(Row):
    """What stays float.

    ``types``: the types besides float32 that it may have. ``quantizes``: the runtime quantizes the weights of
    float layers between quantizers unasked, which a node behind them prevents.
    """

    types: tuple[Literal["float16", "bfloat16"], ...] = ()
    quantizes: bool = False


class Operator(Row):
    """How the runtime runs one operator; an operator without a row stays float.

    Parameters
    ----------
    runs : str
        Role, which must match the operator's role in the operator table, or ``"float"``, which disables an
        inherited row.
    output : str
        ``"quantized"``: the output is always quantized. ``"optional"``: it is quantized if a node that runs
        on integers reads it; operators other than layers run on integers only then. ``"float"``: it is
        quantized only if a reader needs it quantized.
    inputs : str
        ``"all"``: all inputs are quantized. ``"residual"``: of the branches of a sum, only the one that does
        not come from a layer is.
    shared_scale : bool
        True if all inputs and the output share one scale.
    computed : bool
        False if a layer needs a constant weight, so that a product of two computed matrices stays float.
    dynamic : bool
        True if a layer also runs on integers with an input that is quantized in every run, with the range
        that it has there.
    stored : bool
        True if the operator's constant lookup table is stored as int8 with one scale per row when the
        operator itself stays float.
    least, most : dict of str to int
        Size limits; a node that violates them stays float. Unknown sizes are not limited.
    output_range : tuple of two floats, or None
        The real range of the output that the runtime prescribes, divided evenly by all integers.
    shifts : dict of str to tuple of two ints
        Limits on how far scales lie apart, in powers of two.
    except_first : bool
        True if layers without a layer before them are exempt from the size limits.
    weight : WeightRules or None
        Rules for this operator's weights, if they differ from the target's.
    kernels : tuple of str
        Names of its integer kernels in onnxruntime's optimized graph.
    """

    runs: Runs
    output: Literal["quantized", "optional", "float"] = "optional"
    inputs: Literal["all", "residual"] = "all"
    shared_scale: bool = False
    computed: bool = True
    dynamic: bool = False
    stored: bool = False
    least: dict[Size, int] = {}
    most: dict[Size, int] = {}
    except_first: bool = False
    output_range: tuple[float, float] | None = None
    shifts: dict[Shift, tuple[int, int]] = {}
    weight: WeightRules | None = None
    kernels: tuple[str, ...] = ()

    @property
    def carries(self) -> bool:
        """Return True if its results are on the grid of its input and get no quantizer of their own."""
        return self.runs == "equal scale" and self.output == "float"


class PatternRules(Row):
    """``keep``: patterns of several operators that the runtime fuses; their nodes stay float."""

    keep: frozenset[str] = frozenset()
