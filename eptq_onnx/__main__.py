"""``python -m eptq_onnx``."""

from eptq_onnx.cli import app

app(prog_name="eptq-onnx")
