"""The command line: one file a command; options are those of `eptq_onnx.config.Config`."""

from eptq_onnx.cli.app import app
from eptq_onnx.discovery import modules

__all__ = ["app"]

modules(__name__)  # commands add themselves to the app
