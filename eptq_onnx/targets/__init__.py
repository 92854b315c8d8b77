"""Runtimes that a model can be quantized for: one TOML file each, read into a frozen `Target`.

A file may extend another and then needs only what differs; see `load`.
"""

from __future__ import annotations

import sys
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

from eptq_onnx.config import WeightStorage, describe
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
"""From where quantizers have an axis, and axes are inputs, as the rewrites of operators write them."""
_OPSET_OF_NATIVE = {4: 21, 2: 25}
"""From where there are integers of these widths."""
_OPSET_OF_16_BITS = 21
"""From where QuantizeLinear knows 16-bit integers."""
ONNXRUNTIME = "onnxruntime"
"""The verifier that is always there."""
AUTO = "auto"
"""Name of the shipped target that fits the onnxruntime of this machine."""

Runs = Literal["layer", "arithmetic", "equal scale", "absorbed", "float"]
"""How an operator runs, in the order of the roles of the operator table."""
Size = Literal["input_channels", "output_channels", "groups", "kernel", "M", "K", "N", "rank"]
"""What a target may limit; `eptq_onnx.ops.sizes` measures it."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Quantized(_Row):
    """``scale``: which scales the runtime takes."""

    scale: ScaleRule = ScaleRule.ANY


class WeightRules(_Quantized):
    """How the runtime wants weights, whose zero point is always 0: container, scales per channel, and the
    range used at 8 bits.

    ``depthwise_range_8_bits``: that of convolutions of one channel each, where it is another.
    ``storage``: widths below 8 bits that the runtime reads as ONNX types of their own. ``packed``: the
    runtime folds nodes on constants, which unfold weights below 8 bits, before it looks for quantizers.
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
            raise ValueError("a range goes from -128 or more, below 0, to 127 or less, above 0")
        # What is no other range is none, however a file says it.
        return None if info.field_name != "range_8_bits" and value == info.data.get("range_8_bits") else value


class ActivationRules(_Quantized):
    """How the runtime wants activations (always one scale per tensor); ``symmetric``: with the zero point
    0.

    ``narrow``: a Clip between QuantizeLinear and DequantizeLinear may keep values in fewer than 8 bits.
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
    """``integer``: int32 with scale s_x * s_w and zero point 0; else the bias stays float.

    ``zero_point``: an integer bias is written with its zero point, which DequantizeLinear may do without.
    """

    integer: bool
    zero_point: bool = True


class Operator(_Row):
    """How the runtime runs one operator; an operator without a row stays float.

    Parameters
    ----------
    runs : str
        Role, which the operator table must give the operator, too; ``"float"`` switches an inherited row off.
    output : str
        ``"quantized"``: the output is quantized whoever reads it. ``"optional"``: it is quantized if a node
        reads it that runs on integers; operators other than layers run on integers only then. ``"float"``:
        it is quantized only if a reader wants it as its input.
    inputs : str
        ``"all"``, or ``"residual"``: of a sum, only the branch that does not come from a layer.
    shared_scale : bool
        True if all inputs and the output have one scale.
    computed : bool
        False if a layer needs a constant weight: a product of two computed matrices stays float.
    stored : bool
        True if the constant table in which the operator looks rows up is stored as int8, one scale a row,
        where the operator itself stays float.
    least, most : dict of str to int
        Limits of sizes; a node beyond them stays float. Sizes that are unknown are not limited.
    except_first : bool
        True if layers that no other layer precedes are exempt from the limits.
    weight : WeightRules or None
        Rules for this operator's weights, where they are others than the target's.
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


