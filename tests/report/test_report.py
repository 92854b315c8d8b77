from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from graphs import images, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.data.origin import Origin
from eptq_onnx.outcome import OperatorTime, Pace, Speed
from eptq_onnx.report.speed import costly, in_words, pace_in_words, warning

SLOW = Speed(
    Pace.SLOWER, 0.0071, 0.0121, 1.7, 1.6, 1.85, 9, 1,
    (OperatorTime("QuantizeLinear/DequantizeLinear around Resize", 0.0, 0.0042),
     OperatorTime("Softmax", 0.001, 0.0022),
     OperatorTime("Conv", 0.006, 0.0056)),
)  # fmt: skip
FAST = Speed(Pace.FASTER, 0.0012, 0.0006, 0.5, 0.4, 0.625, 7, 4)
SAME = Speed(Pace.SAME, 0.5, 0.5, 1.0, 0.97, 1.1, 41, 1)


@pytest.fixture(scope="module")
def report():
    return eptq_onnx.quantize(small_convnet(), images(40), Config(preset="fast", measure_speed=False)).report


def shown(report, width: int = 400) -> list[str]:
    out = io.StringIO()
    report.print(Console(file=out, width=width))
    return [line.strip() for line in out.getvalue().splitlines()]


def test_what_runs_slower_is_said_first(report):
    lines = shown(replace(report, speed=SLOW))
    assert lines[0].startswith(
        "runs 1.70× slower than the float model on this machine; "
        "the time goes to QuantizeLinear/DequantizeLinear around Resize"
    )
    assert (
        "(35%, 4.2 ms where the float model takes none), "
        "Softmax (18%, 2.2 ms where the float model takes 1 ms)" in lines[0]
    )
    assert "Conv" not in lines[0]
    assert any("Time of one run" in line for line in lines)


@pytest.mark.parametrize("speed", [None, FAST, SAME, SLOW])
def test_then_verdict_then_size_then_speed(report, speed):
    lines = shown(replace(report, speed=speed))
    first = [line.split()[0] for line in lines]
    place = first.index("verdict")
    assert place == (speed is SLOW)
    assert first[place : place + 5] == ["verdict", "size", "parts", "speed", "model"]
    assert report.verdict.assurance.value in lines[place]
    assert in_words(speed) in lines[place + 3]


def test_speed_in_words():
    assert in_words(FAST).startswith(
        "1.60 to 2.50× faster than the float model: 1.2 ms → 600 µs per run of 4 samples "
        "(its time is 0.40 to 0.62 of the float model's, in "
    )
    assert in_words(SAME).startswith(
        "level with the float model: 500 ms → 500 ms per run of 1 sample (its time is 0.97 to 1.10 of"
    )
    assert in_words(None) == "not measured"
    # An interval that holds no difference, and one that is so wide that it may hold any.
    unsure = replace(SAME, low=0.80, high=1.30)
    assert in_words(unsure).startswith("not told apart from the float model: ")
    assert [pace_in_words(s) for s in (FAST, SAME, unsure)] == [
        "1.60 to 2.50× faster",
        "level",
        "not told apart",
    ]
    sure = replace(FAST, ratio=0.5, low=0.48, high=0.52)
    assert pace_in_words(sure) == "2.00× faster"
    assert [warning(s) for s in (None, FAST, SAME)] == ["", "", ""]
    assert warning(replace(SLOW, operators=())) == "runs 1.70× slower than the float model on this machine"
    assert [o.operator for o in costly(SLOW)] == ["QuantizeLinear/DequantizeLinear around Resize", "Softmax"]


