"""Records of where a quantized network loses accuracy. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.types import Array


@dataclass(frozen=True)
class SampleNoise:
    """A sample on which the quantized model differs much.

    Parameters
    ----------
    sample : int
        Its index among all samples; of a run that takes several, that of the first.
    output : str
        The output that differs most.
    sqnr_db : float
        SQNR of that output on this sample, in dB.
    name : str
        The sample's own name, such as that of its file; empty if it has none.
    """

    sample: int
    output: str
    sqnr_db: float
    name: str = ""


@dataclass(frozen=True)
class Histogram:
    """Values of a tensor, and the range that its grid represents.

    Parameters
    ----------
    layer : str
        The layer that reads the tensor.
    what : str
        ``"input"`` for the layer's input, in its own unit; ``"weights"`` for its weights, in steps of their
        scales, so that all channels share one axis.
    low, high : float
        Ends of the histogram.
    counts : tuple of int
        Values in each bin; all bins have the same width.
    least, most : float
        Smallest and largest value that the grid represents, in the same unit.
    outside : float
        Share of the values outside that range, which are clipped.
    """

    layer: str
    what: str
    low: float
    high: float
    counts: tuple[int, ...]
    least: float
    most: float
    outside: float


@dataclass(frozen=True)
class Loud:
    """Something that causes much of the noise.

    Parameters
    ----------
    nodes : tuple of str
        The node whose weights they are, or the integer nodes that read the activation.
    share : float
        Share of the noise of all weights, or of all activations.
    """

    nodes: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class OutputNoise:
    """Causes of the noise of the outputs; each is the squared error as a share of the outputs' variance.

    It is measured on samples that no step has seen, if there are any.

    Parameters
    ----------
    samples : int
        Samples that were run.
    total : float
        Noise of the quantized network.
    weights, activations : float
        Noise if only weights, and if only activations are quantized.
    seen : float or None
        Noise of the quantized network on samples that ranges and rounding were chosen on; None if all samples
        are such.
    loud_weights, loud_activations : tuple of Loud
        The few weights, and the few activations, that cause most of the noise of their kind, loudest first;
        empty if many do.
    """

    samples: int
    total: float
    weights: float
    activations: float
    seen: float | None = None
    loud_weights: tuple[Loud, ...] = ()
    loud_activations: tuple[Loud, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Where a quantized network loses accuracy.

    Parameters
    ----------
    samples : int
        Samples on which layers were compared.
    own : dict of str to float
        SQNR in dB of each layer's quantized output if all layers in front of it have their float outputs: the
        noise that the layer adds itself, with what lies between it and those layers.
    nearest : dict of str to float
        SQNR in dB of each layer's quantized output if all weights are rounded to nearest, with all errors
        from upstream.
    histograms : tuple of Histogram
        Inputs and weights of the layers with the most noise of their own.
    noise : OutputNoise or None
        None if the outputs are so close to the float model's that nobody needs the causes, or if no output
        can be compared.
    """

    samples: int
    own: Mapping[str, float]
    nearest: Mapping[str, float]
    histograms: tuple[Histogram, ...]
    noise: OutputNoise | None = None


@dataclass(frozen=True)
class NodePlace:
    """How a node of the network is computed.

    Parameters
    ----------
    node, op_type : str
    runs : str
        ``"integers"``; ``"merged"`` into a quantizer behind it, which clips as it does; ``"float"``; or
        ``"other"`` for a node that computes no floating-point values.
    why : str
        Bits of a layer, or the reason why a node stays float.
    """

    node: str
    op_type: str
    runs: str
    why: str


@dataclass(frozen=True)
class Picture:
    """A sample as the network sees it.

    Parameters
    ----------
    name : str
        Its file, or its number.
    noise : SampleNoise
    pixels : ndarray of uint8, shape (height, width, 3)
    """

    name: str
    noise: SampleNoise
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Exhibits:
    """What only a page shows; the JSON report leaves it out.

    Parameters
    ----------
    network : tuple of NodePlace
        All nodes in the order of execution.
    attention : ndarray of shape (n_layers, n_samples), or None
        Sample-layer attention of some of the scored samples, relative to the largest layer's mean.
    histograms : tuple of Histogram
    pictures : tuple of Picture
        The samples on which the models differ most, worst first, if they are pictures.
    """

    network: tuple[NodePlace, ...] = ()
    attention: Array | None = None
    histograms: tuple[Histogram, ...] = ()
    pictures: tuple[Picture, ...] = ()
