"""Large models: bounded memory, and the same road."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from graphs import images, small_convnet
from large import write_large_model

from eptq_onnx import Config, quantize
from eptq_onnx.runtime import Session

BLOCKS = int(os.environ.get("EPTQ_BLOCKS", "48"))


def test_too_little_memory_for_the_loop_is_told_and_the_rest_done_block_by_block():
    data = {"image": images(96)}
    whole = quantize(small_convnet(), data, Config(weight_bits=4, steps=0, equalize=False))
    tight = quantize(small_convnet(), data, Config(weight_bits=4, steps=5, max_memory=100_000))
    assert tight.report.optimization is None
    assert any(
        "not optimized over the whole network: that takes about" in note for note in tight.report.notes
    )
    assert any("no channels are scaled: that takes about" in note for note in tight.report.notes)
    ((name, sqnr),) = tight.report.verification.outputs.items()
    assert sqnr == pytest.approx(whole.report.verification.outputs[name], abs=3)  # rounded on fewer samples
    assert tight.report.config["max_memory"] == 100_000


@pytest.mark.slow
def test_a_model_of_2_5_gb_takes_less_than_1_6_times_its_size(tmp_path):
    path, data, out, report = (tmp_path / name for name in ("m.onnx", "ids.npz", "q.onnx", "q.json"))
    write_large_model(path, words=1_230_000, width=512, blocks=BLOCKS)
    size = (tmp_path / "m.onnx.data").stat().st_size
    assert size > 2.5e9
    np.savez(data, ids=np.random.default_rng(1).integers(0, 1_230_000, (32, 16)))
    options = ["--data", str(data), "-o", str(out), "--report", str(report), "--max-memory", "2GB"]
    subprocess.run(
        [sys.executable, "-m", "eptq_onnx", "quantize", str(path), *options],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    told = json.loads(report.read_text())
    assert told["peak_memory_bytes"] < 1.6 * size
    assert told["verification"]["kernels"]["MatMul"] == 2 * BLOCKS + 1
    assert told["verification"]["outputs"]["y"] > 20
    assert any("not optimized over the whole network" in note for note in told["notes"])
    assert Session(out).run({"ids": np.zeros((1, 16), np.int64)})["y"].shape == (1, 16, 32)
