"""A pass for Olive 0.13 that quantizes with this package, and a workflow that runs it.

Olive finds passes by a package configuration, a table of names and import paths. It takes the place of
Olive's own, so this is Olive's with one entry more.

    pip install olive-ai torch "eptq-onnx[standard]"
    PYTHONPATH=examples python examples/olive_pass.py models/digits_mobile.onnx models/digits_calib.npz build
    cd build && PYTHONPATH=../examples olive run --config workflow.json --package-config packages.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from olive.data.config import DataConfig
from olive.data.registry import Registry
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.workflows import run

import eptq_onnx


class EptqQuantization(Pass):
    """Quantizes an ONNX model; ``options`` are those of `eptq_onnx.Config`."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            "data_config": PassConfigParam(type_=DataConfig | dict, required=True, description="Samples."),
            "options": PassConfigParam(
                type_=dict, default_value={}, description="Options of eptq_onnx.Config."
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        data = DataConfig.model_validate(config.data_config).to_data_container()
        loader = data.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)
        feeds = [{name: np.asarray(value) for name, value in batch.items()} for batch in loader]
        result = eptq_onnx.quantize(model.model_path, feeds, eptq_onnx.Config(**config.options))
        path = resolve_onnx_path(output_model_path, Path(model.model_path).name)
        result.save(path)
        return ONNXModelHandler(path, model_attributes={"eptq": result.report.verdict.assurance.value})


@Registry.register_dataset()
def archive_dataset(data_dir: str, **_: Any) -> torch.utils.data.Dataset[Any]:
    """Return the samples of an archive with one array for each input."""
    arrays = dict(np.load(data_dir))

    class Samples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return min(map(len, arrays.values()))

        def __getitem__(self, k: int) -> tuple[dict[str, Any], int]:
            return {name: values[k] for name, values in arrays.items()}, 0

    return Samples()


def configurations(model: str, data: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration of packages, and of the workflow."""
    packages = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    packages["passes"]["EptqQuantization"] = {
        "module_path": "olive_pass.EptqQuantization", "supported_providers": ["*"],
        "supported_accelerators": ["*"], "supported_precisions": ["int8", "int4"],
        "supported_algorithms": [], "supported_quantization_encodings": ["qdq"],
        "dataset": "dataset_required",
    }  # fmt: skip
    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(Path(model).resolve())},
        "data_configs": [{
            "name": "calibration", "type": "DataContainer", "user_script": str(Path(__file__).resolve()),
            "load_dataset_config": {
                "type": "archive_dataset", "params": {"data_dir": str(Path(data).resolve())},
            },
            "dataloader_config": {"batch_size": 16},
        }],
        "passes": {
            "shapes": {"type": "OnnxPeepholeOptimizer"},
            "quantize": {
                "type": "EptqQuantization", "data_config": "calibration",
                "options": {"weight_bits": 4, "preset": "fast", "measure_speed": False},
            },
        },
        "output_dir": str(folder.resolve() / "olive"), "cache_dir": str(folder.resolve() / "olive_cache"),
    }  # fmt: skip
    return packages, workflow


def main(model: str, data: str, folder: Path) -> None:
    """Run the workflow, and say where its model is."""
    folder.mkdir(parents=True, exist_ok=True)
    packages, workflow = configurations(model, data, folder)
    for name, content in (("packages.json", packages), ("workflow.json", workflow)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    run(workflow, package_config=packages)
    [written] = sorted((folder / "olive").rglob("*.onnx"))
    print(f"{written}: {written.stat().st_size} bytes, float {Path(model).stat().st_size}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
