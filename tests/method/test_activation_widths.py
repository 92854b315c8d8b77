"""The widths of activations and weights are the best within the limits: against all choices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.config import Budget
from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.file_count import FileSizes
from eptq_onnx.method.allocate import (
    Activation,
    Candidates,
    Goal,
    Work,
    front_of_activations,
    joint_program,
    mean_bits,
    measured,
    operations,
    widths_of,
)
from eptq_onnx.program import NOISE, solve

NOTHING = FileSizes(0, {}, {})


def drawn(seed, widths=(8, 16)):
    """Three weights, four activations, and layers that share some of both."""
    rng = np.random.default_rng(seed)
    weights = {
        f"w{k}": Candidates(
            int(rng.integers(10, 50)), {2: float(rng.uniform(0.1, 1)), 4: float(rng.uniform(0, 0.1))}
        )
        for k in range(3)
    }
    activations = {
        f"a{k}": Activation(
            float(rng.integers(10, 100)), {b: float(rng.uniform() * 4.0 ** (2 - b)) for b in widths}
        )
        for k in range(4)
    }
    ends = ["a0", "a1", "a2", "a3", ""]
    works = [
        Work(f"w{k % 3}", float(rng.integers(100, 400)), str(rng.choice(ends[:4])), str(rng.choice(ends)))
        for k in range(5)
    ]
    sizes = FileSizes(
        20, {n: {b: -(-w.size * b // 8) for b in (2, 4)} for n, w in weights.items()}, {2: 3, 4: 9}
    )
    return weights, activations, works, sizes


def costs_of(weights, activations, works, sizes, choice):
    """What a choice costs, spelled out."""
    own = dict(zip((*weights, *activations), choice, strict=True))
    bits = {n: own[n] for n in activations}
    total = 0.0
    for work in works:
        read, written = own[work.reads], own.get(work.writes, 0)
        total += work.multiplications * own[work.weight] * (max(read, written) if written == 16 else read)
    return {
        "noise": sum(w.effects[own[n]] for n, w in weights.items())
        + sum(a.effects[own[n]] for n, a in activations.items()),
        "weights": sum(w.size * own[n] for n, w in weights.items()) / sum(w.size for w in weights.values()),
        "activations": sum(a.values * own[n] for n, a in activations.items())
        / sum(a.values for a in activations.values()),
        "bytes": 20
        + sum(sizes.weights[n][own[n]] for n in weights)
        + sum(sizes.shared[b] for b in {own[n] for n in weights})
        + sum({4: 100, 8: 0, 16: 200}[own[n]] for n in activations),
        "bitops": total,
    }, bits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("widths", [(8, 16), (4, 8), (4, 8, 16)], ids=str)
@pytest.mark.parametrize(
    ("minimized", "limits"),
    [
        ("noise", {"activations": 0.5}),
        ("noise", {"bitops": 0.3}),
        ("noise", {"activations": 0.6, "weights": 0.5, "bitops": 0.5}),
        ("bytes", {"noise": 0.2, "activations": 0.5}),
        ("bytes", {"noise": 0.4, "bitops": 0.4}),
    ],
)
def test_the_joint_program_is_solved_exactly(seed, widths, minimized, limits):
    """A limit is given as a share of the range of its currency."""
    weights, activations, works, sizes = drawn(seed, widths)
    choices = product(*[w.effects for w in weights.values()], *[a.effects for a in activations.values()])
    every = [costs_of(weights, activations, works, sizes, choice) for choice in choices]
    amounts = {}
    for name, share in limits.items():
        values = [costs[name] for costs, _ in every]
        amounts[name] = min(values) + share * (max(values) - min(values))
    fitting = [(c, b) for c, b in every if all(c[n] <= a * (1 + 1e-9) for n, a in amounts.items())]
    noise = {"most_noise": amounts.pop("noise")} if "noise" in amounts else {}
    budgets = tuple(Budget.model_validate(f"{n}={a!r}") for n, a in amounts.items())
    goal = Goal(minimized, budgets, **noise)
    if not fitting:
        with pytest.raises(ConfigError, match="cannot be met together"):
            widths_of(activations, weights, works, goal, sizes)
        return
    found = widths_of(activations, weights, works, goal, sizes)
    least = min(c[minimized] for c, _ in fitting)
    # The same widths of activations, with the best of weights, are as good.
    assert min(c[minimized] for c, b in fitting if b == found) == pytest.approx(least, rel=1e-5)


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_activations_alone_have_the_least_noise_of_their_mean_bits(seed, share):
    _, activations, _, _ = drawn(seed)
    means = {b: mean_bits(activations, dict.fromkeys(activations, b)) for b in (8, 16)}
    most = means[8] + share * (means[16] - means[8])
    goal = Goal(NOISE, (Budget.model_validate(f"activations={most!r}"),))
    found = widths_of(activations, {}, (), goal, NOTHING)
    every = [dict(zip(activations, bits, strict=True)) for bits in product((8, 16), repeat=4)]

    def noise(widths):
        return sum(activations[n].effects[b] for n, b in widths.items())

    fitting = [w for w in every if mean_bits(activations, w) <= most * (1 + 1e-7)]
    assert mean_bits(activations, found) <= most * (1 + 1e-6)
    assert noise(found) == pytest.approx(min(map(noise, fitting)), rel=1e-5)
    front = front_of_activations(activations, found)
    assert [p.chosen for p in front].count(True) == 1
    for point in front:
        assert point.activation_bits is not None
        better = [w for w in every if mean_bits(activations, w) <= point.activation_bits * (1 + 1e-7)]
        assert point.noise <= min(map(noise, better)) * (1 + 1e-5)


def test_multiplications_count_the_bits_that_layers_compute_with():
    works = [Work("v", 10, "a", "b"), Work("v", 5, "b"), Work("w", 2, "a", "a")]
    assert operations(works, {"a": 8, "b": 16}) == {"v": 10 * 16 + 5 * 16, "w": 16}
    assert operations(works, {"a": 8, "b": 8}) == {"v": 120, "w": 16}
    # Fewer bits than 8 are in the same kernels.
    assert operations(works, {"a": 4, "b": 8}) == {"v": 10 * 4 + 5 * 8, "w": 8}


def test_products_cost_only_what_is_taken_together():
    weights, activations, works, sizes = drawn(0)
    program = joint_program(activations, weights, works, sizes)
    cheapest = solve(program, "bitops")
    assert cheapest is not None
    assert cheapest.amount == pytest.approx(sum(w.multiplications * 2 * 8 for w in works))


def test_a_mean_that_is_too_low_is_refused_with_the_lowest():
    _, activations, _, _ = drawn(0)
    goal = Goal(NOISE, (Budget.model_validate("activations=7"),))
    with pytest.raises(ConfigError, match=r"activations=7 cannot be met.*\(8 bits\) take activations=8"):
        widths_of(activations, {}, (), goal, NOTHING)


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    st.integers(4, 60),
    st.sampled_from([(8, 16), (4, 8), (4, 8, 16)]),
)
def test_measured_noise_adds_up_within_the_runs(parts, runs, widths):
    own = {f"q{k}": n for k, n in enumerate(parts)}
    calls = []

    def noise(names, bits):
        calls.append(bits)
        # Together they cause less than one by one.
        return sum(own[n] for n in names) ** 0.9 * 4.0 ** (8 - bits)

    found = measured(dict.fromkeys(own, widths), dict.fromkeys(own, 1.0), noise, runs)
    narrow = [b for b in widths if b <= 8]
    assert len(calls) <= max(runs, 2 * len(narrow)) + len(widths)
    for bits in widths:
        total = sum(a.effects[bits] for a in found.values())
        assert total == pytest.approx(sum(own.values()) ** 0.9 * 4.0 ** (8 - bits))
    if runs >= len(narrow) * (len(own) + 1):
        loudest = max(own, key=lambda n: own[n])
        assert found[loudest].effects[8] == pytest.approx(max(a.effects[8] for a in found.values()))
    # An edge that has no fewer bits than 8 has no effect at 4.
    edge = {name: widths if k else [b for b in widths if b >= 8] for k, name in enumerate(own)}
    found = measured(edge, dict.fromkeys(own, 1.0), noise, runs)
    assert {n: tuple(a.effects) for n, a in found.items()} == {n: tuple(w) for n, w in edge.items()}


def test_noise_that_nothing_causes_alone_is_shared():
    found = measured(
        {"a": (8, 16), "b": (8, 16)}, {"a": 1.0, "b": 1.0}, lambda names, bits: float(len(names) > 1), 10
    )
    assert {n: dict(a.effects) for n, a in found.items()} == {n: {8: 0.5, 16: 0.5} for n in "ab"}


def test_where_no_output_tells_larger_activations_get_the_bits():
    found = measured({"a": (8, 16), "b": (8, 16)}, {"a": 3.0, "b": 5.0}, None, 10)
    goal = Goal(NOISE, (Budget.model_validate("activations=13"),))
    assert widths_of(found, {}, (), goal, NOTHING) == {"a": 8, "b": 16}
