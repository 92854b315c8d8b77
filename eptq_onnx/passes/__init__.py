"""The passes of the pipeline, one per file.

Passes do not import each other; `eptq_onnx.pipeline` puts them in order.
"""
