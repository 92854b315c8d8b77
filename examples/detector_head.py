"""A detector with a head as Ultralytics exports it: boxes and scores, decoded and joined, in one output.

The decoding (softmax over distances, anchors, strides) stays float without an option that says so. A model of
your own is exported with ``YOLO("yolo11n.pt").export(format="onnx")``.

    pip install torch onnxscript "eptq-onnx[standard]"
    python examples/detector_head.py build
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import eptq_onnx

BINS, CLASSES, SIZE = 16, 4, 64


class Detector(nn.Module):
    """Two scales; each predicts distributions of the distances to the sides of a box, and class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [self._block(3, 16, 2), self._block(16, 32, 2), self._block(32, 32, 2), self._block(32, 64, 2)]
        )
        self.boxes = nn.ModuleList([nn.Conv2d(c, 4 * BINS, 1) for c in (32, 64)])
        self.scores = nn.ModuleList([nn.Conv2d(c, CLASSES, 1) for c in (32, 64)])
        anchors, strides = [], []
        for stride in (8, 16):
            ticks = torch.arange(SIZE // stride) + 0.5
            y, x = torch.meshgrid(ticks, ticks, indexing="ij")
            anchors.append(torch.stack((x, y)).reshape(2, -1))
            strides.append(torch.full((1, anchors[-1].shape[1]), float(stride)))
        self.register_buffer("anchors", torch.cat(anchors, 1))
        self.register_buffer("strides", torch.cat(strides, 1))
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32).view(1, BINS, 1, 1))

    @staticmethod
    def _block(before: int, behind: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, behind, 3, stride, 1, bias=False), nn.BatchNorm2d(behind), nn.SiLU()
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (batch, 4 + classes, places): centre and size of each box, and scores."""
        x, found = images, []
        for block in self.down:
            x = block(x)
            found.append(x)
        raw = [
            torch.cat((box(f), score(f)), 1).flatten(2)
            for box, score, f in zip(self.boxes, self.scores, found[2:], strict=True)
        ]
        distances, scores = torch.cat(raw, 2).split((4 * BINS, CLASSES), 1)
        batch, _, places = distances.shape
        share = distances.view(batch, 4, BINS, places).transpose(1, 2).softmax(1)
        left_top, right_bottom = (share * self.bins).sum(1).chunk(2, 1)
        low, high = self.anchors - left_top, self.anchors + right_bottom
        box = torch.cat(((low + high) / 2, high - low), 1) * self.strides
        return torch.cat((box, scores.sigmoid()), 1)


def main(folder: Path) -> None:
    """Export, quantize, compare boxes and scores."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, path = Detector().eval(), folder / "detector.onnx"
    torch.onnx.export(
        model, (torch.randn(1, 3, SIZE, SIZE),), str(path), input_names=["images"], output_names=["found"],
        dynamo=False, opset_version=17,
    )  # fmt: skip
    samples = [{"images": np.random.default_rng(k).random((1, 3, SIZE, SIZE), np.float32)} for k in range(48)]
    result = eptq_onnx.quantize(path, samples[:40], eptq_onnx.Config(preset="fast", measure_speed=False))
    result.save(folder / "detector.int8.onnx")
    pair = [onnxruntime.InferenceSession(folder / name) for name in ("detector.onnx", "detector.int8.onnx")]
    exact, found = (np.concatenate([s.run(None, feeds)[0] for feeds in samples[40:]]) for s in pair)
    print(f"boxes differ by {np.abs(found - exact)[:, :4].mean():.3f} pixels, "
          f"scores by {np.abs(found - exact)[:, 4:].mean():.4f}")  # fmt: skip
    print("in float: " + ", ".join(sorted({k.op_type for k in result.report.kept_float})))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
