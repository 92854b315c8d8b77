"""Formats, roundings and linear algebra: numpy alone."""
