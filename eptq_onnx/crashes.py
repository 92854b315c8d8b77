"""Find out in another process whether onnxruntime crashes on a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from onnx import ModelProto

from eptq_onnx import scratch
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import custom_libraries, source

_SECONDS = 60
_CODE = (
    "import sys, numpy as n, onnxruntime as o; s = o.SessionOptions(); s.log_severity_level = 4; "
    "[s.register_custom_ops_library(p) for p in sys.argv[3:]]; "
    "m = o.InferenceSession(sys.argv[1], s, providers=['CPUExecutionProvider']); "
    "sys.argv[2] and m.run(None, {k[1:]: v for k, v in n.load(sys.argv[2]).items()})"
)


def survives(model: ModelProto, feeds: Feeds | None = None) -> bool:
    """Return False if onnxruntime crashes or hangs while it loads a model, or runs it if feeds are given.

    A model that it rejects with an error returns True.
    """
    with scratch.folder() as folder, source(model) as given:
        path, inputs = Path(given) if isinstance(given, str) else Path(folder) / "model.onnx", ""
        if not isinstance(given, str):
            path.write_bytes(given)
        if feeds is not None:
            inputs = str(Path(folder) / "feeds.npz")
            # Strings of numpy's own need no pickle; a key may not be "file".
            known = {f"_{n}": v.astype(str) if v.dtype == object else v for n, v in feeds.items()}
            np.savez(inputs, **known)  # type: ignore[arg-type]  # keys are any strings
        try:
            command = [sys.executable, "-c", _CODE, str(path), inputs, *custom_libraries()]
            done = subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode in (0, 1)
