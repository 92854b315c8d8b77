"""Execution of networks as a whole, block by block or layer by layer, and comparison of their outputs."""
