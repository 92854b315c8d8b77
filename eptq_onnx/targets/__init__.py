"""Runtimes that a model can be quantized for: one TOML file each, read into a frozen `Target`."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eptq_onnx.config import describe
from eptq_onnx.errors import ConfigError
from eptq_onnx.numerics.types import QuantSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_OLDEST_OPSET = 13
"""From where quantizers have an axis, and axes are inputs, as the rewrites of operators write them."""
_OPSET_OF_16_BITS = 21
"""From where QuantizeLinear knows 16-bit integers."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightRules(_Row):
    """How the runtime wants weights: container type, scales per channel, and the range used at 8 bits.

    ``depthwise_range_8_bits``: that of convolutions of one channel each, where it is another.
    """

    container: str = Field(pattern="^u?int8$")
    per_channel: bool
    range_8_bits: tuple[int, int]
    depthwise_range_8_bits: tuple[int, int] | None = None


class ActivationRules(_Row):
    """How the runtime wants activations (always one scale per tensor)."""

    container: str = Field(pattern="^u?int8$")
    symmetric: bool


class BiasRules(_Row):
    """``integer``: int32 with scale s_x * s_w and zero point 0; else the bias stays float."""

    integer: bool


class OpRules(_Row):
    """Which operators run on integers.

    ``float_output``: layers that run on integers even if their output is not quantized.
    ``absorbed``: clipping operators that vanish into the quantizer behind them.
    ``stored``: operators that look rows up in a constant table: it is stored as int8, one scale a row, and what is
    looked up is made float again.
    """

    layers: frozenset[str]
    arithmetic: frozenset[str]
    equal_scale: frozenset[str]
    absorbed: frozenset[str]
    float_output: frozenset[str]
    stored: frozenset[str] = frozenset()


class Target(_Row):
    """A runtime, as data.

    Parameters
    ----------
    name, title : str
    min_opset : int
        Lowest default-domain opset of the written file, at least 13.
    weight, activation, bias, ops
        Rules, see their classes.
    kernels : dict of str to tuple of str
        Operator to the names of its integer kernels in the runtime's optimized graph; used to verify.
    """

    name: str
    title: str
    min_opset: int = Field(ge=_OLDEST_OPSET)
    weight: WeightRules
    activation: ActivationRules
    bias: BiasRules
    ops: OpRules
    kernels: dict[str, tuple[str, ...]]

    def weight_spec(self, bits: int, axis: int | None, depthwise: bool = False) -> QuantSpec:
        """Spec of a weight with output-channel axis ``axis`` (None for one scale in all), of a depthwise convolution or not."""
        special = self.weight.depthwise_range_8_bits if depthwise else None
        least, most = special or self.weight.range_8_bits
        low, high = (least, most) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        zero_points = min(high - most, 0), max(low - least, 0)
        return QuantSpec(
            bits, low, high, self.weight.container, zero_points == (0, 0), axis if self.weight.per_channel else None, zero_points
        )

    def opset_for(self, activation_bits: int) -> int:
        """Lowest opset that can write these activations."""
        return max(self.min_opset, _OPSET_OF_16_BITS) if activation_bits > 8 else self.min_opset

    def activation_spec(self, bits: int) -> QuantSpec:
        """Spec of an activation; more than 8 bits are stored in 16."""
        container = self.activation.container.replace("8", "16" if bits > 8 else "8")
        low, high = (0, 2**bits - 1) if container.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return QuantSpec(bits, low, high, container, self.activation.symmetric)


def names() -> list[str]:
    """Names of the shipped targets."""
    return sorted(p.name.removesuffix(".toml") for p in resources.files(__name__).iterdir() if p.name.endswith(".toml"))


def load(name: str) -> Target:
    """Read a shipped target by name, or a target file by path.

    Raises
    ------
    ConfigError
        If there is no such target, or its file is wrong.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"target file {name} does not exist.")
        text = path.read_text(encoding="utf-8")
    elif name in names():
        text = (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"target {name!r} is unknown: choose one of {', '.join(names())}, or give a .toml file.")
    try:
        return Target.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"target file {name} is not valid TOML: {e}.") from e
    except ValidationError as e:
        raise ConfigError(f"target file {name}: {describe(e, 'field')}") from e
