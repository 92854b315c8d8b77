from __future__ import annotations

import pytest

from eptq_onnx import ConfigError, targets
from eptq_onnx.ops import TABLE, Role


@pytest.mark.parametrize("name", targets.names())
def test_shipped_targets_name_operators_in_their_roles(name):
    target = targets.load(name)
    roles = {op: row.role for (_, op), row in TABLE.items()}
    assert target.name == name
    assert {roles[op] for op in target.ops.layers} == {Role.LAYER}
    assert {roles[op] for op in target.ops.arithmetic} == {Role.ARITHMETIC}
    assert {roles[op] for op in target.ops.equal_scale} == {Role.EQUAL_SCALE}
    assert {roles[op] for op in target.ops.absorbed} == {Role.CLIPPING}
    assert target.ops.float_output <= target.ops.layers
    assert set(target.kernels) == target.ops.layers | target.ops.arithmetic


def test_specs_stay_inside_the_container():
    target = targets.load("ort-x64")
    for bits in range(2, 9):
        weight, activation = target.weight_spec(bits, 0), target.activation_spec(bits)
        assert -128 <= weight.qmin < 0 < weight.qmax <= 127
        least, most = weight.zero_points
        assert weight.symmetric == (least == most == 0) == (bits >= 7)
        # With the zero point folded in, the integers stay in the range of the target.
        assert (weight.qmin - most, weight.qmax - least) == (-64, 63)
        assert (activation.qmin, activation.qmax) == (0, 2**bits - 1)
    depthwise = target.weight_spec(4, 0, depthwise=True)
    assert (depthwise.qmin - depthwise.zero_points[1], depthwise.qmax - depthwise.zero_points[0]) == (-127, 127)
    assert target.activation_spec(4).narrower_than_container
    assert not target.activation_spec(8).narrower_than_container


def test_unknown_fields_are_told(tmp_path):
    text = (targets.resources.files("eptq_onnx.targets") / "ort-x64.toml").read_text()
    (tmp_path / "t.toml").write_text(text + "\n[colour]\nred = 1\n")
    with pytest.raises(ConfigError, match="field colour is unknown"):
        targets.load(str(tmp_path / "t.toml"))
