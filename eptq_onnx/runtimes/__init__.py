"""Measurements of a written model in its runtime."""
