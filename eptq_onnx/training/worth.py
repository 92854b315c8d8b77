"""What the network-wise optimization costs, what it can gain, and when it has gained enough.

Costs are counted in float passes: runs of all scored samples through the float network, or of 128 if there
are fewer. They follow from numbers of samples, not from the clock, so that the length of a run, and with it
the result, is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.config import PRESET_PASSES, Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.records import ActivationQuantizer, Plan

A_STEP = 10.0
"""Cost of one sample in a step, in runs of the float network.

Float network, quantized network, losses and gradients; 9 to 12 measured on convolutional networks.
"""
A_CHECK = 4.0
"""Cost of one sample in a check: both networks and the errors of all layers; 3.5 to 5 measured."""
_VARIATIONS = 3
"""Augmented variants of each held-out sample that candidates are judged on, besides the sample itself."""
_FEW = 128
"""Fewest samples that count as a float pass: the fewer there are, the less time matters."""
_OFTEN = 20
"""How often each sample may be seen before it is varied.

Within the budgets of the presets, a sample is seen less than 10 times.
"""
_COARSE = 4
"""Bits of weights below which the optimization gets more time."""
_FINE, _CALM = 7, 8
"""Bits of weights from which, next to activations of so many, activations cause most of the noise.

The share of the noise that is due to weights at W8A8, and W7A8 without VNNI: digits_resnet 0.03; ResNet-20
0.17; shapes_detector, digits_mobile less than can be measured. Of a share of 0.3, the optimization takes 1 %.
"""
_MOST_CHECKS = 10
_APART = 5.0
"""Float passes between checks, at least."""
LITTLE = 0.01
"""Fall of the held-out error that does not pay for the float passes of ``patience``."""
RESTORED = 256
"""Most samples by which slopes are restored."""
_REMOVED = 0.1
"""Share of the noise that the optimization may hope to remove where rounded weights cause all of it.

Measured from the closed-form start, on held-out samples: 1 to 10 %, see `tools/EXPERIMENTS.md`.
"""


@dataclass(frozen=True)
class Effort:
    """Length and cost of an optimization.

    Parameters
    ----------
    steps : int
        Most steps.
    batch : int
        Samples of a step.
    checks : tuple of int
        Numbers of steps after which a candidate is judged; the last is ``steps``.
    a_step, a_check : float
        Cost of a step and of a check, in float passes.
    restoring : float
        Cost of what follows the last step, in float passes.
    augments : bool
        True if the samples of the steps are varied.
    patience : float
        Float passes in which the held-out error must fall by `LITTLE`; 0 if there is no limit.
    """

    steps: int
    batch: int
    checks: tuple[int, ...]
    a_step: float
    a_check: float
    restoring: float
    augments: bool
    patience: float

    @classmethod
    def of(cls, config: Config, plan: Plan, samples: Samples, scored: int, held: int) -> Effort:
        """Plan an optimization.

        Parameters
        ----------
        config : Config
        plan : Plan
        samples : Samples
        scored : int
            Number of scored samples.
        held : int
            How many of them candidates are judged on.
        """
        seen = scored - held or held
        batch = min(max(1, config.batch_size // samples.rows), seen)
        augments = config.augment
        if augments is None:
            augments = (config.steps or 0) * batch > _OFTEN * seen
        a_pass = max(scored, _FEW)
        a_step = A_STEP * batch / a_pass
        a_check = A_CHECK * views(augments) * held / a_pass
        # The result with restored slopes is judged, too.
        restoring = A_CHECK * min(scored, RESTORED) / a_pass + a_check
        steps, count = config.steps, _MOST_CHECKS
        if steps is None:
            budget = PRESET_PASSES[config.preset][is_coarse(plan, config)] - a_check - restoring
            count = min(max(int(budget / (_APART + a_check)), 1), count)
            steps = max(int((budget - count * a_check) / a_step), 1)
        checks = tuple(sorted({-(-steps * k // count) for k in range(1, count + 1)}))
        return cls(steps, batch, checks, a_step, a_check, restoring, augments, float(config.patience))

    @property
    def passes(self) -> float:
        """Cost of all steps and checks."""
        return self.spent(self.steps) + self.restoring

    def spent(self, step: int) -> float:
        """Return the float passes up to the check after ``step`` steps; 0 stands for that of the start."""
        return step * self.a_step + self.a_check * (1 + sum(check <= step for check in self.checks))

    def ending(self, errors: Mapping[int, float], is_settled: bool) -> str:
        """Return why the optimization ends after a check, or nothing if it goes on.

        Parameters
        ----------
        errors : mapping of int to float
            Held-out error after each check so far, by steps.
        is_settled : bool
            True if the start will be kept.
        """
        if not self.patience or max(errors) == self.steps:
            return ""
        if is_settled:
            return "stopped as nothing was to be gained"
        now = self.spent(max(errors))
        before = [step for step in errors if now - self.spent(step) >= self.patience]
        if before:
            former = min(errors[step] for step in errors if step <= max(before))
            if min(errors.values()) > (1 - LITTLE) * former:
                return f"stopped as {self.patience:g} float passes gained less than {100 * LITTLE:g} %"
        return ""


def is_learned(quantizer: ActivationQuantizer, config: Config) -> bool:
    """Return True if the scale of an activation is learned, as far as gradients reach it.

    At 8 bits, that gains nothing (ResNet-20 W4A8: 18.40 dB without, 18.41 dB with) and costs a sixth of the
    step.
    """
    free = quantizer.spec.scales is ScaleRule.ANY and quantizer.prescribed is None
    return free and quantizer.spec.bits < 8 and config.activation_scale_lr > 0


def is_coarse(plan: Plan, config: Config) -> bool:
    """Return True if steps are so coarse that long optimizations gain."""
    low = any(spec.bits < _COARSE for spec in plan.weight_specs.values())
    return low or any(is_learned(q, config) for q in plan.activations)


def may_pay(plan: Plan, config: Config) -> bool:
    """Return False where quantized activations cause nearly all noise, which no rounding of weights changes.

    That is so next to weights of 7 bits and more, with evenly spaced steps and activations of 8 bits.
    """
    few = (config.activation_budget or _CALM) < _CALM
    if config.steps or config.chooses_widths or few or uneven_type(plan) is not None:
        return True
    weights = [spec.bits for spec in plan.weight_specs.values()]
    activations = [q.spec.bits for q in plan.activations]
    return min(weights, default=_FINE) < _FINE or set(activations) != {_CALM}


def uneven_type(plan: Plan) -> str | None:
    """Return a type of weights or activations whose steps grow with the values; None if there is none."""
    specs = [*plan.weight_specs.values(), *(q.spec for q in plan.activations)]
    return next((spec.format.type_name for spec in specs if not spec.format.has_equal_steps), None)


def views(augments: bool) -> int:
    """Return how often a check runs each held-out sample: as it is, and varied if those of steps are."""
    return 1 + _VARIATIONS * augments


def promised(total: NDArray[np.float64], fixed: NDArray[np.float64]) -> float:
    """Return the share of the outputs' noise that the optimization may hope to remove.

    What activations of fixed ranges cause, no rounding removes; noise of several causes adds up. It also
    hides the rest from the gradients: of a share s of the noise, a share s of what is possible is found.

    Parameters
    ----------
    total, fixed : ndarray of shape (n_runs, n_parts)
        Noise of the quantized network, and that of the float network with such activations quantized.
    """
    all_of_it = float(total.mean())
    share = max(0.0, 1 - float(fixed.mean()) / all_of_it) if all_of_it > 0 else 0.0
    return _REMOVED * share**2
