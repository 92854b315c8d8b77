"""From a Transformers model through Optimum's exporter, and back into Optimum's own class.

pip install optimum-onnx transformers torch "eptq-onnx[standard]"
python examples/optimum_export.py build
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from optimum.exporters.onnx import onnx_export_from_model
from optimum.onnxruntime import ORTModelForFeatureExtraction
from transformers import BertConfig, BertModel

import eptq_onnx

WORDS = 500


def sentences(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Return sentences of random words, each of another length."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(1, WORDS, (1, int(rng.integers(6, 24))))
        found.append({
            "input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids),
        })  # fmt: skip
    return found


def main(folder: Path) -> None:
    """Export, quantize, compare."""
    torch.manual_seed(0)
    # With weights of your own: BertModel.from_pretrained(...), and its tokenizer for the sentences.
    config = BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel(config).eval()
    onnx_export_from_model(model, folder, task="feature-extraction", opset=17, do_validation=False)
    # The inputs of matrix products get ranges of each run: see docs/choosing-bits.md.
    options = eptq_onnx.Config(activations="dynamic", preset="fast", measure_speed=False)
    result = eptq_onnx.quantize(folder / "model.onnx", sentences(64, seed=1), options)
    result.save(folder / "model_int8.onnx")
    quantized = ORTModelForFeatureExtraction.from_pretrained(folder, file_name="model_int8.onnx")
    cosines = []
    for feeds in sentences(8, seed=2):
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        with torch.no_grad():
            pair = [m(**tensors).last_hidden_state.mean(1).ravel() for m in (model, quantized)]
        cosines.append(float(torch.nn.functional.cosine_similarity(*pair, dim=0)))
    print(f"{len(result.report.layers)} layers, cosine {np.mean(cosines):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/bert"))
