"""Gradient engines; the only importers of gradient libraries."""
