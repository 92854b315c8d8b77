"""Reading, viewing and editing ONNX graphs; the only importer of onnx-graphsurgeon."""
