"""Runtimes that a model can be quantized for: one TOML file each, read into a frozen `Target`.

A file can extend another file and then holds only the differences; see `load`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from eptq_onnx.config import FloatType, WeightStorage, describe
from eptq_onnx.errors import ConfigError
from eptq_onnx.numerics.formats import IntFormat, PerAxis, PerTensor
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.targets import machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_OLDEST_OPSET = 13
"""First opset in which quantizers have an axis, and axes are inputs, as the graph rewrites need them."""
_OPSET_OF_NATIVE = {4: 21, 2: 25}
"""Width to the first opset with integer types of that width."""
_OPSET_OF_16_BITS = 21
"""First opset in which QuantizeLinear supports 16-bit integers."""
ONNXRUNTIME = "onnxruntime"
"""The verifier that is always installed."""
AUTO = "auto"
"""Name that selects the shipped target for onnxruntime on this machine."""

Runs = Literal["layer", "arithmetic", "equal scale", "absorbed", "float"]
"""How an operator runs, in the order of the roles in the operator table."""
Size = Literal["input_channels", "output_channels", "groups", "kernel", "M", "K", "N", "rank"]
"""Sizes that a target can limit, as computed by `eptq_onnx.ops.sizes`."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Quantized(_Row):
    """``scale``: the scales that the runtime accepts."""

    scale: ScaleRule = ScaleRule.ANY


