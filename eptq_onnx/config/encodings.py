"""Ranges of activations that are given: AIMET's encodings, schema 1.0."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from eptq_onnx.numerics.scales import WeightScales


class Encodings(BaseModel):
    """Ranges of activations, read from a file of encodings.

    Parameters
    ----------
    file : str
        Where they come from; empty for a dict.
    ranges : dict of str to tuple of two floats
        Tensor to the smallest and largest value that its integers hold.
    weights : int
        Encodings of weights in it, which are not taken.
    scales : dict of str to WeightScales
        Scales of weights, as a file that is quantized already has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = ""
    ranges: dict[str, tuple[float, float]]
    weights: int = 0
    scales: dict[str, WeightScales] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)):
            try:
                content = json.loads(Path(value).read_text(encoding="utf-8"))
            except OSError as e:
                raise ValueError(f"the file cannot be read: {e.strerror or e}") from None
            except ValueError:
                raise ValueError("the file is not JSON") from None
            return {"file": str(value), **_parsed(content)}
        if isinstance(value, Mapping) and "ranges" not in value:
            return _parsed(value)
        return value


def _parsed(content: Any) -> dict[str, Any]:
    version = str(content.get("version", "")) if isinstance(content, Mapping) else ""
    items = content.get("activation_encodings") if isinstance(content, Mapping) else None
    if not version.startswith("1.") or not isinstance(items, list):
        raise ValueError(
            "encodings have version 1.x and a list activation_encodings (AIMET's schema 1.0: "
            'sim.export(..., encoding_version="1.0.0"))'
        )
    weights = content.get("param_encodings", [])
    # AIMET lists what it computes in float16, too.
    given = [i for i in items if not isinstance(i, Mapping) or i.get("dtype") != "FLOAT"]
    return {
        "ranges": {name: reach for item in given for name, reach in [_range(item)]},
        "weights": len(weights) if isinstance(weights, list) else 0,
    }


def _range(item: Any) -> tuple[str, tuple[float, float]]:
    """Return the tensor and the range of an encoding."""
    try:
        name, bits, kind = str(item["name"]), int(item["bw"]), str(item.get("dtype", "INT"))
        [scale], [offset], [shift] = item["scale"], item["offset"], item.get("zero_point_shift", [0.0])
        low = float(scale) * (float(offset) + float(shift))
        high = low + float(scale) * (2**bits - 1)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"an encoding needs name, bw, one scale and one offset, not {item!r:.80}") from None
    if (
        kind != "INT"
        or not 2 <= bits <= 32
        or not (low <= 0 <= high and low < high)
        or not math.isfinite(high - low)
    ):
        raise ValueError(f"the encoding of {name} is no range of integers that holds zero")
    return name, (low, high)
