"""Regions, their pieces, and the program that chooses between integers and float: exact, and as the plan allows."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from graphs import known, normal, parse
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from eptq_onnx import targets
from eptq_onnx.config import Config
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.place.costs import STEPS, program_of, steps_of
from eptq_onnx.method.place.joint import joined, without_floats
from eptq_onnx.method.place.pieces import (
    between_convolutions,
    conversions_piece,
    float_piece,
)
from eptq_onnx.method.place.reasons import reasons
from eptq_onnx.method.place.regions import Region, regions_of
from eptq_onnx.method.plan import plan
from eptq_onnx.placement import Representation, TimedRegion, Way
from eptq_onnx.program import (
    BYTES,
    NOISE,
    TIME,
    Option,
    Program,
    Shared,
    Tensor,
    cost_of,
    paths,
    solve,
)
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once

R = Representation
TARGET = targets.load("ort-x64")


# ---- the program -----------------------------------------------------------------------------------------------


@st.composite
def programs(draw):
    """A small network with the options of every region, and the rules that a plan has."""
    costs = st.integers(0, 20).map(float)
    count = draw(st.integers(1, 5))
    options = []
    for _ in range(count):
        kinds = draw(st.sampled_from([(False,), (False, True), (False, True), (True,)]))
        own = []
        for on_integers in kinds:
            places = [r for r in R if r.is_integer == on_integers]
            for _ in range(draw(st.integers(1, 2))):
                ends = draw(st.sampled_from(places)), draw(st.sampled_from(places))
                own.append(Option(*ends, {TIME: draw(costs), "noise": draw(costs) if on_integers else 0.0}))
        options.append(tuple(own))
    tensors = []
    for maker in (None, *range(count)):
        behind = [k for k in range(count) if maker is None or k > maker]
        readers = draw(st.lists(st.sampled_from(behind), unique=True, max_size=3)) if behind else []
        layouts = draw(st.booleans())
        times = {name: draw(costs) for name in STEPS if layouts or "quantize" in name}
        tensors.append(Tensor(maker, tuple(readers), draw(st.booleans()), steps_of(times)))
    regions = st.integers(0, count - 1)
    every_option = [(k, o) for k, own in enumerate(options) for o in range(len(own))]
    shared = [
        Shared(
            tuple(draw(st.lists(st.sampled_from(every_option), unique=True, max_size=3))),
            {"noise": draw(costs)},
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    rules: dict[str, Any] = {
        "needs": tuple(
            (k, tuple(draw(st.lists(regions, unique=True, max_size=2))))
            for k in draw(st.lists(regions, unique=True, max_size=2))
        ),
        "bound": tuple(
            (k, tuple(draw(st.lists(regions, unique=True, max_size=2))), (draw(regions),))
            for k in draw(st.lists(regions, unique=True, max_size=1))
        ),
        "layers": frozenset(draw(st.lists(regions, max_size=2))),
        "shared": tuple(shared),
        "follows": tuple(
            (
                draw(st.sampled_from(every_option)),
                tuple(draw(st.lists(st.sampled_from(every_option), unique=True, max_size=2))),
            )
            for _ in range(draw(st.integers(0, 2)))
        ),
    }
    return Program(tuple(options), tuple(tensors), **rules)


def allowed(program, options):
    on = [program.options[k][o].on_integers for k, o in enumerate(options)]
    return (
        all(not on[k] or any(on[r] for r in readers) for k, readers in program.needs)
        and all(
            on[k] or not (all(on[m] for m in makers) and any(on[r] for r in readers))
            for k, makers, readers in program.bound
        )
        and (not program.layers or any(on[k] for k in program.layers))
        and all(
            options[k] != o or any(options[m] == p for m, p in leaders) for (k, o), leaders in program.follows
        )
    )


def noise_of(program, options):
    own = sum(own[o].costs["noise"] for own, o in zip(program.options, options, strict=True))
    taken = set(enumerate(options))
    return own + sum(s.costs["noise"] for s in program.shared if taken & set(s.options))


def every(program):
    return [c for c in product(*(range(len(own)) for own in program.options)) if allowed(program, c)]


# What fails is small enough without shrinking, which takes minutes.
@settings(deadline=None, max_examples=100, phases=[Phase.reuse, Phase.generate])
@given(programs())
def test_the_program_is_solved_exactly(program):
    best = min((cost_of(program, c) for c in every(program)), default=None)
    found = solve(program)
    if best is None:
        assert found is None
        return
    found = known(found)
    assert allowed(program, found.options)
    assert found.amount == pytest.approx(best, abs=1e-6)
    assert cost_of(program, found.options) == pytest.approx(best, abs=1e-6)
    assert found.conversions <= found.amount + 1e-6


@settings(deadline=None, max_examples=60, phases=[Phase.reuse, Phase.generate])
@given(programs(), st.integers(0, 40), st.booleans())
def test_other_currencies_are_limits_and_objectives(program, limit, swapped):
    """The least time within a limit of noise, and the least noise within a limit of time."""
    objective, other = (cost_of, noise_of) if not swapped else (noise_of, cost_of)
    fitting = [objective(program, c) for c in every(program) if other(program, c) <= limit + 1e-9]
    names = (TIME, "noise") if not swapped else ("noise", TIME)
    found = solve(program, names[0], {names[1]: float(limit)})
    assert (found is None) == (not fitting)
    if found is not None:
        assert found.amount == pytest.approx(min(fitting), abs=1e-5)
        assert found.totals["noise"] == pytest.approx(noise_of(program, found.options), abs=1e-5)


@st.composite
def weighted(draw):
    """A small network whose regions read weights of free widths, and the regions that read each."""
    regions = draw(programs())
    costs = st.integers(0, 20).map(float)
    movable = [
        k
        for k, own in enumerate(regions.options)
        if {o.on_integers for o in own} == {True, False} and k not in regions.layers
    ]
    users, stored = [], st.sampled_from([(), (2, 4)])
    for k in movable[:2]:
        users.append((k, *draw(st.lists(st.sampled_from(movable), unique=True, max_size=1))))
    options = [
        (
            Option(R.FLOAT, R.FLOAT, {NOISE: 0.0, BYTES: draw(costs)}),
            *(Option(R.FLOAT, R.FLOAT, {NOISE: draw(costs), BYTES: draw(costs)}, b) for b in draw(stored)),
            *(Option(R.INTEGERS, R.INTEGERS, {NOISE: draw(costs), BYTES: draw(costs)}, b) for b in (2, 4)),
        )
        for _ in users
    ]
    every = [(w, o) for w, own in enumerate(options) for o, x in enumerate(own) if x.bits == 2]
    shared = (Shared(tuple(every), {BYTES: draw(costs)}),) if every else ()
    return regions, Program(tuple(options), (), shared=shared), [tuple(dict.fromkeys(u)) for u in users]


@settings(deadline=None, max_examples=60, phases=[Phase.reuse, Phase.generate])
@given(weighted(), st.booleans(), st.sampled_from([TIME, NOISE, BYTES]), st.data())
def test_placement_and_widths_are_one_choice_in_three_currencies(drawn, floats, minimized, data):
    """Against all choices: a weight is for integer kernels if and only if a region that reads it is on integers.

    Otherwise it is stored, or float.
    """
    regions, weights, users = drawn
    if not floats:
        weights = without_floats(weights)
        for left in weights.options:
            assert any(not x.on_integers for x in left)
            assert all(x.bits for x in left) or len(left) == 3
    spent = []
    for choice in every(regions):
        on = [regions.options[k][o].on_integers for k, o in enumerate(choice)]
        for widths in product(*(range(len(own)) for own in weights.options)):
            read = [any(on[k] for k in own) for own in users]
            if [own[o].on_integers for own, o in zip(weights.options, widths, strict=True)] != read:
                continue
            own = [o[k].costs for o, k in zip(weights.options, widths, strict=True)]
            taken = set(enumerate(widths))
            table = sum(s.costs[BYTES] for s in weights.shared if taken & set(s.options))
            spent.append(
                {
                    TIME: cost_of(regions, choice),
                    NOISE: noise_of(regions, choice) + sum(c[NOISE] for c in own),
                    BYTES: sum(c[BYTES] for c in own) + table,
                }
            )
    limits = {
        name: float(data.draw(st.integers(0, 80), label=name))
        for name in (TIME, NOISE, BYTES)
        if name != minimized
    }
    fitting = [c[minimized] for c in spent if all(c[name] <= most + 1e-9 for name, most in limits.items())]
    found = solve(joined(regions, weights, users), minimized, limits)
    assert (found is None) == (not fitting)
    if found is not None:
        assert found.amount == pytest.approx(min(fitting), abs=1e-5)
        assert {name: found.totals.get(name, 0.0) for name in limits} == pytest.approx(
            {name: min(found.totals.get(name, 0.0), most) for name, most in limits.items()}, abs=1e-5
        )


def test_conversions_go_step_by_step_and_readers_share_them():
    steps = steps_of({**dict.fromkeys(STEPS, 1.0), "float to last": 10.0})
    ways = paths(steps.items())
    assert ways[R.FLOAT_BLOCKED, R.INTEGERS_LAST] == (
        (R.FLOAT_BLOCKED, R.FLOAT),
        (R.FLOAT, R.INTEGERS),
        (R.INTEGERS, R.INTEGERS_LAST),
    )
    convolution = (Option(R.FLOAT_BLOCKED, R.FLOAT_BLOCKED, {TIME: 1.0}),)
    on_integers = (Option(R.INTEGERS_LAST, R.INTEGERS_LAST, {TIME: 1.0}),)
    tensors = (Tensor(0, (1, 2), False, steps),)
    assert known(solve(Program((convolution, on_integers, on_integers), tensors))).amount == pytest.approx(6)


def test_tensors_without_layouts_are_quantized_only():
    steps = steps_of({"quantize": 1.0, "dequantize": 2.0})
    assert set(steps) == {(R.FLOAT, R.INTEGERS), (R.INTEGERS, R.FLOAT)}
    free = steps_of(dict.fromkeys(STEPS, 1.0), layouts=False)
    assert free[R.FLOAT, R.INTEGERS] == 1
    assert free[R.FLOAT, R.FLOAT_BLOCKED] == free[R.INTEGERS, R.INTEGERS_LAST] == 0


@pytest.mark.parametrize("before", [False, True])
def test_only_convolutions_bring_channels_last_about(before):
    """A pool between is fast with channels last, which it has behind an integer convolution alone."""
    body = "a = Conv (x, w)  p = MaxPool <kernel_shape = [2,2]> (a)  y = Conv (p, v)"
    _, _, found = planned(body, WEIGHTS)
    convolution = (Way(R.FLOAT, R.FLOAT, 1.0),), (Way(R.INTEGERS_LAST, R.INTEGERS_LAST, 1.0),)
    pool = (
        (Way(R.FLOAT, R.FLOAT, 9.0),),
        (
            Way(R.INTEGERS, R.INTEGERS, 8.0),
            Way(R.INTEGERS_LAST, R.INTEGERS_LAST, 0.5),
        ),
    )
    steps = {link.tensor: dict.fromkeys(STEPS, 0.1) for link in found.links}
    program = program_of(found, [convolution, pool, convolution], steps, fixed=[before, True, True])
    taken = program.options[1][known(solve(program)).options[1]]
    assert taken.reads is (R.INTEGERS_LAST if before else R.INTEGERS)


def test_what_the_runtime_cannot_block_is_blocked_at_the_price_of_the_way_back():
    steps = steps_of({"quantize": 1.0, "dequantize": 1.0, "float from blocked": 3.0})
    assert steps[R.FLOAT, R.FLOAT_BLOCKED] == 3


# ---- regions ---------------------------------------------------------------------------------------------------


def planned(body, constants, shape=(1, 8, 6, 6), **options):
    model = normalize(
        parse(f"g (float[{','.join(map(str, shape))}] x) => (float y) {{ {body} }}", constants), 13
    )
    feeds = {"x": np.zeros(shape, np.float32)}
    model = specialize(model, [feeds])
    found = plan(model, TARGET, Config(**options))
    return GraphView(model), found, regions_of(GraphView(model), found)


WEIGHTS = {name: normal(8, 8, 1, 1, seed=k) for k, name in enumerate(("w", "v", "u"))}
SILU = "a = Conv (x, w)  s = Sigmoid (a)  m = Mul (a, s)  b = Conv (m, v)  r = Relu (b)  y = Conv (r, u)"


def test_functions_that_the_runtime_fuses_belong_to_one_region():
    _, _, found = planned(SILU, WEIGHTS)
    assert [r.operators for r in found.regions] == ["Conv", "Sigmoid+Mul", "Conv+Relu", "Conv"]
    assert all(r.movable for r in found.regions)
    _, _, found = planned("a = Conv (x, w)  l = LeakyRelu (a)  y = Conv (l, v)", WEIGHTS)
    assert [r.operators for r in found.regions] == ["Conv+LeakyRelu", "Conv"]


def test_a_function_of_a_tensor_that_others_read_is_a_region_of_its_own():
    _, _, found = planned("a = Conv (x, w)  l = LeakyRelu (a)  z = Add (a, l)  y = Conv (z, v)", WEIGHTS)
    assert [r.operators for r in found.regions] == ["Conv", "LeakyRelu", "Add", "Conv"]


def test_regions_are_joined_by_the_tensors_between_them():
    _, _, found = planned(SILU, WEIGHTS)
    assert [(x.maker, x.readers, x.is_output) for x in found.links] == [
        (None, (0,), False),
        (0, (1,), False),
        (1, (2,), False),
        (2, (3,), False),
        (3, (), True),
    ]


def test_what_is_no_layer_needs_a_reader_on_integers():
    _, _, found = planned(SILU, WEIGHTS)
    assert found.needs == ((1, (2,)),)
    assert found.layers == frozenset({0, 2, 3})


def test_a_lone_node_between_integers_is_bound_to_them():
    _, _, found = planned("a = Conv (x, w)  b = Conv (x, v)  z = Add (a, b)  y = Conv (z, u)", WEIGHTS)
    assert found.bound == ((2, (0, 1), (3,)),)
    # SiLU is no pattern of an integer kernel, and stays float where that is planned.
    assert planned(SILU, WEIGHTS)[2].bound == ()


def test_the_plan_obeys_every_choice_that_the_program_allows():
    """What a choice keeps float is what the plan then keeps float, no more and no less."""
    body = (
        "a = Conv (x, w)  s = Sigmoid (a)  m = Mul (a, s)  p = MaxPool <kernel_shape = [2,2]> (m)"
        "  b = Conv (p, v)  q = MaxPool <kernel_shape = [2,2]> (a)  z = Add (b, q)  y = Conv (z, u)"
    )
    view, full, found = planned(body, WEIGHTS)
    way = {False: (Way(R.FLOAT, R.FLOAT, 1.0),), True: (Way(R.INTEGERS, R.INTEGERS, 1.0),)}
    ways = [(way[False], way[True]) for _ in found.regions]
    program = program_of(found, ways, {})
    checked = 0
    for options in every(program):
        on = [program.options[k][o].on_integers for k, o in enumerate(options)]
        kept = {n: "slower" for r, x in zip(found.regions, on, strict=True) if not x for n in r.nodes}
        wanted = {n for n in full.integer_nodes if n not in kept}
        assert set(plan(view.model, TARGET, Config(), {}, kept).integer_nodes) == wanted
        checked += 1
    assert checked > 20


def test_a_region_that_could_not_be_timed_stays_as_planned():
    _, _, found = planned(SILU, WEIGHTS)
    fast: list[Any] = [
        ((Way(R.FLOAT, R.FLOAT, 1.0),), (Way(R.INTEGERS, R.INTEGERS, 5.0),)) for _ in found.regions
    ]
    fast[2] = (fast[2][0], ())
    program = program_of(found, fast, {})
    assert [program.options[k][o].on_integers for k, o in enumerate(known(solve(program)).options)] == [
        False,
        False,
        True,
        False,
    ]


def test_one_layer_stays_on_integers_however_slow():
    _, _, found = planned(SILU, WEIGHTS)
    ways = [((Way(R.FLOAT, R.FLOAT, 1.0),), (Way(R.INTEGERS, R.INTEGERS, 9.0),)) for _ in found.regions]
    program = program_of(found, ways, {})
    on = [program.options[k][o].on_integers for k, o in enumerate(known(solve(program)).options)]
    assert sum(on) == 1


# ---- pieces ----------------------------------------------------------------------------------------------------


def test_equal_regions_are_one_piece_whatever_their_names_and_weights():
    view, _, found = planned(SILU, {**WEIGHTS, "u": normal(4, 8, 1, 1)})
    keys = [known(float_piece(view, r.nodes)).key for r in found.regions]
    assert keys[0] != keys[2], "one has a Relu"
    other, _, again = planned(
        "q = Conv (x, w)  y = Conv (q, v)", {k: normal(8, 8, 1, 1, seed=9) for k in "wv"}
    )
    twice = [known(float_piece(other, r.nodes)).key for r in again.regions]
    assert twice[0] == twice[1] == keys[0]
    assert keys[3] not in twice, "it has fewer channels"


def test_a_piece_runs_alone_and_between_convolutions():
    view, _, found = planned(SILU, WEIGHTS)
    piece = known(float_piece(view, found.regions[1].nodes))
    assert [n.op_type for n in piece.model.graph.node] == ["Sigmoid", "Mul"]
    for integers in (False, True):
        between = known(between_convolutions(piece.model, integers))
        session = Session(between)
        kind = np.uint8 if integers else np.float32
        [result] = session.run({session.inputs[0]: np.ones((1, 8, 6, 6), kind)}).values()
        assert result.shape == (1, 8, 6, 6)
        assert result.dtype == kind


def test_a_piece_with_unknown_shapes_or_other_than_images_is_not_put_between_convolutions():
    view, _, found = planned(
        "a = MatMul (x, w)  r = Relu (a)  y = MatMul (r, w)", {"w": normal(4, 4)}, (2, 4)
    )
    piece = known(float_piece(view, found.regions[0].nodes))
    assert between_convolutions(piece.model, False) is None
    loose = GraphView(parse("g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"))
    loose.nodes[0].name = "relu"
    assert float_piece(loose, ["relu"]) is None


@pytest.mark.parametrize("container", [TensorProto.UINT8, TensorProto.INT8])
@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (1, 6, 4, 4), (2, 5)])
def test_the_model_of_conversions_runs(shape, container):
    piece = conversions_piece(shape, container, 13)
    names = {n.name for n in piece.model.graph.node}
    assert names <= set(STEPS)
    assert {"quantize", "dequantize"} <= names
    assert ("integers to last" in names) == (len(shape) == 4)
    assert Session(piece.model, optimize=False).outputs


# ---- reasons ---------------------------------------------------------------------------------------------------


def test_the_reason_is_the_time_of_all_that_stay_float_for_it():
    kept = [Region((name,), "Conv", True) for name in "ab"]
    times = [TimedRegion((name,), "Conv", 0.6e-3, 1.55e-3, False) for name in "ab"]
    assert reasons(times, kept) == dict.fromkeys(
        "ab", "integers would be slower here: 3.1 ms instead of 1.2 ms"
    )


def test_what_is_kept_for_its_neighbours_says_so():
    found = reasons([TimedRegion(("a",), "Add", 3e-3, 1e-3, False)], [Region(("a",), "Add", True)])
    assert "the conversions around it would cost more than the 2 ms that the kernels save" in found["a"]