class WeightRules(_Quantized):
    """How the runtime expects weights: container, one scale per channel or tensor, and the 8-bit range.

    Their zero point is always 0. ``depthwise_range_8_bits``: the 8-bit range of depthwise convolutions, if it
    differs. ``storage``: widths below 8 bits that the runtime supports as ONNX types. ``packed``: the runtime
    folds the nodes that unpack weights below 8 bits before it looks for quantizers.
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
        if value != "int8":
            raise ValueError("weights are int8, because their zero point is 0")
        return value

    @field_validator("range_8_bits", "depthwise_range_8_bits")
    @classmethod
    def _of_int8(cls, value: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        if value is not None and not -128 <= value[0] < 0 < value[1] <= 127:
            raise ValueError("a range starts at -128 to -1 and ends at 1 to 127")
        # A depthwise range equal to the general one is dropped, so that both ways to say it hash alike.
        return None if info.field_name != "range_8_bits" and value == info.data.get("range_8_bits") else value


class ActivationRules(_Quantized):
    """How the runtime expects activations, which always have one scale per tensor.

    ``symmetric``: the zero point is 0. ``narrow``: the runtime accepts a Clip between QuantizeLinear and
    DequantizeLinear, which limits values to fewer than 8 bits.
    """

    container: Literal["int8", "uint8"]
    symmetric: bool
    narrow: bool = True

    @field_validator("symmetric")
    @classmethod
    def _of_int8(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("container") == "uint8":
            raise ValueError(
                "uint8 with the zero point 0 holds no negative values: symmetric activations are int8"
            )
        return value


class BiasRules(_Row):
    """``integer``: the bias is int32 with scale s_x * s_w and zero point 0; otherwise it stays float.

    ``zero_point``: DequantizeLinear of an integer bias is written with its zero point, which is optional.
    """

    integer: bool
    zero_point: bool = True


class RestRules(_Row):
    """What stays float.

    ``types``: the types besides float32 that it may have.
    """

    types: tuple[Literal["float16", "bfloat16"], ...] = ()


class Operator(_Row):
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
    stored : bool
        True if the operator's constant lookup table is stored as int8 with one scale per row when the
        operator itself stays float.
    least, most : dict of str to int
        Size limits; a node that violates them stays float. Unknown sizes are not limited.
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
    stored: bool = False
    least: dict[Size, int] = {}
    most: dict[Size, int] = {}
    except_first: bool = False
    weight: WeightRules | None = None
    kernels: tuple[str, ...] = ()

    @property
    def carries(self) -> bool:
        """Return True if its results are on the grid of its input and get no quantizer of their own."""
        return self.runs == "equal scale" and self.output == "float"


class PatternRules(_Row):
    """``keep``: patterns of several operators that the runtime fuses; their nodes stay float."""

    keep: frozenset[str] = frozenset()


class Target(_Row):
    """A runtime, as data.

    Parameters
    ----------
    name, title : str
    min_opset : int
        Lowest default-domain opset of the written file, at least 13.
    verifier : str
        The runtime that checks a written file and measures its speed, or ``"none"``.
    outputs : str
        ``"shared"``: a network output that is also quantized for its readers holds the dequantized values;
        ``"float"``: network outputs always hold the values before the quantizer.
    weight, activation, bias, patterns
        See the classes of these rules.
    operators : dict of str to Operator
        Operator, without its domain, to its row.
    """

    name: str
    title: str
    min_opset: int = Field(ge=_OLDEST_OPSET)
    verifier: str = "none"
    outputs: Literal["shared", "float"] = "shared"
    weight: WeightRules
    activation: ActivationRules
    bias: BiasRules
    rest: RestRules = RestRules()
    patterns: PatternRules = PatternRules()
    operators: dict[str, Operator]

    @model_validator(mode="before")
    @classmethod
    def _with_whole_rows(cls, value: Any) -> Any:
        """Fill in the weight rules of each operator from those of the target."""
        if not isinstance(value, dict) or not isinstance(value.get("weight"), dict):
            return value
        rows = value.get("operators")
        if not isinstance(rows, dict):
            return value
        whole = {
            op: {**row, "weight": {**value["weight"], **row["weight"]}}
            if isinstance(row, dict) and isinstance(row.get("weight"), dict)
            else row
            for op, row in rows.items()
        }
        return {**value, "operators": whole}

    def that_run(self, *runs: Runs) -> frozenset[str]:
        """Return the operators that run in one of these ways."""
        return frozenset(op for op, row in self.operators.items() if row.runs in runs)

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """Return each operator's integer kernels; empty if onnxruntime is not the verifier."""
        if self.verifier != ONNXRUNTIME:
            return {}
        return {op: self.operators[op].kernels for op in self.that_run("layer", "arithmetic")}

    def of(self, op_type: str) -> Target:
        """Return the target with the weight rules of one operator."""
        row = self.operators.get(op_type)
        return self if row is None or row.weight is None else self.model_copy(update={"weight": row.weight})

    def weight_spec(self, bits: int, axis: int | None, depthwise: bool = False) -> QuantSpec:
        """Return the spec of a weight with output-channel axis ``axis`` (None for one scale per tensor)."""
        special = self.weight.depthwise_range_8_bits if depthwise else None
        least, most = special or self.weight.range_8_bits
        low, high = max(-(2 ** (bits - 1)), least), min(2 ** (bits - 1) - 1, most)
        zero_points = high - most, low - least
        granularity = PerAxis(axis) if axis is not None and self.weight.per_channel else PerTensor()
        return QuantSpec(IntFormat(bits, True, low, high), granularity, zero_points, self.weight.scale)

    def table_spec(self) -> QuantSpec:
        """Return the spec of a stored lookup table: one scale per row, by the scale rule of weights."""
        return QuantSpec(IntFormat(8, True, -127, 127), PerAxis(0), scales=self.weight.scale)

    def opset_for(self, activation_bits: int, storage: WeightStorage | None = None) -> int:
        """Return the lowest opset with the types of these activations and of weights stored like this."""
        native = self.weight.storage if storage is WeightStorage.NATIVE else ()
        wide = [_OPSET_OF_16_BITS] if activation_bits > 8 else []
        return max([self.min_opset, *wide, *(_OPSET_OF_NATIVE[width] for width in native)])

    def rest_for(self, asked: FloatType | None, own: Sequence[str]) -> FloatType:
        """Return the type of what stays float: by the option, or by default that of the model.

        Parameters
        ----------
        asked : FloatType or None
        own : sequence of str
            The float types other than float32 that the model computes in.

        Raises
        ------
        ConfigError
            If the runtime does not support the option.
        """
        supported = (FloatType.FLOAT32.value, *self.rest.types)
        if asked is None:
            return FloatType(next((t for t in own if t in self.rest.types), FloatType.FLOAT32.value))
        if asked.value not in supported:
            raise ConfigError(
                f"option rest={asked.value} is not for target {self.name}, which computes floats in "
                f"{' or '.join(supported)} (its rest.types): choose another, or leave the option out."
            )
        return asked

    def check_activation_bits(self, bits: int) -> None:
        """Raise ConfigError if the runtime does not support activations of this width."""
        if bits < 8 and not self.activation.narrow:
            raise ConfigError(
                f"target {self.name} does not support {bits}-bit activations, because it takes no Clip "
                "between QuantizeLinear and DequantizeLinear (its activation.narrow is false): choose 8 bits."
            )

    def storage_for(self, storage: WeightStorage | None) -> WeightStorage:
        """Return how weights are stored: by the option, or by default as the runtime supports it.

        Raises
        ------
        ConfigError
            If the runtime does not support the option.
        """
        if storage is None:
            return WeightStorage.PACKED if self.weight.packed else WeightStorage.INT8
        if storage is WeightStorage.PACKED and not self.weight.packed:
            raise ConfigError(
                f"option storage=packed is not for target {self.name}, which does not unpack weights "
                "(its weight.packed is false): choose int8, or leave the option out."
            )
        if storage is WeightStorage.NATIVE and not self.weight.storage:
            raise ConfigError(
                f"option storage=native is not for target {self.name}, which reads no ONNX type below 8 bits "
                "(its weight.storage is empty): leave the option out, or choose int8."
            )
        return storage

    def activation_spec(self, bits: int) -> QuantSpec:
        """Return the spec of an activation; widths above 8 bits are stored in 16."""
        form = IntFormat.full(bits, signed=self.activation.container == "int8")
        zero_points = (0, 0) if self.activation.symmetric else (form.qmin, form.qmax)
        return QuantSpec(form, zero_points=zero_points, scales=self.activation.scale)


