"""The steps of the method as plain functions; no step imports another."""
