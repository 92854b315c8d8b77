"""From a Keras model through tf2onnx to an int8 file.

pip install tensorflow tf2onnx "eptq-onnx[standard]"
python examples/keras_export.py build
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import onnxruntime
import tensorflow
import tf2onnx

import eptq_onnx


def network() -> keras.Model:
    """Return a small network with the batch normalizations that Keras leaves behind convolutions."""
    layers = keras.layers
    return keras.Sequential([
        keras.Input((32, 32, 3)),
        layers.Conv2D(16, 3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
        layers.DepthwiseConv2D(3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(6.0),
        layers.Conv2D(32, 1),
        layers.GlobalAveragePooling2D(),
        layers.Dense(10),
    ])  # fmt: skip


def main(folder: Path) -> None:
    """Export, quantize, run."""
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    model, path = network(), folder / "keras.onnx"
    # tf2onnx's from_keras needs attributes that Keras 3 has no more.
    signature = [tensorflow.TensorSpec((None, 32, 32, 3), tensorflow.float32, name="image")]
    called = tensorflow.function(lambda image: model(image, training=False), input_signature=signature)
    tf2onnx.convert.from_function(called, input_signature=signature, opset=17, output_path=str(path))
    rng = np.random.default_rng(0)
    data = tensorflow.data.Dataset.from_tensor_slices(rng.random((64, 32, 32, 3), np.float32)).batch(16)
    samples = np.concatenate(list(data.as_numpy_iterator()))
    result = eptq_onnx.quantize(
        path, {"image": samples}, eptq_onnx.Config(preset="fast", measure_speed=False)
    )
    result.save(folder / "keras.int8.onnx")
    images = rng.random((16, 32, 32, 3), np.float32)
    [scores] = onnxruntime.InferenceSession(folder / "keras.int8.onnx").run(None, {"image": images})
    exact = np.asarray(model(images, training=False))
    noise = np.square(scores - exact).mean() / exact.var()
    print(f"{len(result.report.layers)} layers, {-10 * np.log10(noise):.1f} dB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
