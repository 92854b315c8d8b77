"""Constant folding and clean-up with onnx-graphsurgeon."""

from __future__ import annotations

import logging

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto

from eptq_onnx.errors import ModelError


def fold_constants(model: ModelProto) -> ModelProto:
    """Fold constants and static shapes, drop what no output needs, sort topologically.

    Constant nodes become initializers. Tensor names and what the graph does not hold (metadata, IR version)
    survive.

    Raises
    ------
    ModelError
        If the graph has a cycle.
    """
    logging.getLogger("onnx_graphsurgeon").setLevel(logging.ERROR)
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = gs.import_onnx(inferred)
    try:
        graph.fold_constants(error_ok=True).cleanup(remove_unused_graph_inputs=False).toposort()
    except Exception as e:
        # onnx-graphsurgeon reports every problem as its own or a bare exception.
        raise ModelError(f"the graph cannot be sorted or folded: {' '.join(str(e).split())[:300]}") from e
    folded = gs.export_onnx(graph, do_type_check=False)
    result = ModelProto()
    result.CopyFrom(model)
    result.graph.CopyFrom(folded.graph)
    result.graph.doc_string = model.graph.doc_string
    return result
