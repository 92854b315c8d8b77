"""What is advised follows from the figures, and nothing is advised without one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from reports import POOR, SAFE, TRACE, layer, noise, report

from eptq_onnx.data.origin import Origin
from eptq_onnx.diagnosis import Loud
from eptq_onnx.report.verdict import Assurance

LOW = (layer("edge"), *(layer(f"c{k}", 4) for k in range(8)))


def poor(**fields):
    found = report(statistics={"y": POOR}, optimization=None, **fields)
    assert found.verdict.assurance is Assurance.LOSS
    return found


def options(found) -> list[str]:
    return [advice.option for advice in found.advice]


def advice(found, option: str):
    [one] = [a for a in found.advice if a.option.startswith(option)]
    return one


def gain(share: float) -> float:
    """The ratio in dB that is left of POOR's if a share of the noise goes."""
    return POOR.sqnr_db - 10 * math.log10(1 - share)


def test_nothing_is_advised_where_it_is_safe():
    assert report(noise=noise(), layers=LOW).advice == ()


def test_nothing_is_advised_for_made_up_samples_or_without_figures():
    assert replace(poor(noise=noise(), layers=LOW), data=Origin("random numbers", made_up=True)).advice == ()
    assert poor(noise=None, layers=LOW).advice == ()


def test_layers_that_cause_most_of_the_noise_get_more_bits():
    loud = (Loud(("c1",), 0.5), Loud(("c 5",), 0.2))
    found = poor(
        noise=noise(0.08, 0.02, loud_weights=loud), layers=(*LOW, layer("c 5", 4, activation_bits=16))
    )
    one = advice(found, "--bits")
    assert one.option == "--bits c1=w8a8 --bits 'c 5=w8a16'"
    assert "weights cause 80% of the noise, and c1 50%, c 5 20% of theirs" in one.why
    assert one.expected_db == pytest.approx(gain(0.8 * 0.7 * (1 - 1 / 256)))
    assert one.expected == f"about {one.expected_db:.1f} dB"


@pytest.mark.parametrize(
    ("config", "bits"),
    [({}, 8), ({"budget": [{"unit": "weights", "amount": 4.0}]}, 4), ({"objective": "bytes"}, 4)],
)
def test_layers_that_cannot_get_more_bits_are_left_out(config, bits):
    layers = tuple(layer(f"c{k}", bits) for k in range(9))
    one = advice(
        poor(noise=noise(loud_weights=(Loud(("c1",), 0.6),)), layers=layers, config=config), "--exclude"
    )
    assert one.option == "--exclude c1"
    assert one.expected_db == pytest.approx(gain(5 / 6 * 0.6))


def test_more_bits_for_all_weights():
    found = poor(noise=noise(0.09, 0.01), layers=LOW)
    assert advice(found, "--weight-bits 8").expected_db == pytest.approx(gain(0.9 * (1 - 1 / 256)))
    one = advice(found, "--budget weights=5")
    assert one.expected_db == pytest.approx(gain(0.9 * 0.75))
    assert one.expected.startswith("at least ")
    limited = poor(
        noise=noise(0.09, 0.01), layers=LOW, config={"budget": [{"unit": "weights", "amount": 4.4}]}
    )
    assert advice(limited, "--budget weights=5.4").expected_db == pytest.approx(gain(0.9 * 0.75))
    assert "--weight-bits 8" not in options(limited)
    timed = {"objective": "noise", "budget": [{"unit": "time", "amount": 0.01}]}
    assert "--weight-bits 8" in options(poor(noise=noise(0.09, 0.01), layers=LOW, config=timed))


def test_noise_of_activations():
    narrow = tuple(replace(x, activation_bits=4) for x in LOW)
    found = poor(noise=noise(0.01, 0.09), layers=narrow)
    assert advice(found, "--activation-bits 8").expected_db == pytest.approx(gain(0.9 * (1 - 1 / 256)))
    assert not any(o.startswith(("--weight-bits", "--budget")) for o in options(found)), (
        "weights cause a tenth"
    )
    wide = poor(noise=noise(0.01, 0.09), layers=LOW)
    assert advice(wide, "--activation-bits 16").expected_db == pytest.approx(gain(0.9))
    assert not any("activations=" in o for o in options(wide)), "the target computes in float there"
    fp8 = poor(noise=noise(0.01, 0.09), layers=LOW, target="tensorrt-fp8")
    assert options(fp8) == [], "its activations have no other widths"


