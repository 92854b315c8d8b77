"""Progress that a long pass saves before it is done."""

from __future__ import annotations

from typing import Any


class Partial:
    """Saves nothing: a run without a workdir."""

    def load(self) -> Any:
        """Return what was saved last for the same work, or None."""
        return None

    def save(self, progress: int, value: dict[str, Any]) -> None:
        """Save the state of the work; skipped if saving costs more than repeating the work.

        Parameters
        ----------
        progress : int
            How far the work is; the largest one saved counts.
        value : dict of str to object
            Of types that `eptq_onnx.workdir.encode` accepts.
        """
