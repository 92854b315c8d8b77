"""Files of timings: complete, or refused in one sentence."""

from __future__ import annotations

import json

import pytest

from eptq_onnx.errors import ConfigError
from eptq_onnx.placement import Candidate, Placement, Representation, TimedRegion, Timings, Way
from eptq_onnx.runtimes import timings

CANDIDATE = Candidate("all integers", 2, 1e-3, 2e-3, 1.0, 1.0, 1.0)
REGION = TimedRegion(("a", "b"), "Conv+Relu", 1e-3, 2e-3, False)
PLACEMENT = Placement("runtime 1", "machine", 1, "all integers", (CANDIDATE,), (REGION,), 0, {"a": "slower"})
TIMINGS = Timings(
    "digest",
    PLACEMENT,
    {"piece": (Way(Representation.FLOAT, Representation.FLOAT_BLOCKED, 1e-3),)},
    {"UINT8 1x2": {"quantize": 1e-6}},
)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "timings.json"
    assert timings.read(path, "digest", 1) is None
    timings.write(path, TIMINGS)
    assert timings.read(path, "digest", 1) == TIMINGS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: "{", "is not a timings file"),
        (lambda t: "[1]", "is not a timings file"),
        (lambda t: "", "is not a timings file"),
        (lambda t: json.dumps({**t, "format": 99}), "is not a timings file"),
        (lambda t: json.dumps({**t, "network": "other"}), "was measured for another model"),
        (lambda t: json.dumps({k: v for k, v in t.items() if k != "placement"}), "is damaged: placement"),
        (lambda t: json.dumps({**t, "pieces": {"p": [{"reads": "upside down"}]}}), r"is damaged: pieces\.p"),
        (lambda t: json.dumps({**t, "conversions": {"c": {"quantize": "fast"}}}), "is damaged: conversions"),
    ],
)
def test_another_file_is_refused_with_the_remedy(tmp_path, change, message):
    path = tmp_path / "timings.json"
    timings.write(path, TIMINGS)
    path.write_text(change(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        timings.read(path, "digest", 1)
    assert "remove it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        timings.read(tmp_path, "digest", 1)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "timings.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a timings file"):
        timings.read(path, "digest", 1)


def test_every_machine_runtime_network_and_number_of_threads_has_a_file_of_its_own():
    given = ("network", "runtime", "machine", 1)
    others = [("n", *given[1:]), ("network", "r", "machine", 1), (*given[:2], "m", 1), (*given[:3], 2)]
    paths = {timings.cached(*key) for key in [given, *others]}
    assert len(paths) == 5
    assert all(path.parts[-2] == "timings" for path in paths)
