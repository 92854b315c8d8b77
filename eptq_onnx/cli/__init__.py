"""The command line: one file a command; options are those of `eptq_onnx.config.Config`."""

from eptq_onnx.cli import quantize, version  # noqa: F401  # they add themselves to the app
from eptq_onnx.cli.app import app

__all__ = ["app"]
