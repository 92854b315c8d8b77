"""What the steps ask of a gradient engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnx import ModelProto

from eptq_onnx.errors import GradientError, ModelError
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.runtime import Session

LOSS = "eptq/loss"
ERRORS = "eptq/errors"
ATTENTION = "eptq/attention"
ACTIVATION_SCALES = "eptq/activation_scales"
FLOAT_SHARE = "eptq/float_share"
TEACHER = "teacher/"
"""What the names of the float network's tensors begin with."""

UNREACHED = "no output depends on it through operators that have a gradient"


@dataclass(frozen=True)
class GradientModel:
    """A model with gradient outputs.

    Parameters
    ----------
    model : ModelProto
        The forward graph and its backward pass; the tensors of ``wrt`` that were initializers are inputs.
        Outputs: the loss, the outputs of the forward graph, the gradients.
    gradients : dict of str to str
        Tensor to the name of its gradient (same shape).
    unreached : dict of str to str
        Tensors of ``wrt`` that the loss does not depend on through differentiable operators, with the reason.
    """

    model: ModelProto
    gradients: dict[str, str]
    unreached: dict[str, str]


@dataclass(frozen=True)
class TrainingGraph:
    """The graph of a training step and that of an evaluation.

    Parameters
    ----------
    train, evaluate : ModelProto
        Inputs: the model's own; every weight and bias by name; `ACTIVATION_SCALES` of shape (n_quantizers,);
        `ATTENTION` of shape (micro_batch, ``columns``), the factor of each sum of squares; and, in ``train``
        only, `FLOAT_SHARE` of shape (1,), the share p of the unquantized activations. Outputs: `LOSS`,
        `ERRORS` of the shape of `ATTENTION` (of each channel of each layer, then of each part of the model's
        outputs), and in ``train`` the gradients.
    gradients : dict of str to str
        Input to the name of its gradient.
    quantizers : tuple of str
        Order of the activation scales.
    channels : tuple of int
        Channels of each layer's output.
    positions : ndarray of shape (n_layers,)
        Positions (everything but samples and channels) of each layer's output.
    outputs : dict of str to float
        The parts of the model's outputs that are compared, and elements a sample of each.
    last : tuple of bool
        True for each layer that has none behind it: what it makes is an output of the model, or nearly so.
        Its outputs in both networks are outputs of ``evaluate``, too.
    micro_batch : int
        Samples of one run.
    input_axes : dict of str to int
        The channel axis of each input of the model.
    unreached : dict of str to str
        Weights that no gradient reaches, and why.
    notes : tuple of str
        What could not be rewritten for differentiation, and why.
    """

    train: ModelProto
    evaluate: ModelProto
    gradients: dict[str, str]
    quantizers: tuple[str, ...]
    channels: tuple[int, ...]
    positions: Array
    outputs: dict[str, float]
    last: tuple[bool, ...]
    micro_batch: int
    input_axes: dict[str, int]
    unreached: dict[str, str]
    notes: tuple[str, ...]

    @property
    def columns(self) -> int:
        """Sums of squares of a sample."""
        return sum(self.channels) + len(self.outputs)


def reachable(
    view: GraphView, loss: str, wrt: Sequence[str], blocked: frozenset[str]
) -> tuple[list[str], dict[str, str]]:
    """Those of ``wrt`` that the loss depends on, not going through nodes named in ``blocked``; and why the
    others are none."""
    relevant = view.upstream([loss], blocked)
    return [n for n in wrt if n in relevant], {n: UNREACHED for n in wrt if n not in relevant}


class GradientSession(Session):
    """A session of a model with gradients.

    Raises
    ------
    GradientError
        If onnxruntime cannot run it: its builder knows no tensors without elements, say.
    """

    def __init__(self, model: ModelProto, *, integers: bool = True) -> None:
        try:
            super().__init__(model, integers=integers)
        except ModelError as e:
            raise GradientError(str(e)) from e

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Feeds:
        """See `Session.run`."""
        try:
            return super().run(feeds, outputs)
        except ModelError as e:
            raise GradientError(str(e)) from e


class Engine(ABC):
    """Builds backward passes; making one raises `InstallError` if what it needs is missing or damaged.

    Attributes
    ----------
    name : str
        What the option ``engine`` and the report call it.
    about : str
        In a few words, for help and the documentation: where its gradients come from, and what it needs.
    preference : int
        Of the engines that can run here, the one with the largest is chosen by itself. `standard`, which
        always can, has 0: with less than that an engine is chosen by name only.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    preference: ClassVar[int] = -1

    @classmethod
    def available(cls) -> bool:
        """True if what it needs is installed; by default it needs nothing more than the package does."""
        return True

    @abstractmethod
    def differentiate(self, model: ModelProto, loss: str, wrt: Sequence[str]) -> GradientModel:
        """Gradient of a scalar with respect to initializers, inputs or intermediate tensors.

        It passes a QuantizeLinear with its DequantizeLinear straight through, as if they were not there.

        Parameters
        ----------
        model : ModelProto
            With known shapes, and only operators that have a gradient or block it.
        loss : str
            A scalar output of the model.
        wrt : sequence of str

        Raises
        ------
        GradientError
            If the graph cannot be differentiated.
        """
