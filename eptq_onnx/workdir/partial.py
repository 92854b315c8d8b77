"""What a long pass keeps of its work before it is done."""

from __future__ import annotations

from typing import Any


class Partial:
    """Keeps nothing: a run without a workdir."""

    def load(self) -> Any:
        """What was kept last of the same work, or None."""
        return None

    def save(self, progress: int, value: dict[str, Any]) -> None:
        """Keep the state of the work; it may be left out where keeping costs more than doing the work again.

        Parameters
        ----------
        progress : int
            How far the work is: of several that are there, the one that got furthest counts.
        value : dict of str to object
            Of the types that `eptq_onnx.workdir.encode` takes.
        """
