"""The interface of gradient engines, and the graphs that they produce."""

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
"""Prefix of the names of the float network's tensors in a training graph."""

UNREACHED = "no output depends on it through operators that have a gradient"


@dataclass(frozen=True)
class GradientModel:
    """A model with gradient outputs.

    Parameters
    ----------
    model : ModelProto
        The forward graph with its backward pass; initializers in ``wrt`` have become inputs. Outputs: the
        loss, the outputs of the forward graph, the gradients.
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
    """The graphs of a training step and of an evaluation.

    Parameters
    ----------
    train, evaluate : ModelProto
        Inputs: the model's own; every weight and bias by name; `ACTIVATION_SCALES` of shape (n_quantizers,);
        `ATTENTION` of shape (micro_batch, ``columns``), the factor of each sum of squares; and, in ``train``
        only, `FLOAT_SHARE` of shape (1,), the share p of the unquantized activations. Outputs: `LOSS`,
        `ERRORS` of the shape of `ATTENTION` (for each channel of each layer, then for each part of the
        model's outputs), and in ``train`` the gradients.
    gradients : dict of str to str
        Input to the name of its gradient.
    quantizers : tuple of str
        Names of the quantizers, in the order of `ACTIVATION_SCALES`.
    channels : tuple of int
        Number of channels of each layer's output.
    positions : ndarray of shape (n_layers,)
        Number of positions (all axes but samples and channels) of each layer's output.
    outputs : dict of str to float
        The parts of the model's outputs that are compared, with the number of elements per sample of each.
    last : tuple of bool
        True for each layer without another layer downstream: its output is an output of the model, or nearly
        so. The outputs of these layers in both networks are outputs of ``evaluate``, too.
    micro_batch : int
        Samples per run.
    input_axes : dict of str to int
        The channel axis of each input of the model.
    unreached : dict of str to str
        Weights that no gradient reaches, with the reason.
    notes : tuple of str
        What could not be rewritten for differentiation, with the reason.
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
        """Number of sums of squares per sample."""
        return sum(self.channels) + len(self.outputs)


def reachable(
    view: GraphView, loss: str, wrt: Sequence[str], blocked: frozenset[str]
) -> tuple[list[str], dict[str, str]]:
    """Return the tensors of ``wrt`` that the loss depends on, and for each other one the reason.

    Dependence through nodes named in ``blocked`` does not count.
    """
    relevant = view.upstream([loss], blocked)
    return [n for n in wrt if n in relevant], {n: UNREACHED for n in wrt if n not in relevant}


class GradientSession(Session):
    """A session of a model with gradients.

    Raises
    ------
    GradientError
        If onnxruntime cannot run the model; its gradient builder does not support empty tensors, for example.
    """

    _moves = True

    def __init__(self, model: ModelProto, *, integers: bool = True) -> None:
        try:
            super().__init__(model, integers=integers)
        except ModelError as e:
            raise GradientError(str(e)) from e

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Feeds:
        """Run the model; see `Session.run`."""
        try:
            return super().run(feeds, outputs)
        except ModelError as e:
            raise GradientError(str(e)) from e


class Engine(ABC):
    """Builds backward passes; the constructor raises `InstallError` if something is missing or damaged.

    Attributes
    ----------
    name : str
        Name in the option ``engine`` and in the report.
    about : str
        A few words for help and documentation: where the gradients come from, and what the engine needs.
    preference : int
        `AUTO` chooses the available engine with the largest value. `standard`, which is always available, has
        0: an engine with less is chosen by name only.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    preference: ClassVar[int] = -1

    @classmethod
    def available(cls) -> bool:
        """Return True if everything the engine needs is installed; by default it needs nothing extra."""
        return True

    @abstractmethod
    def differentiate(self, model: ModelProto, loss: str, wrt: Sequence[str]) -> GradientModel:
        """Differentiate a scalar with respect to initializers, inputs or intermediate tensors.

        The gradient passes straight through a QuantizeLinear and its DequantizeLinear, as if they were not
        there.

        Parameters
        ----------
        model : ModelProto
            With known shapes; every operator either has a gradient or blocks it.
        loss : str
            A scalar output of the model.
        wrt : sequence of str

        Raises
        ------
        GradientError
            If the graph cannot be differentiated.
        """
