"""Reader for runs without samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eptq_onnx.data.readers.base import Nothing, Opened, Request
from eptq_onnx.data.readers.made_up import RandomReader


class NothingReader(RandomReader):
    """Draws inputs at random for runs that learn nothing from samples: so the file is known to run."""

    form = "None, where no ranges are needed: with activations=dynamic, and where only weights are quantized"
    on_command_line = False
    order = 5

    def takes(self, source: Any) -> bool:
        """Return True for an object that says so."""
        return isinstance(source, Nothing)

    def open(self, source: Any, request: Request) -> Opened:
        """Return drawn arrays, the same in every run."""
        found = super().open(source, request)
        return replace(found, origin=replace(found.origin, label="no samples", needed=False))

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return nothing: no file is read."""
        return []
