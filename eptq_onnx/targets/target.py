"""A runtime, as data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from eptq_onnx.config import FLOAT_BITS, Activations, Config, FloatType, WeightStorage
from eptq_onnx.errors import ConfigError
from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.formats import FLOATS, IntFormat, PerAxis, PerBlock, PerTensor
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.targets.rows import (
    ActivationRules,
    BiasRules,
    BlockRules,
    Operator,
    PatternRules,
    RestRules,
    Row,
    Runs,
    WeightRules,
)

_OLDEST_OPSET = 13
"""First opset in which quantizers have an axis, and axes are inputs, as the graph rewrites need them."""
_LEAST_NBITS = 16
"""Smallest block of MatMulNBits."""
OPSETS = {
    "int16": 21, "uint16": 21, "int4": 21, "uint4": 21, "int2": 25, "uint2": 25, "float4e2m1": 23,
    "float8e4m3fn": 19, "float8e4m3fnuz": 19, "float8e5m2": 19, "float8e5m2fnuz": 19,
}  # fmt: skip
"""Type to the first opset in which QuantizeLinear and DequantizeLinear support it."""
_FEW, _FULL, _MANY = 4, 8, 16
"""Bits of activations that a budget chooses from."""
ONNXRUNTIME = "onnxruntime"
"""The verifier that is always installed."""


class Target(Row):
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
    shapes : str
        ``"static"``: inputs have fixed sizes, and there are no If, Loop and Scan; ``"any"``.
    processor : str
        ``"vnni"``: 8-bit products saturate on x86-64 processors that lack it; ``"any"``.
    elsewhere : str
        Name of the target for the same runtime on processors that lack it; may be empty.
    weight, blocks, activation, bias, rest, patterns
        See the classes of these rules.
    operators : dict of str to Operator
        Operator, without its domain, to its row.
    """

    name: str
    title: str
    min_opset: int = Field(ge=_OLDEST_OPSET)
    verifier: str = "none"
    outputs: Literal["shared", "float"] = "shared"
    shapes: Literal["any", "static"] = "any"
    processor: Literal["any", "vnni"] = "any"
    elsewhere: str = ""
    weight: WeightRules
    blocks: BlockRules = BlockRules()
    activation: ActivationRules
    bias: BiasRules
    rest: RestRules = RestRules()
    patterns: PatternRules = PatternRules()
    operators: dict[str, Operator]

    @model_validator(mode="after")
    def _without_integer_biases_of_floats(self) -> Target:
        floats = FLOATS.keys() & {self.weight.container, self.activation.container}
        if self.bias.integer and floats:
            raise ValueError(
                f"an integer bias has the scale of integer weights and activations: with {floats.pop()}, "
                "bias.integer is false"
            )
        return self

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
    def dynamic(self) -> frozenset[str]:
        """Return the layers whose inputs can be quantized in every run."""
        return frozenset(op for op, row in self.operators.items() if row.dynamic and row.runs == "layer")

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
        granularity = PerAxis(axis) if axis is not None and self.weight.per_channel else PerTensor()
        if self.weight.container in FLOATS:
            return QuantSpec(FLOATS[self.weight.container], granularity, scales=self.weight.scale)
        special = self.weight.depthwise_range_8_bits if depthwise else None
        least, most = special or self.weight.range_8_bits
        low, high = max(-(2 ** (bits - 1)), least), min(2 ** (bits - 1) - 1, most)
        zero_points = high - most, low - least
        return QuantSpec(IntFormat(bits, True, low, high), granularity, zero_points, self.weight.scale)

    def block_spec(self, bits: int, axis: int, size: int) -> QuantSpec:
        """Return the spec of a weight with one scale for each block of ``size`` values along an axis."""
        granularity = PerBlock(axis, size)
        if not self.blocks.zero_points:
            return QuantSpec(IntFormat.full(bits, signed=True), granularity, scales=self.weight.scale)
        form = IntFormat.full(bits, signed=False)
        return QuantSpec(form, granularity, (form.qmin, form.qmax), self.weight.scale)

    def bias_spec(self) -> BiasSpec | None:
        """Return how biases are stored as integers; None if they stay float."""
        rules = self.bias
        return BiasSpec(rules.container, self.weight.scale, rules.zero_point) if rules.integer else None

    def table_spec(self) -> QuantSpec:
        """Return the spec of a stored lookup table: one scale per row, by the scale rule of weights."""
        return QuantSpec(IntFormat(8, True, -127, 127), PerAxis(0), scales=self.weight.scale)

    def held_spec(self, bits: int, axis: int) -> QuantSpec:
        """Return the spec of a weight that only float kernels read: no integer product limits its range."""
        granularity = PerAxis(axis) if self.weight.per_channel else PerTensor()
        low, high = max(-(2 ** (bits - 1)), -127), 2 ** (bits - 1) - 1
        zero_points = high - 127, low + 127
        return QuantSpec(IntFormat(bits, True, low, high), granularity, zero_points, self.weight.scale)

    def opset_for(
        self, activation_bits: int, storage: WeightStorage | None = None, block: int | None = None
    ) -> int:
        """Return the lowest opset with the types of these activations and of weights stored like this."""
        native: tuple[int, ...] = self.weight.storage if storage is WeightStorage.NATIVE else ()
        if block is not None and self._storage_of_blocks(storage) is WeightStorage.NATIVE:
            native = (*native, 4)
        types = {
            self.weight.container,
            self.activation.type_name(activation_bits),
            *(f"int{width}" for width in native),
        }
        return max([self.min_opset, *(OPSETS.get(name, 1) for name in types)])

    def check_bits(self, config: Config) -> None:
        """Check that the runtime supports the widths that the options ask for.

        Raises
        ------
        ConfigError
            If it does not.
        """
        weights = {config.weight_bits, config.edge_bits, *(w for _, w, _ in config.node_bits)}
        activations = {config.activation_bits, *(a for _, _, a in config.node_bits)}
        for what, container, widths in (
            ("weights", self.weight.container, weights),
            ("activations", self.activation.container, activations),
        ):
            if container not in FLOATS:
                continue
            if what == "weights" and config.chooses_widths:
                option = "budget" if config.width_budgets else "objective=bytes"
                raise ConfigError(
                    f"option {option} is not for target {self.name}, whose weights are all {container}: "
                    "leave it out."
                )
            if other := widths - {FLOATS[container].bits}:
                raise ConfigError(
                    f"target {self.name} does not support {min(other)}-bit {what}, because its {what} are "
                    f"{container}: choose {FLOATS[container].bits} bits."
                )
        if config.activation_budget is not None:
            self.activation_widths(config.activation_budget)
        if config.activations is Activations.DYNAMIC:
            self._check_dynamic(activations)
        if config.block is not None:
            self._check_block(config.block, self.storage_for(config.storage, config.block))
        elif FLOAT_BITS in activations and not self.weight.packed:
            raise ConfigError(
                f"target {self.name} does not store the weights of float layers as integers (its "
                "weight.packed is false): choose other activation bits than 32."
            )
        if (least := min(activations)) < 8 and not self.activation.narrow:
            raise ConfigError(
                f"target {self.name} does not support {least}-bit activations, because it takes no Clip "
                "between QuantizeLinear and DequantizeLinear (its activation.narrow is false): choose 8 bits."
            )

    def activation_widths(self, mean: float) -> tuple[int, ...]:
        """Return the widths that each activation may get where a budget limits their mean, in order.

        They are 8 and 16, and 4 for a mean below 8.

        Raises
        ------
        ConfigError
            If the runtime does not compute with as many as the budget is for.
        """
        rules, option = self.activation, f"option budget=activations={mean:.15g}"
        if rules.container in FLOATS:
            raise ConfigError(
                f"{option} is not for target {self.name}, whose activations are all {rules.container}: leave "
                "it out."
            )
        if mean < _FULL and not rules.narrow:
            raise ConfigError(
                f"{option} needs activations of 4 bits, which target {self.name} does not support, because "
                "it takes no Clip between QuantizeLinear and DequantizeLinear (its activation.narrow is "
                f"false): {'give 8 or more' if rules.wide else 'leave it out'}."
            )
        if mean >= _FULL and not rules.wide:
            other = "give less than 8, for 4 and 8 bits, or" if rules.narrow else "choose another target, or"
            raise ConfigError(
                f"{option} needs activations of 16 bits, with which target {self.name} does not compute on "
                f"integers (its activation.wide is false): {other} leave it out."
            )
        few, many = (_FEW,) if mean < _FULL else (), (_MANY,) if rules.wide else ()
        return (*few, _FULL, *many)

    def with_widest(self, config: Config) -> Config:
        """Return the options with the most bits that a budget may give to activations."""
        if config.activation_budget is None:
            return config
        widest = max(self.activation_widths(config.activation_budget))
        return config.model_copy(update={"activation_bits": widest, "activations": Activations.STATIC})

    def _check_dynamic(self, widths: Collection[int]) -> None:
        """Check that the runtime quantizes activations in every run, and at these widths."""
        if not self.dynamic:
            raise ConfigError(
                f"option activations=dynamic is not for target {self.name}, which has no kernels that find "
                "the ranges of activations in every run: choose activations=static with samples, or another "
                "target."
            )
        if other := set(widths) - {8, FLOAT_BITS}:
            raise ConfigError(
                f"option activations=dynamic quantizes activations to 8 bits, not {min(other)}: choose 8 "
                "bits, or activations=static."
            )

    def _check_block(self, size: int, storage: WeightStorage) -> None:
        """Check that the runtime reads blocks of this size if they are stored so.

        Raises
        ------
        ConfigError
            If it does not.
        """
        if storage is WeightStorage.NATIVE and size not in self.blocks.sizes:
            sizes = ", ".join(map(str, self.blocks.sizes))
            raise ConfigError(
                f"option block={size} is not for target {self.name}, which reads blocks of {sizes} (its "
                "blocks.sizes): choose one of these."
            )
        if storage is WeightStorage.MATMULNBITS and (size < _LEAST_NBITS or size & (size - 1)):
            raise ConfigError(
                f"option block={size} is not for storage=matmulnbits, whose blocks are a power of two of at "
                f"least {_LEAST_NBITS}: choose such a size, or storage=packed."
            )

    def storage_for(self, storage: WeightStorage | None, block: int | None = None) -> WeightStorage:
        """Return how weights are stored: by the option, or by default as the runtime supports it.

        Parameters
        ----------
        storage : WeightStorage or None
        block : int or None
            Size of the blocks of weights, if they have any.

        Raises
        ------
        ConfigError
            If the runtime does not support the option.
        """
        if block is not None:
            return self._storage_of_blocks(storage)
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

    def _storage_of_blocks(self, storage: WeightStorage | None) -> WeightStorage:
        """Return how weights in blocks are stored; see `storage_for`."""
        has = {
            WeightStorage.MATMULNBITS: bool(self.blocks.matmul_nbits),
            WeightStorage.PACKED: self.weight.packed,
            WeightStorage.NATIVE: bool(self.blocks.sizes),
            WeightStorage.INT8: self.weight.packed,
        }
        if not any(has.values()) or self.weight.container in FLOATS:
            raise ConfigError(
                f"option block is not for target {self.name}, which reads no weights in blocks (its "
                "blocks.sizes is empty): leave it out."
            )
        if storage is None:
            return next(one for one, there in has.items() if there)
        if not has[storage]:
            raise ConfigError(
                f"option storage={storage.value} is not for target {self.name} with weights in blocks: "
                f"choose {' or '.join(one.value for one, there in has.items() if there)}, or leave it out."
            )
        return storage

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

    def activation_spec(self, bits: int) -> QuantSpec:
        """Return the spec of an activation; widths above 8 bits are stored in 16."""
        least_range = self.activation.least_range
        if self.activation.container in FLOATS:
            return QuantSpec(
                FLOATS[self.activation.container], scales=self.activation.scale, least_range=least_range
            )
        form = IntFormat.full(bits, signed=self.activation.container == "int8")
        zero_points = (0, 0) if self.activation.symmetric else (form.qmin, form.qmax)
        return QuantSpec(form, zero_points=zero_points, scales=self.activation.scale, least_range=least_range)
