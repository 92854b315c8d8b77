"""Other projects' quantizers, for the benchmarks: each is installed by hand, and runs at its better
settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import peers
import typer

from eptq_onnx import targets
from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.graph import io
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan

_TYPES = {8: "int8", 4: "int4", 2: "int2"}
"""AIMET's names of what it can store."""


@contextmanager
def _installed(method: str, packages: str) -> Iterator[None]:
    """Say which packages a method needs where they are missing."""
    try:
        yield
    except ImportError as e:
        raise typer.BadParameter(f"the method {method} is not installed: pip install {packages}") from e


def nncf(model: Path, samples: Samples, folder: Path) -> list[Path]:
    """Files of NNCF (pip install nncf): its fast bias correction, and its slower, more accurate one.

    Raises
    ------
    BadParameter
        If it is not installed.
    """
    with _installed("nncf", "nncf"):
        import nncf as rival
    batches = list(iter(peers.Reader(samples).get_next, None))
    files = []
    for fast in (True, False):
        try:
            made = rival.quantize(
                onnx.load(model), rival.Dataset(batches), subset_size=len(batches), fast_bias_correction=fast
            )
        except Exception as e:
            # The slower correction cannot run every model; then the other setting is its best.
            typer.echo(f"nncf, fast_bias_correction={fast}: {e}", err=True)
            continue
        files.append(folder / f"nncf_{fast}.onnx")
        onnx.save(made, files[-1])
    return files


def aimet(model: Path, samples: Samples, bits: tuple[int, int], iterations: int, folder: Path) -> list[Path]:
    """The file of AIMET (pip install aimet-onnx, with PyTorch): AdaRound at its SQNR ranges, first and last
    layers at 8 bits.

    Parameters
    ----------
    model : path
    samples : Samples
    bits : tuple of int
        Of weights and activations; none is made where AIMET cannot store them.
    iterations : int
        Of AdaRound, a layer; AIMET recommends 10,000 to 15,000.
    folder : path

    Raises
    ------
    BadParameter
        If it is not installed.
    """
    with _installed("aimet", "torch==2.13.0 aimet-onnx"):
        from aimet_onnx import QuantizationSimModel, apply_adaround
        from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
        from aimet_onnx.common.defs import QuantScheme
    if any(b not in _TYPES for b in bits):
        return []
    batches = list(iter(peers.Reader(samples).get_next, None))
    given = onnx.load(model)
    fold_all_batch_norms_to_weight(given)
    weights, activations = (_TYPES[b] for b in bits)
    simulation = QuantizationSimModel(
        given,
        param_type=weights,
        activation_type=activations,
        quant_scheme=QuantScheme.post_training_tf_enhanced,
        dummy_input=batches[0],
    )
    layers = plan(normalize(io.load(model), 13), targets.load("ort-x64"), Config()).layers
    for layer in layers:
        if layer.edge and layer.weight in simulation.qc_quantize_op_dict:
            simulation.set_tensor_precision(layer.weight, "int8")
    apply_adaround(simulation, batches, num_iterations=iterations)
    simulation.compute_encodings(batches)
    onnx.save(simulation.to_onnx_qdq(), folder / "aimet.onnx")
    return [folder / "aimet.onnx"]
