"""Storage of models as protobuf: bodies, weights in memory and in files."""
