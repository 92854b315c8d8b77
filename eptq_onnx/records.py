"""The frozen records that the steps pass to each other. Pure data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.grid import FINER, Grid
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, Values


@dataclass(frozen=True)
class Quantizer:
    """What is quantized with one grid.

    Parameters
    ----------
    name : str
        The most upstream tensor.
    tensors : tuple of str
        All tensors with this grid.
    spec : QuantSpec
    """

    name: str
    tensors: tuple[str, ...]
    spec: QuantSpec


@dataclass(frozen=True)
class ActivationQuantizer(Quantizer):
    """Activations that share one scale and zero point.

    Each has a QuantizeLinear/DequantizeLinear pair, unless its values are carried (`Plan.carried`). Those in
    ``sources`` are calibrated; the others are made from them by equal-scale operators.

    Parameters
    ----------
    bounds : tuple of float
        Limits that the activation function guarantees; the quantized range stays inside, so that the function
        can be dropped. Infinite where there are none.
    through : str
        Tensor at which the quantization error is measured: ``name``, or the result of the scalar function
        that is its only reader. For instance, values that SiLU flattens need no range in front of it.
    channel_axis : int or None
        Channel axis, along which Hessian scores are separate although the scale is per tensor; see
        `eptq_onnx.ops.channel_axes_of`. None for a tensor of unknown rank or without axes.
    others : tuple of str
        Tensors of the group whose values do not come from ``name``, as the other inputs of a Concat that
        shares one scale; the range covers them, too.
    prescribed : tuple of two floats, or None
        The range, if the runtime prescribes it.
    """

    bounds: tuple[float, float] = (-np.inf, np.inf)
    through: str = ""
    channel_axis: int | None = None
    others: tuple[str, ...] = ()
    prescribed: tuple[float, float] | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the tensors whose values are all that the group holds."""
        return self.name, *self.others


FULL_BITS = 8
"""Bits of activations above which integers have 16."""
DYNAMIC_BITS = 8
"""Bits of activations that are quantized in every run: DynamicQuantizeLinear makes uint8."""


@dataclass(frozen=True)
class DynamicQuantizer:
    """A tensor that layers quantize in every run, with the range that it has there.

    Parameters
    ----------
    name : str
        The tensor; all its other readers get its float values.
    nodes : tuple of str
        The layers that read it so, in topological order.
    """

    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class ConstantOperand(Quantizer):
    """A constant that an integer operator reads like an activation; its range is known."""


@dataclass(frozen=True)
class LookupTable(Quantizer):
    """A table that float operators look rows up in, stored as integers with one scale per row or block.

    Parameters
    ----------
    weight : str
        The weight of a layer that holds the same rows, stored once for both; or empty.
    """

    weight: str = ""


@dataclass(frozen=True)
class HeldWeight(Quantizer):
    """A weight of float operators that are no layers, as LSTM; it is stored as integers."""


@dataclass(frozen=True)
class Layer:
    """One node with a constant weight that is quantized.

    Parameters
    ----------
    node : str
        Node name.
    op_type : str
    weight, input, output, result : str
        Tensor names; ``output`` is z_l, the value before the activation function, and ``result`` the value
        behind an absorbed clipping function.
    bias : str or None
        Name of the bias. For a layer without one, the name that a learned bias will get; None if the operator
        takes no bias.
    has_bias : bool
        False if the float model gives this layer no bias.
    weight_spec : QuantSpec
    output_axis : int
        Channel axis of ``output``.
    edge : bool
        True for a first or last layer.
    depthwise : bool
        True for a convolution with one input and one output channel per group.
    stored : bool
        True if only the weight is quantized: it is stored as integers, and the layer computes in float.
    dynamic : bool
        True if the layer runs on integers and its input is quantized in every run; see `DynamicQuantizer`.
    """

    node: str
    op_type: str
    weight: str
    input: str
    output: str
    result: str
    bias: str | None
    has_bias: bool
    weight_spec: QuantSpec
    output_axis: int
    edge: bool
    depthwise: bool
    stored: bool = False
    dynamic: bool = False

    @property
    def static(self) -> bool:
        """Return True if the input has a fixed grid, of which an integer bias has the scale."""
        return not (self.stored or self.dynamic)

    @property
    def tensors(self) -> tuple[str, str, str]:
        """Return its input and output tensors; if one of them stays float, so does the layer."""
        return self.input, self.output, self.result