def names() -> list[str]:
    """Return the names of the shipped targets."""
    return sorted(
        p.name.removesuffix(".toml") for p in resources.files(__name__).iterdir() if p.name.endswith(".toml")
    )


def load(name: str) -> Target:
    """Read a shipped target by name, or a target file by path; ``"auto"`` selects one for this machine.

    The field ``extends`` names a base: a shipped target, or a path relative to the file's own folder. Fields
    that the file lacks come from the base, except name and title. Tables are merged field by field, lists are
    replaced, and an empty table removes that of the base.

    Raises
    ------
    ConfigError
        If there is no such target, if targets extend each other in a cycle, or if a file is invalid.
    """
    if name == AUTO:
        name = machine.fitting()[0]
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise ConfigError(f"target file {name} does not exist.")
    elif name in names():
        path = _shipped(name)
    else:
        raise ConfigError(
            f"target {name!r} is unknown: choose one of {', '.join([AUTO, *names()])}, or give a .toml file."
        )
    content = _content(path, name, ())
    try:
        return Target.model_validate(content)
    except ValidationError as e:
        raise ConfigError(f"target file {name}: {describe(e, 'field')}") from e


def choice_of(name: str) -> str | None:
    """Return which target ``"auto"`` selects and why; None for any other name."""
    if name != AUTO:
        return None
    chosen, why = machine.fitting()
    return f"target {chosen}: {why}"


def _shipped(name: str) -> Path:
    return Path(str(resources.files(__name__))) / f"{name}.toml"


def _content(path: Path, shown: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the fields and tables of a file, merged with those of its base.

    ``above`` are the files that extend it; ``shown`` is its name in error messages.
    """
    above = (*above, path.resolve())
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"target file {shown} cannot be read: {e.strerror or e}.") from e
    except ValueError as e:
        raise ConfigError(f"target file {shown} is not valid TOML: {e}.") from e
    base = own.pop("extends", None)
    if base is None:
        return own
    if not isinstance(base, str) or not (base.endswith(".toml") or base in names()):
        raise ConfigError(
            f"target file {shown} extends {base!r}, which is unknown: choose one of {', '.join(names())}, "
            "or give a .toml file."
        )
    file = path.parent / base if base.endswith(".toml") else _shipped(base)
    if not file.is_file():
        raise ConfigError(f"target file {shown} extends {base}, which does not exist.")
    if file.resolve() in above:
        raise ConfigError(f"target file {shown} extends {base}, which extends it in turn.")
    inherited = _content(file, base, above)
    return _merged(
        {field: value for field, value in inherited.items() if field not in ("name", "title")}, own
    )


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of both; tables are merged, and other fields of ``own`` take precedence."""
    merged = {**base, **own}
    for field in base.keys() & own.keys():
        if isinstance(base[field], dict) and isinstance(own[field], dict) and own[field]:
            merged[field] = _merged(base[field], own[field])
    return merged
