"""The parameters that the optimization learns, and their updates."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.config import Config, Optimizer, RoundingVariable
from eptq_onnx.engines.base import ACTIVATION_SCALES, FLOAT_SHARE, LOSS, TrainingGraph
from eptq_onnx.errors import GradientError
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.optimizers import Adam, MovingAverage, RAdam, copy_into
from eptq_onnx.numerics.rounding import RoundedWeight, SoftWeight, StraightThroughWeight
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.parallel import ordered_map
from eptq_onnx.records import Calibration, Plan, Rounding
from eptq_onnx.runtime import Session
from eptq_onnx.training.batches import Batches
from eptq_onnx.training.worth import Effort

_RISE = 0.1
"""Share of the steps in which the learning rates rise to their full values."""

_MEMORY = 0.2
"""Length of the moving average that candidates are taken from, as a share of the steps.

Single steps fluctuate around it.
"""

_KINDS: dict[RoundingVariable, type[SoftWeight] | type[StraightThroughWeight]] = {
    RoundingVariable.SOFT: SoftWeight,
    RoundingVariable.STRAIGHT_THROUGH: StraightThroughWeight,
}


class Learned:
    """All learned parameters, and their updates."""

    def __init__(
        self,
        plan: Plan,
        start: Rounding,
        graph: TrainingGraph,
        calibration: Calibration,
        config: Config,
        effort: Effort,
    ) -> None:
        total = effort.steps
        self._augments = effort.augments
        self._plan, self._start, self._graph, self._config, self._total = plan, start, graph, config, total
        learnable = [n for n, spec in plan.weight_specs.items() if n in graph.gradients and not spec.is_given]
        kind = _KINDS[config.rounding]
        self.weights: dict[str, RoundedWeight] = {
            n: kind(
                quant_math.continuous(start.targets[n], start.integers[n], start.weights[n]),
                start.weights[n],
                plan.weight_specs[n],
            )
            for n in learnable
        }
        self._frozen = {
            n: start.weights[n].dequantize(start.integers[n])
            for n in plan.weight_specs
            if n not in self.weights
        }
        self._bias_unit = {
            x.bias: np.float32(np.sqrt(calibration.power[x.output]) or 1.0)
            for x in plan.layers
            if x.bias is not None and x.bias in graph.gradients
        }
        self._bias_shift: dict[str, Array] = {n: np.zeros_like(start.biases[n]) for n in self._bias_unit}
        self._log_scales: Array = np.zeros(len(graph.quantizers), np.float32)
        self._pace = 1.0
        self._first_scales = np.array([float(start.grids[q].scale) for q in graph.quantizers], np.float32)
        self._layers_of = {n: [k for k, x in enumerate(plan.layers) if x.weight == n] for n in self.weights}
        rounding = RAdam if config.optimizer is Optimizer.RADAM else Adam
        self._rounding = rounding({n: w.variable for n, w in self.weights.items()})
        self._factors = Adam({n: w.gamma for n, w in self.weights.items()})
        self._biases = Adam(self._bias_shift)
        self._scales = Adam({ACTIVATION_SCALES: self._log_scales})
        self._variables = {
            **{("variable", n): w.variable for n, w in self.weights.items()},
            **{("gamma", n): w.gamma for n, w in self.weights.items()},
            **{("bias", n): shift for n, shift in self._bias_shift.items()},
            ("scales", ACTIVATION_SCALES): self._log_scales,
        }
        self._means = MovingAverage(self._variables, _MEMORY * total)

    def step(
        self,
        session: Session,
        batches: Batches,
        chosen: NDArray[np.int64],
        layer_weights: Array,
        step: int,
        rng: np.random.Generator,
    ) -> float:
        """Update all parameters from the samples at ``chosen``; return the loss."""
        steps = {n: p.scale for n, p in self._start.weights.items()} | {
            n: w.scale * w.gamma for n, w in self.weights.items()
        }
        weights = {n: w.forward() for n, w in self.weights.items()}
        feeds = self._parameters(
            weights, steps, self._biases_of(self._bias_shift), self._scales_of(self._log_scales)
        )
        feeds[FLOAT_SHARE] = np.array([max(0.0, 1 - (step + 1) / self._total)], np.float32)
        gradients: dict[str, Array] = {}
        loss = 0.0
        wanted = [LOSS, *self._graph.gradients.values()]
        for values in ordered_map(
            lambda run: session.run(run, wanted),
            batches.runs(chosen, feeds, session, rng if self._augments else None),
        ):
            loss += float(values[LOSS])
            for name, output in self._graph.gradients.items():
                value = values[output]
                gradients[name] = gradients[name] + value if name in gradients else value
        for name, value in gradients.items():
            if not np.isfinite(value).all():
                raise GradientError(f"the gradient of {name} in step {step + 1} is not a number.")
        return loss + self._update(gradients, layer_weights, step)

    def _update(self, gradients: dict[str, Array], layer_weights: Array, step: int) -> float:
        config, total = self._config, self._total
        warm = config.warmup * total
        strength = config.rounding_strength if step >= warm else 0.0
        exponent = 20 + (2 - 20) * min(1.0, max(0.0, (step - warm) / max(1.0, total - warm)))
        penalty, alphas, gammas = 0.0, {}, {}
        for name, weight in self.weights.items():
            factor = strength * float(sum(layer_weights[k] for k in self._layers_of[name]))
            alphas[name], gammas[name] = weight.backward(gradients[name], factor, exponent)
            if factor:
                penalty += factor * weight.penalty(exponent)
        # Adam's first steps are as long as the others but based on the least information.
        cosine = 0.5 * (1 + np.cos(np.pi * step / total)) * min(1.0, (step + 1) / (_RISE * total))
        self._rounding.step(alphas, config.rounding_rate * self._pace * cosine)
        self._factors.step(gammas, config.scale_lr * cosine)
        self._biases.step(
            {n: gradients[n] * unit for n, unit in self._bias_unit.items()}, config.bias_lr * cosine
        )
        if ACTIVATION_SCALES in gradients:
            self._scales.step(
                {ACTIVATION_SCALES: gradients[ACTIVATION_SCALES] * self._scales_of(self._log_scales)},
                config.activation_scale_lr * cosine,
            )
        self._means.update()
        return penalty

    def saved(self) -> dict[str, Any]:
        """Return the state that the steps have changed."""
        return {
            "variables": self._variables,
            "pace": self._pace,
            "optimizers": [o.saved() for o in self._followers],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `saved` returned."""
        copy_into(self._variables, saved["variables"])
        self._pace = saved["pace"]
        for follower, known in zip(self._followers, saved["optimizers"], strict=True):
            follower.restore(known)

    @property
    def _followers(self) -> tuple[Adam | MovingAverage[tuple[str, str]], ...]:
        return self._rounding, self._factors, self._biases, self._scales, self._means

    def slow_down(self) -> None:
        """Halve the step size of the rounding variables: weights that flip back and forth disturb others."""
        self._pace /= 2

    def harden(self) -> Rounding:
        """Return the rounding at the moving average of the parameters, with every weight decided."""
        means = self._means.values
        integers, weights = dict(self._start.integers), dict(self._start.weights)
        for name, weight in self.weights.items():
            settled = copy(weight)
            settled.variable, settled.gamma = means["variable", name], means["gamma", name]
            integers[name], weights[name] = settled.harden()
        grids = dict(self._start.grids)
        quantizers = {q.name: q for q in self._plan.activations}
        for name, scale in zip(
            self._graph.quantizers, self._scales_of(means["scales", ACTIVATION_SCALES]), strict=True
        ):
            spec, bounds = quantizers[name].spec, quantizers[name].bounds
            grids[name] = quant_math.inside_bounds(spec.grid(scale, grids[name].zero_point), spec, bounds)
        biases = self._biases_of({n: means["bias", n] for n in self._bias_shift})
        return Rounding(integers, weights, grids, {**self._start.biases, **biases}, self._start.targets)

    def hard_parameters(self, rounding: Rounding) -> Feeds:
        """Return the feeds of the evaluation graph for a hard-rounded candidate."""
        weights = {n: rounding.weights[n].dequantize(rounding.integers[n]) for n in self._plan.weight_specs}
        scales = np.array([float(rounding.grids[q].scale) for q in self._graph.quantizers], np.float32)
        return self._parameters(
            weights, {n: p.scale for n, p in rounding.weights.items()}, dict(rounding.biases), scales
        )

    def _parameters(
        self, weights: dict[str, Array], steps: dict[str, Array], biases: dict[str, Array], scales: Array
    ) -> Feeds:
        """Return feeds for weights with the given step sizes; biases are rounded as they will be written."""
        feeds: Feeds = {**self._frozen, **weights, **self._start.biases, **biases}
        spec = self._plan.bias
        if spec is not None:
            activations = {n: p.scale for n, p in self._start.grids.items()}
            activations.update(zip(self._graph.quantizers, scales, strict=True))
            inputs = self._plan.input_scales(activations)
            for layer in self._plan.static_layers:
                if layer.bias is not None:
                    grid = inputs[layer.node], steps[layer.weight]
                    exact = np.asarray(feeds[layer.bias], np.float32)
                    feeds[layer.bias] = spec.round(exact, *grid)
        if self._graph.quantizers:
            feeds[ACTIVATION_SCALES] = scales
        return feeds

    def _biases_of(self, shifts: dict[str, Array]) -> dict[str, Array]:
        return {n: self._start.biases[n] + shift * self._bias_unit[n] for n, shift in shifts.items()}

    def _scales_of(self, logarithms: Array) -> Array:
        result: Array = self._first_scales * np.exp(logarithms)
        return result