@settings(max_examples=100, deadline=None)
@given(st.floats(0.2, 5), st.floats(1, 3))
def test_a_factor_is_told_only_where_all_of_the_interval_is_on_one_side(low, width):
    high = low * width
    pace = Pace.SLOWER if low > 1.05 else Pace.FASTER if high < 1 / 1.05 else Pace.SAME
    words = pace_in_words(replace(SAME, pace=pace, ratio=(low * high) ** 0.5, low=low, high=high))
    numbers = [float(n) for n in re.findall(r"[\d.]+(?=×| to )", words)]
    assert bool(numbers) == (not low <= 1.05 or not high >= 1 / 1.05)
    assert all(n > 1 for n in numbers)
    assert words.endswith(("faster", "slower", "level", "not told apart"))


def test_what_calibration_has_seen_is_not_called_held_out(report):
    assert any("8 held-out samples" in line for line in shown(report))
    seen = replace(report, verification=replace(report.verification, held_out=False))
    text = "\n".join(shown(seen))
    assert "8 samples that calibration has seen" in text
    assert "held-out" not in text.replace("held-out error", "")


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "a\\[b", "]["])
def test_any_name_of_an_output_is_shown(report, name):
    v = report.verification
    other = replace(
        v, outputs=dict.fromkeys([name], 30.0), statistics=dict.fromkeys([name], v.statistics["logits"])
    )
    odd = replace(SLOW, operators=(OperatorTime(f"Op {name}", 0.0, 1.0),))
    text = "\n".join(shown(replace(report, verification=other, model=f"{name}.onnx", speed=odd)))
    assert text.count(name) >= 4


def test_json_has_verdict_statistics_and_speed(report):
    found = json.loads(replace(report, speed=SLOW).to_json())
    assert next(iter(found)) == "verdict"
    assert found["verdict"]["assurance"] == report.verdict.assurance.value
    assert found["verification"]["statistics"]["logits"]["samples"] == 8
    assert found["speed"]["pace"] == "slower"
    assert found["speed"]["operators"][0]["quantized_seconds"] == 0.0042


@pytest.mark.parametrize(
    ("before", "after", "text"), [(4000, 1000, "4.00× smaller"), (1000, 1500, "not smaller")]
)
def test_size_in_words(report, before, after, text):
    v = replace(report.verification, float_bytes=before, quantized_bytes=after)
    assert any(text in line for line in shown(replace(report, verification=v)) if line.startswith("size"))


def test_figures_of_made_up_samples_are_said_to_mean_nothing_first_and_in_the_verdict(report):
    made_up = replace(report, data=Origin("random numbers", made_up=True))
    lines = shown(made_up)
    assert lines[0].startswith(
        "samples are random numbers: ranges are wrong, and no figure here says anything"
    )
    assert lines[1].split()[:4] == ["verdict", "check:", "samples", "are"]
    assert json.loads(made_up.to_json())["verdict"]["advice"] == "give real samples with --data"


def test_where_samples_come_from_is_shown_whole(report):
    recipe = "size=224," + "k=v," * 60 + "end"
    origin = Origin("photos", {"image": recipe}, ("size (the model's input)",), ("one is broken",))
    text = "".join("".join(shown(replace(report, data=origin), width=80)).split())
    assert f"40samplesofphotos;--image'{recipe}';guessed:size(themodel'sinput)" in text


@pytest.mark.parametrize(("limit", "above"), [(1e-6, True), (1e-2, False)])
def test_noise_above_the_limit_is_said_with_the_option_and_both_figures(limit, above):
    config = Config(preset="fast", max_noise=limit, objective="integers", measure_speed=False)
    notes = eptq_onnx.quantize(small_convnet(), images(24), config).report.notes
    told = [note for note in notes if f"above max_noise={limit:g}" in note]
    assert len(told) == above
    assert all("none of them stands out" in note for note in told)


def test_how_samples_were_read_is_told_with_what_was_guessed():
    read = Origin("photos", {"image": "size=224"}, ("size (the model's input)",), ("one was left out",))
    assert read.told == (
        "samples: photos; --image 'size=224'; guessed: size (the model's input)",
        "one was left out",
    )
    assert Origin("samples.npz").told == ()
