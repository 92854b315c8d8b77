"""Reading, viewing and editing of ONNX graphs; the only package that imports onnx-graphsurgeon."""