@dataclass(frozen=True)
class KeptFloat:
    """A node that stays in floating point, and why."""

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What is quantized, and how.

    Parameters
    ----------
    layers : tuple of Layer
        In topological order.
    activations : tuple of ActivationQuantizer
        In topological order of their first tensor.
    operands : tuple of ConstantOperand
        In the order of their first readers.
    tables : tuple of LookupTable
    held : tuple of HeldWeight
        In the order of their first readers.
    integer_nodes : dict of str to str
        Name and operator of every node that should run on integers, layers included.
    absorbed : dict of str to str
        Clipping nodes made redundant by the quantizer behind them, and their operators.
    kept_float : tuple of KeptFloat
    bias : BiasSpec or None
        How biases are stored as integers; None if they stay float.
    exact : frozenset of str
        Float nodes that only choose by value. Where the original values exist, they read these rather than
        the quantized ones.
    float_outputs : bool
        True if outputs of the network have the values before a quantizer.
    carried : frozenset of str
        Quantized tensors without a pair of their own: their values are moved from others of the group.
    guarded : frozenset of str
        Results of float layers between quantizers, which the runtime would quantize unasked.
    shielded : frozenset of str
        Float nodes that the runtime would compute on the integers of their inputs unasked, and wrongly.
    dynamic : tuple of DynamicQuantizer
        In topological order of their first readers.
    wide : frozenset of str
        Nodes that compute with 16 bits and have activations of fewer, which are converted; see
        `eptq_onnx.method.plan.wide`.
    rewritten : frozenset of str
        Activations of at most 8 bits that such nodes write.
    """

    layers: tuple[Layer, ...]
    activations: tuple[ActivationQuantizer, ...]
    operands: tuple[ConstantOperand, ...]
    tables: tuple[LookupTable, ...]
    integer_nodes: Mapping[str, str]
    absorbed: Mapping[str, str]
    kept_float: tuple[KeptFloat, ...]
    bias: BiasSpec | None
    exact: frozenset[str] = frozenset()
    float_outputs: bool = False
    carried: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()
    shielded: frozenset[str] = frozenset()
    dynamic: tuple[DynamicQuantizer, ...] = ()
    held: tuple[HeldWeight, ...] = ()
    wide: frozenset[str] = frozenset()
    rewritten: frozenset[str] = frozenset()

    def input_scales(self, scales: Mapping[str, Array]) -> dict[str, Array]:
        """Return the scale of the integers that each layer computes with, of those with fixed grids.

        Parameters
        ----------
        scales : mapping of str to ndarray
            Scale of each quantizer, by its name.
        """
        known, found = self.quantizer_of, dict[str, Array]()
        for layer in self.static_layers:
            quantizer = known[layer.input]
            converted = layer.node in self.wide and quantizer.spec.bits <= FULL_BITS
            own = scales[quantizer.name]
            found[layer.node] = np.asarray(own / np.float32(FINER), np.float32) if converted else own
        return found

    @property
    def integer_layers(self) -> tuple[Layer, ...]:
        """Return the layers that run on integers."""
        return tuple(layer for layer in self.layers if not layer.stored)

    @property
    def static_layers(self) -> tuple[Layer, ...]:
        """Return the layers that run on integers and whose inputs have fixed grids."""
        return tuple(layer for layer in self.layers if layer.static)

    @property
    def activation_names(self) -> list[str]:
        """Return the names of all activations that are quantized, with a fixed or a dynamic range."""
        return list(dict.fromkeys([*(q.name for q in self.activations), *(q.name for q in self.dynamic)]))

    @property
    def stored(self) -> tuple[Layer, ...]:
        """Return the layers whose weights are quantized and whose activations are float."""
        return tuple(layer for layer in self.layers if layer.stored)

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Return all quantizers but those of weights."""
        return (*self.activations, *self.constants)

    @property
    def constants(self) -> tuple[Quantizer, ...]:
        """Return the quantizers of constants that are no weights of layers."""
        return (*self.operands, *self.tables, *self.held)

    @property
    def quantizer_of(self) -> dict[str, Quantizer]:
        """Return the quantizer of each quantized tensor that is no weight."""
        return {tensor: q for q in self.quantizers for tensor in q.tensors}

    @property
    def bits_of(self) -> dict[str, int]:
        """Return the bits of each activation quantizer, by its name."""
        return {q.name: q.spec.bits for q in self.activations}

    @property
    def weight_specs(self) -> dict[str, QuantSpec]:
        """Return the spec of each quantized weight; shared weights appear once."""
        return {layer.weight: layer.weight_spec for layer in self.layers}

    @property
    def shared_weights(self) -> set[str]:
        """Return the weights that several layers read."""
        return {name for name, count in Counter(layer.weight for layer in self.layers).items() if count > 1}


