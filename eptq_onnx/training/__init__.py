"""The training graph and the loop that learns with it."""
