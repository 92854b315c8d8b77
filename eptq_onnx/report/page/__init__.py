"""The report as one HTML page: template, style and script lie beside the modules that fill them."""

from eptq_onnx.report.page.page import page_of

__all__ = ["page_of"]
