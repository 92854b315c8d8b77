"""Mixed precision: the best choice within the budget, and a gain over uniform widths."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from graphs import images, known, normal, parse, silent, small_convnet

import eptq_onnx
from eptq_onnx import data, targets
from eptq_onnx.config import Budget, Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.file_count import FileSizes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.allocate import (
    WIDTHS,
    Candidates,
    Goal,
    candidates,
    front_of,
    keeps_within,
    solve,
    with_widths,
)
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.records import Network

TARGET = targets.load("ort-x64")


def goal(*budgets: str, **options: Any) -> Goal:
    return Goal(options.pop("minimized", "noise"), tuple(map(Budget.model_validate, budgets)), **options)


def drawn(seed=0):
    """Five weights with three widths each, and the parts of their file."""
    rng = np.random.default_rng(seed)
    weights = {}
    for k in range(5):
        errors = np.sort(rng.uniform(0, 1, 3))[::-1] * 10.0 ** rng.integers(-2, 3)
        weights[f"w{k}"] = Candidates(
            int(rng.integers(10, 50)),
            dict(zip((2, 3, 4), errors.tolist(), strict=True)),
            float(rng.integers(100, 400)),
        )
    sizes = FileSizes(
        20, {n: {b: -(-w.size * b // 8) + 1 for b in (2, 3, 4)} for n, w in weights.items()}, {2: 3, 3: 9}
    )
    return weights, sizes


def costs_of(weights, sizes, choice):
    pairs = list(zip(weights.values(), choice, strict=True))
    return {
        "noise": sum(w.effects[b] for w, b in pairs),
        "weights": sum(w.size * b for w, b in pairs) / sum(w.size for w in weights.values()),
        "bytes": 20
        + sum(sizes.weights[n][b] for n, b in zip(weights, choice, strict=True))
        + sum(sizes.shared.get(b, 0) for b in set(choice)),
        "bitops": sum(w.operations * b for w, b in pairs),
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("minimized", "limits"),
    [
        ("noise", {"weights": 0.5}),
        ("noise", {"bytes": 0.5}),
        ("noise", {"bitops": 0.5}),
        ("noise", {"weights": 0.6, "bytes": 0.5, "bitops": 0.7}),
        ("bytes", {"noise": 0.3}),
        ("bytes", {"noise": 0.5, "bitops": 0.6}),
    ],
)
def test_the_program_is_solved_exactly(seed, minimized, limits):
    """Against all choices; a limit is given as a share of the range of its currency."""
    weights, sizes = drawn(seed)
    every = [costs_of(weights, sizes, choice) for choice in product((2, 3, 4), repeat=5)]
    amounts = {}
    for name, share in limits.items():
        values = [costs[name] for costs in every]
        amounts[name] = min(values) + share * (max(values) - min(values))
    fitting = [c[minimized] for c in every if all(c[name] <= amount for name, amount in amounts.items())]
    noise = {"most_noise": amounts.pop("noise") + 0.5, "activation_noise": 0.5} if "noise" in amounts else {}
    wanted = goal(*(f"{name}={amount!r}" for name, amount in amounts.items()), minimized=minimized, **noise)
    if not fitting:
        with pytest.raises(ConfigError, match="cannot be met together"):
            solve(weights, wanted, sizes)
        return
    found = solve(weights, wanted, sizes)
    assert costs_of(weights, sizes, found.values())[minimized] == pytest.approx(min(fitting), rel=1e-5)


def test_the_front_has_the_least_noise_at_every_size():
    weights, sizes = drawn()
    widths = solve(weights, goal("weights=3"), sizes)
    front = front_of(weights, sizes, widths)
    every = [costs_of(weights, sizes, choice) for choice in product((2, 3, 4), repeat=5)]
    assert [p.bytes for p in front] == sorted(known(p.bytes) for p in front)
    assert front[0].bytes == min(c["bytes"] for c in every)
    assert min(p.noise for p in front) == pytest.approx(min(c["noise"] for c in every))
    for point in front:
        if not point.chosen:
            assert point.noise == pytest.approx(
                min(c["noise"] for c in every if c["bytes"] <= known(point.bytes)), rel=1e-5
            )
    [chosen] = [p for p in front if p.chosen]
    expected = costs_of(weights, sizes, widths.values())
    assert chosen.bytes == expected["bytes"]
    assert chosen.bits == pytest.approx(expected["weights"])


NO_SIZES = FileSizes(0, {"w": {2: 3, 4: 5}}, {})


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_possible():
    with pytest.raises(ConfigError, match=r"budget=weights=1.5 cannot be met.*weights=2"):
        solve({"w": Candidates(10, {2: 1.0, 4: 0.1})}, goal("weights=1.5"), NO_SIZES)


def test_noise_that_no_width_keeps_within_is_refused_with_the_least():
    with pytest.raises(ConfigError, match=r"max_noise=0\.05 leaves weights a noise of 0\.03 .* cause 0\.1"):
        solve(
            {"w": Candidates(10, {2: 1.0, 4: 0.1})},
            goal(minimized="bytes", most_noise=0.05, activation_noise=0.02),
            NO_SIZES,
        )


def test_a_file_that_is_too_small_is_refused_with_the_smallest_possible():
    """Two weights of one width share its table: 20 + 3 + 3 + 5 bytes."""
    weights = {name: Candidates(10, {2: 1.0, 4: 0.1}) for name in "vw"}
    sizes = FileSizes(20, {name: {2: 3, 4: 5} for name in "vw"}, {2: 5, 4: 5})
    with pytest.raises(ConfigError, match=r"budget=bytes=30 cannot be met.*bytes=31; give"):
        solve(weights, goal("bytes=30"), sizes)
    assert solve(weights, goal("bytes=31"), sizes) == {"v": 2, "w": 2}


@pytest.mark.parametrize("text", ["weights", "bits=4", "weights=much", "weights=-1", "weights="])
def test_an_unreadable_budget_is_refused(text):
    with pytest.raises(ConfigError, match="option budget"):
        Config(budget=text)


def test_widths_meet_the_budget_and_leave_the_rest_of_the_plan_alone():
    config = Config()
    model = normalize(small_convnet(), 13)
    p = plan(model, TARGET, config)
    samples = data.read({"image": images(32)}, model)
    calibration = calibrate(model, p, samples, config, silent)
    view = GraphView(model)
    sizes = {n: view.constant(n).size for n in p.weight_specs}
    parts = FileSizes(0, {n: dict.fromkeys(WIDTHS, size) for n, size in sizes.items()}, {})
    network, wanted = Network(model, p, calibration), goal("weights=3.5")
    found = candidates(network, Selection(samples, np.arange(32)), TARGET, config, silent)
    widths = solve(found, wanted, parts)
    mixed = with_widths(p, widths, TARGET)
    assert keeps_within(found, wanted, widths)
    assert not keeps_within(found, goal("weights=2.5"), widths)
    assert [p.chosen for p in front_of(found, parts, widths)].count(True) == 1
    mean = sum(sizes[n] * s.bits for n, s in mixed.weight_specs.items()) / sum(sizes.values())
    assert 2.5 < mean <= 3.5
    assert len({s.bits for s in mixed.weight_specs.values()}) > 1
    assert mixed.activations == p.activations


def test_effects_are_those_on_samples_that_the_rounding_has_not_seen():
    config = Config()
    model = normalize(
        parse("g (float[N,96] x) => (float[N,10] y) { y = MatMul (x, w) }", {"w": normal(96, 10)}), 13
    )
    p = plan(model, TARGET, config)
    effects = {}
    for count in (64, 2048):
        samples = data.read({"x": normal(count, 96, seed=1)}, model)
        calibration = calibrate(model, p, samples, config, silent)
        [found] = candidates(
            Network(model, p, calibration), Selection(samples, np.arange(count)), TARGET, config, silent
        ).values()
        effects[count] = found.effects
    for bits in (2, 3, 4):
        # With 96 terms, 64 rows can be fitted: measured on these rows, the error would be less than half its
        # value.
        assert 0.9 < effects[64][bits] / effects[2048][bits] < 2


def test_errors_that_add_up_over_positions_are_counted_as_such():
    config, effects = Config(), []
    flat = np.broadcast_to(normal(64, 16, 1, 1, seed=1), (64, 16, 5, 5)).copy()
    for end in ("y = Identity (c)", "y = GlobalAveragePool (c)"):
        text = f"g (float[N,16,5,5] x) => (float[N,8,h,w] y) {{ c = Conv (x, w)  {end} }}"
        model = normalize(parse(text, {"w": normal(8, 16, 1, 1)}), 13)
        p = plan(model, TARGET, config)
        samples = data.read({"x": flat}, model)
        calibration = calibrate(model, p, samples, config, silent)
        [found] = candidates(
            Network(model, p, calibration), Selection(samples, np.arange(64)), TARGET, config, silent
        ).values()
        effects.append(found.effects)
    # The error is the same at all positions of a flat image, so their mean keeps all of it.
    for bits in (2, 4, 8):
        assert effects[1][bits] == pytest.approx(effects[0][bits], rel=0.2)


def test_a_weight_that_fits_the_grid_at_the_measured_width_needs_no_more():
    config = Config()
    w = np.random.default_rng(0).integers(0, 16, (24, 10)).astype(np.float32)
    w[:2] = [[0], [15]]
    model = normalize(parse("g (float[N,24] x) => (float[N,10] y) { y = MatMul (x, w) }", {"w": w}), 13)
    p = plan(model, TARGET, config)
    samples = data.read({"x": normal(64, 24, seed=1)}, model)
    calibration = calibrate(model, p, samples, config, silent)
    [found] = candidates(
        Network(model, p, calibration), Selection(samples, np.arange(64)), TARGET, config, silent
    ).values()
    assert found.effects[4] < 1e-6
    # Relative to the variance of the output, 4 levels of 16 do some harm.
    assert 1e-3 < found.effects[2] < 1


def test_mixed_widths_beat_uniform_ones_of_the_same_size(models_folder):
    results = {}
    widths: dict[str, dict[str, Any]] = {
        "mixed": {"budget": "weights=3"},
        "uniform": {"weight_bits": 3, "edge_bits": 3},
    }
    for name, options in widths.items():
        config = Config(steps=0, activation_bits=8, **options)
        results[name] = eptq_onnx.quantize(
            models_folder / "digits_mobile.onnx", models_folder / "digits_calib.npz", config
        )
    sqnr = {name: next(iter(r.report.verification.outputs.values())) for name, r in results.items()}
    assert sqnr["mixed"] > sqnr["uniform"] + 1


def test_the_smallest_file_within_a_limit_of_noise(models_folder):
    most = 0.05
    with np.load(models_folder / "digits_calib.npz") as file:
        samples = {name: values[:64] for name, values in file.items()}
    config = Config(preset="fast", start="nearest", objective="bytes", max_noise=most)
    found = eptq_onnx.quantize(models_folder / "digits_resnet.onnx", samples, config)
    [chosen] = [p for p in found.report.front if p.chosen]
    assert chosen.noise <= most
    sizes = [known(p.bytes) for p in found.report.front]
    assert found.model.ByteSize() <= known(chosen.bytes) < 0.9 * max(sizes)
    smaller = [p for p in found.report.front if known(p.bytes) < known(chosen.bytes)]
    assert all(p.noise > chosen.noise for p in smaller)