def test_more_bits_for_some_activations():
    found = poor(noise=noise(0.01, 0.09), layers=LOW, target="qnn")
    one = advice(found, "--budget activations=10")
    assert one.expected_db == pytest.approx(gain(0.9 / 4))
    assert one.bound == "at least"
    assert "no integer kernels" not in advice(found, "--activation-bits 16").why
    given = {"target": "qnn", "budget": [{"unit": "activations", "amount": 12.0}]}
    more = poor(noise=noise(0.01, 0.09), layers=LOW, target="qnn", config=given)
    assert advice(more, "--budget activations=14").expected_db == pytest.approx(gain(0.9 / 2))
    given = {"budget": [{"unit": "activations", "amount": 6.0}]}
    few = poor(
        noise=noise(0.01, 0.09), layers=tuple(replace(x, activation_bits=4) for x in LOW), config=given
    )
    assert advice(few, "--budget activations=7").expected_db == pytest.approx(gain(0.9 / 2))


def test_activations_that_cause_most_of_the_noise_stay_float_with_their_readers():
    loud = (Loud(("c1", "add"), 0.6), Loud(("add",), 0.1))
    one = advice(poor(noise=noise(0.01, 0.09, loud_activations=loud), layers=LOW), "--exclude")
    assert one.option == "--exclude c1 --exclude add"
    assert "inputs of c1 and add 60%, add 10% of theirs" in one.why
    assert one.expected_db == pytest.approx(gain(0.9 * 0.7))


def test_weights_that_processors_make_narrow_can_be_wider_on_others():
    layers = (*(layer(f"c{k}", weight_range=(-64, 63)) for k in range(3)), layer("depthwise"))
    found = poor(noise=noise(0.08, 0.02), layers=layers, target="ort-x64")
    one = advice(found, "--target")
    assert one.option == "--target ort-x64-vnni"
    assert one.expected_db == pytest.approx(gain(0.8 * 3 / 4 * 0.75))
    assert "3 layers are in [-64, 63]" in one.why
    assert options(poor(noise=noise(0.08, 0.02), target="ort-x64")) == [], "all bits are used"


def test_a_preset_that_does_not_optimize_at_low_bits():
    fast = {"preset": "fast"}
    one = advice(poor(noise=noise(0.09, 0.01), layers=LOW, config=fast), "--preset balanced")
    assert one.expected == f"at most {gain(0.9):.1f} dB"
    for fields in ({"layers": (layer(),)}, {"layers": LOW, "noise": noise(0.01, 0.09)}):
        assert "--preset balanced" not in options(
            poor(**{"noise": noise(0.09, 0.01), "config": fast, **fields})
        )


@pytest.mark.parametrize(
    ("checks", "kept", "advised"),
    [
        (
            ((0, 1.0), (10, 0.8), (20, 0.7)),
            20,
            "still falling at step 20, the last check: 1 at the start, 0.7 there",
        ),
        (
            ((0, 1.0), (10, 1.3), (20, 1.1)),
            0,
            "kept its start, but the error on held-out samples was still falling",
        ),
        (((0, 1.0), (10, 0.7), (20, 0.8)), 10, ""),
        (((0, 1.0),), 0, ""),
    ],
)
def test_an_optimization_that_had_not_ended(checks, kept, advised):
    trace = replace(TRACE, checkpoints=checks, best_step=kept)
    found = replace(poor(noise=noise(0.09, 0.01), layers=LOW), optimization=trace)
    assert ("--steps 60" in options(found)) is bool(advised)
    if advised:
        assert advised in advice(found, "--steps 60").why
    assert "--steps 60" not in options(replace(found, config={**found.config, "steps": 20}))


def test_samples_that_calibration_knows_by_heart():
    one = advice(poor(noise=replace(noise(), seen=0.03), layers=(layer(),)), "--data")
    assert one.expected == f"at most {POOR.sqnr_db + 10 * math.log10(2):.1f} dB"
    assert "3.0 dB more" in one.why
    assert options(poor(noise=replace(noise(), seen=0.059), layers=(layer(),))) == [], (
        "a tenth of a dB is nothing"
    )


def test_samples_that_are_too_few_to_tell():
    good = replace(SAFE, sqnr_db=35.0, centred_sqnr_db=34.0)
    few = report(statistics={"y": good}, samples=12, verification={"samples": 3, "held_out": False})
    assert few.verdict.assurance is Assurance.CHECK
    [one] = few.advice
    assert "12 samples were given, and calibration has seen them all: from 32 samples on" in one.why
    assert one.expected == ""
    more = report(statistics={"y": good}, samples=100, verification={"samples": 10})
    assert "10 of the 100 samples are held out" in more.advice[0].why
    assert "with 160 samples, 16 are held out" in more.advice[0].why


def test_what_gains_next_to_nothing_is_not_advised():
    loud = (Loud(("c1",), 0.1),)
    assert not any("c1" in o for o in options(poor(noise=noise(0.05, 0.05, loud_weights=loud), layers=LOW)))
