from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from eptq_onnx.config import Budget, WeightStorage
from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.file_count import FileCount, Storing
from eptq_onnx.method import fit_bytes as fitting
from eptq_onnx.method.allocate import Candidates, Goal, keeps_within, solve
from eptq_onnx.method.fit_bytes import fit_bytes, smallest_file

WIDTHS = (2, 4, 8)


def drawn(seed, count):
    """A file of weights, and made-up effects of their widths."""
    rng = np.random.default_rng(seed)
    nodes, constants, outputs, found = [], [], [], {}
    for k in range(count):
        shape = [(24, 16, 3, 3), (64, 40), (40, 1, 3, 3), (48, 16, 3, 3)][rng.integers(4)]
        constants += [
            numpy_helper.from_array(np.zeros(shape, np.int8), f"w{k}"),
            numpy_helper.from_array(np.ones(shape[0], np.float32), f"s{k}"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", [f"w{k}", f"s{k}"], [f"y{k}"], axis=0))
        outputs.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, shape))
        errors = np.sort(rng.uniform(0, 1, len(WIDTHS)))[::-1] * 10.0 ** rng.integers(-2, 3)
        found[f"w{k}"] = Candidates(int(np.prod(shape)), dict(zip(WIDTHS, errors.tolist(), strict=True)))
    graph = helper.make_graph(nodes, "weights", [], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    zero_points = {name: dict.fromkeys(WIDTHS, True) for name in found}
    return FileCount(model, {n: n for n in found}, Storing(WeightStorage.PACKED, (), zero_points)), found


def chosen(count, found, limit):
    def choose(sizes, allowed):
        return solve(found, Goal("noise", (Budget(unit="bytes", amount=allowed),)), sizes)

    return fit_bytes(choose, {n: w.effects for n, w in found.items()}, count, limit)


@pytest.mark.parametrize("all_counted", [True, False])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), number=st.integers(1, 5), share=st.floats(0, 1))
@example(seed=136, number=3, share=0.3125)
def test_the_file_fits_and_no_weight_could_have_more_bits(monkeypatch, all_counted, seed, number, share):
    monkeypatch.setattr(fitting, "_MOST_TRIED", 2048 if all_counted else 0)
    count, found = drawn(seed, number)
    every = [dict(zip(found, choice, strict=True)) for choice in product(WIDTHS, repeat=number)]
    sizes = [count.bytes(widths) for widths in every]
    limit = int(min(sizes) + share * (max(sizes) - min(sizes)))
    widths = chosen(count, found, limit)
    assert count.bytes(widths) <= limit
    for name, weight in found.items():
        for bits in WIDTHS:
            if bits > widths[name] and weight.effects[bits] < weight.effects[widths[name]]:
                assert count.bytes({**widths, name: bits}) > limit

    def noise(choice):
        return sum(found[n].effects[b] for n, b in choice.items())

    best = min(noise(choice) for choice, size in zip(every, sizes, strict=True) if size <= limit)
    assert noise(widths) == pytest.approx(best) if all_counted else noise(widths) >= best * (1 - 1e-9)


def test_the_smallest_file_is_told():
    count, found = drawn(0, 3)
    every = [dict(zip(found, choice, strict=True)) for choice in product(WIDTHS, repeat=3)]
    least = min(count.bytes(widths) for widths in every)
    with pytest.raises(ConfigError, match=f"bytes={least - 1} cannot be met.*bytes={least}; give"):
        chosen(count, found, least - 1)
    assert count.bytes(chosen(count, found, least)) == least


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.floats(2, 6))
def test_other_budgets_hold_beside_that_of_bytes(seed, number, mean):
    count, found = drawn(seed, number)
    bits = Budget(unit="weights", amount=mean)
    limit = count.bytes(dict.fromkeys(found, 8))

    def choose(sizes, allowed):
        return solve(found, Goal("noise", (Budget(unit="bytes", amount=allowed), bits)), sizes)

    effects = {n: w.effects for n, w in found.items()}
    keeps = lambda widths: keeps_within(found, Goal("noise", (bits,)), widths)  # noqa: E731
    widths = fit_bytes(choose, effects, count, limit, keeps)
    assert keeps(widths)
    assert count.bytes(widths) <= limit


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0, 1))
def test_the_smallest_file_within_a_limit_of_noise(seed, number, share):
    count, found = drawn(seed, number)
    every = [dict(zip(found, choice, strict=True)) for choice in product(WIDTHS, repeat=number)]

    def noise(choice):
        return sum(found[n].effects[b] for n, b in choice.items())

    noises = [noise(choice) for choice in every]
    most = min(noises) + share * (max(noises) - min(noises))
    goal = Goal("bytes", most_noise=most * (1 + 1e-6))
    widths = smallest_file(lambda sizes, _: solve(found, goal, sizes), count, None)
    assert noise(widths) <= most * (1 + 1e-4)
    least = min(count.bytes(c) for c, n in zip(every, noises, strict=True) if n <= most)
    assert count.bytes(widths) <= 2 * least
    with pytest.raises(ConfigError, match="smallest file within the other limits"):
        smallest_file(lambda sizes, _: solve(found, goal, sizes), count, count.bytes(widths) - 1)
