"""What a backend of workers is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from eptq_onnx.parallel import Workers


class Backend(ABC):
    """A kind of workers.

    Attributes
    ----------
    name : str
        Name in the option ``workers``.
    about : str
        A few words for help and documentation: where batches run, and what that needs.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    @abstractmethod
    def start(self) -> Workers:
        """Return workers that are ready.

        Raises
        ------
        InstallError
            If software that they need is missing.
        WorkerError
            If none can be had.
        """