class PatternRules(_Row):
    """``keep``: patterns of several operators that the runtime fuses; they stay float inside."""

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
        ``"shared"``: an output of the network that is quantized for its readers has the dequantized values;
        ``"float"``: outputs of the network always have the values before a quantizer.
    weight, activation, bias, patterns
        Rules, see their classes.
    operators : dict of str to Operator
        By operator, without its domain.
    """

    name: str
    title: str
    min_opset: int = Field(ge=_OLDEST_OPSET)
    verifier: str = "none"
    outputs: Literal["shared", "float"] = "shared"
    weight: WeightRules
    activation: ActivationRules
    bias: BiasRules
    patterns: PatternRules = PatternRules()
    operators: dict[str, Operator]

    @model_validator(mode="before")
    @classmethod
    def _with_whole_rows(cls, value: Any) -> Any:
        """Complete the weight rules of each operator with those of the target."""
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
        """Operator to the names of its integer kernels; empty if onnxruntime is not the verifier."""
        if self.verifier != ONNXRUNTIME:
            return {}
        return {op: self.operators[op].kernels for op in self.that_run("layer", "arithmetic")}

    def of(self, op_type: str) -> Target:
        """Return the target as the weights of one operator see it."""
        row = self.operators.get(op_type)
        return self if row is None or row.weight is None else self.model_copy(update={"weight": row.weight})

    def weight_spec(self, bits: int, axis: int | None, depthwise: bool = False) -> QuantSpec:
        """Spec of a weight with output-channel axis ``axis`` (None for one scale in all), of a depthwise
        convolution or not."""
        special = self.weight.depthwise_range_8_bits if depthwise else None
        least, most = special or self.weight.range_8_bits
        low, high = max(-(2 ** (bits - 1)), least), min(2 ** (bits - 1) - 1, most)
        zero_points = high - most, low - least
        granularity = PerAxis(axis) if axis is not None and self.weight.per_channel else PerTensor()
        return QuantSpec(IntFormat(bits, True, low, high), granularity, zero_points, self.weight.scale)

    def table_spec(self) -> QuantSpec:
        """Spec of a stored table: one scale a row, by the rule of weights, however many scales these have."""
        return QuantSpec(IntFormat(8, True, -127, 127), PerAxis(0), scales=self.weight.scale)

    def opset_for(self, activation_bits: int, storage: WeightStorage | None = None) -> int:
        """Lowest opset that can write these activations, and weights stored like this."""
        native = self.weight.storage if storage is WeightStorage.NATIVE else ()
        wide = [_OPSET_OF_16_BITS] if activation_bits > 8 else []
        return max([self.min_opset, *wide, *(_OPSET_OF_NATIVE[width] for width in native)])

    def check_activation_bits(self, bits: int) -> None:
        """Raise ConfigError if the runtime does not take activations of so few bits."""
        if bits < 8 and not self.activation.narrow:
            raise ConfigError(
                f"activations of {bits} bits are not for target {self.name}, which takes no Clip between "
                "QuantizeLinear and DequantizeLinear (its activation.narrow is false): choose 8 bits."
            )

    def storage_for(self, storage: WeightStorage | None) -> WeightStorage:
        """Return how weights are stored: as the option says, or by default as the runtime reads them.

        Raises
        ------
        ConfigError
            If the runtime does not read weights stored like this.
        """
        if storage is None:
            return WeightStorage.PACKED if self.weight.packed else WeightStorage.INT8
        if storage is WeightStorage.PACKED and not self.weight.packed:
            raise ConfigError(
                f"option storage=packed is not for target {self.name}, which does not unfold weights "
                "(its weight.packed is false): choose int8, or leave the option out."
            )
        if storage is WeightStorage.NATIVE and not self.weight.storage:
            raise ConfigError(
                f"option storage=native is not for target {self.name}, which reads no ONNX type below 8 bits "
                "(its weight.storage is empty): leave the option out, or choose int8."
            )
        return storage

    def activation_spec(self, bits: int) -> QuantSpec:
        """Spec of an activation; more than 8 bits are stored in 16."""
        form = IntFormat.full(bits, signed=self.activation.container == "int8")
        zero_points = (0, 0) if self.activation.symmetric else (form.qmin, form.qmax)
        return QuantSpec(form, zero_points=zero_points, scales=self.activation.scale)


def names() -> list[str]:
    """Names of the shipped targets."""
    return sorted(
        p.name.removesuffix(".toml") for p in resources.files(__name__).iterdir() if p.name.endswith(".toml")
    )


def load(name: str) -> Target:
    """Read a shipped target by name, or a target file by path; ``"auto"`` is the one that fits this machine.

    A file with a field ``extends``, the name of a shipped target or a path from the file's own folder, takes
    what it does not say from there: tables are merged field by field, lists replaced; an empty table stays
    empty. Its name and title are always its own.

    Raises
    ------
    ConfigError
        If there is no such target, if targets extend each other in a circle, or if a file is wrong.
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
    """Return which target was chosen and why, or None if the name says it."""
    if name != AUTO:
        return None
    chosen, why = machine.fitting()
    return f"target {chosen}: {why}"


def _shipped(name: str) -> Path:
    return Path(str(resources.files(__name__))) / f"{name}.toml"


def _content(path: Path, shown: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """Fields and tables of a file, those of what it extends among them.

    ``above`` are the files that extend it, ``shown`` what errors call it.
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
    """The fields of both, tables merged; of what both have, one's own."""
    merged = {**base, **own}
    for field in base.keys() & own.keys():
        if isinstance(base[field], dict) and isinstance(own[field], dict) and own[field]:
            merged[field] = _merged(base[field], own[field])
    return merged
