"""The passes of the pipeline, one a file; none of them knows another. `eptq_onnx.pipeline` puts them in
order."""
