"""From a PyTorch model to an int8 file, by both of torch's exporters.

pip install torch onnxscript "eptq-onnx[standard]"
python examples/torch_export.py build
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import eptq_onnx


class Net(nn.Module):
    """A small network with a residual sum and a batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return one score for each of ten classes."""
        x = self.stem(image)
        x = torch.relu(x + self.block(x))
        return self.head(x.mean(dim=(2, 3)))


def export(model: nn.Module, path: Path, *, dynamo: bool) -> None:
    """Write a model whose batch size is free."""
    example = torch.randn(2, 3, 32, 32)
    free = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
        if dynamo
        else {"dynamic_axes": {"image": {0: "batch"}, "scores": {0: "batch"}}}
    )
    torch.onnx.export(
        model, (example,), str(path), input_names=["image"], output_names=["scores"], dynamo=dynamo, **free
    )


def main(folder: Path) -> None:
    """Export, quantize, run."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Net().eval()
    loader = torch.utils.data.DataLoader(torch.randn(64, 3, 32, 32), batch_size=16)
    images = torch.randn(16, 3, 32, 32)
    exact = model(images).detach().numpy()
    for dynamo in (False, True):
        path = folder / f"net_{'dynamo' if dynamo else 'torchscript'}.onnx"
        export(model, path, dynamo=dynamo)
        result = eptq_onnx.quantize(path, loader, eptq_onnx.Config(preset="fast", measure_speed=False))
        result.save(path.with_suffix(".int8.onnx"))
        session = onnxruntime.InferenceSession(path.with_suffix(".int8.onnx"))
        [scores] = session.run(None, {"image": images.numpy()})
        noise = np.square(scores - exact).mean() / exact.var()
        print(f"{path.name}: {len(result.report.layers)} layers, {-10 * np.log10(noise):.1f} dB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