@dataclass(frozen=True)
class Calibration:
    """Results of the calibration pass.

    Parameters
    ----------
    grids : dict of str to Grid
        Grid of each quantizer, by its name.
    power : dict of str to float
        Mean square of the finite values of each layer output, and of each tensor from which the model's
        outputs are assembled.
    variance : dict of str to float
        Variance of the same values.
    unused_samples : int
        Samples left over because their number is not a multiple of the batch size that the model prescribes.
    not_finite : dict of str to float
        Tensors with NaN or infinite values, and the share of these values; they enter no statistic.
    """

    grids: Mapping[str, Grid]
    power: Mapping[str, float]
    variance: Mapping[str, float]
    unused_samples: int = 0
    not_finite: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Label-free Hessian bound (paper section 3.1), estimated by Hutchinson probes.

    Parameters
    ----------
    channels : dict of str to ndarray of shape (n_samples, n_channels)
        Per layer output and per quantized activation, the mean of (J^T v)^2 over probes and positions.
    weights : dict of str to ndarray
        Per weight tensor, the mean of (d<v, f>/dW)^2 over samples, in the weight's shape.
    outputs : dict of str to ndarray of shape (n_channels, n_channels)
        Per output of a layer whose groups have several channels each, the mean of (J^T v)(J^T v)^T over
        samples and probes, summed over positions.
    output_size : int
        Elements of all probed outputs of one sample.
    positions : dict of str to ndarray of shape (n_samples, n_positions)
        Per layer output, the mean of (J^T v)^2 over probes and channels at each position, relative to the
        mean over all positions. Only some layers are included if all would take too much memory.
    samples : ndarray of shape (n_samples,)
        Indices of the scored samples, which are the rows above.
    unreached : dict of str to str
        Layers that no gradient reaches, and why.
    """

    channels: Mapping[str, Array]
    weights: Mapping[str, Array]
    outputs: Mapping[str, NDArray[np.float64]]
    output_size: int
    positions: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)
    samples: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    unreached: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """The float network that the samples run, with its plan, calibration and scores.

    Parameters
    ----------
    model : ModelProto
        Normalized.
    plan : Plan
    calibration : Calibration
    scores : Scores or None
    """

    model: ModelProto
    plan: Plan
    calibration: Calibration
    scores: Scores | None = None


@dataclass(frozen=True)
class Rounding:
    """The integers and grids to be written.

    Parameters
    ----------
    integers : dict of str to ndarray
        Per weight tensor, the values of its format in the container's type, without zero points folded in.
    weights : dict of str to Grid
        Grids of the weights, by their names.
    grids : dict of str to Grid
        Grids of the other quantizers, by their names.
    biases : dict of str to ndarray
        Per layer bias, float.
    targets : dict of str to ndarray
        Per weight tensor, the real values that the integers were rounded from; they may be loaded only on
        access.
    """

    integers: Mapping[str, Values]
    weights: Mapping[str, Grid]
    grids: Mapping[str, Grid]
    biases: Mapping[str, Array]
    targets: Mapping[str, Array]
