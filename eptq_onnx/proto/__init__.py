"""Protobuf storage of models: subgraphs, and weights in memory or in files."""
