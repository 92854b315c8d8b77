"""What a backend of workers is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

from eptq_onnx.errors import WorkerError
from eptq_onnx.parallel import Workers

J = TypeVar("J")
R = TypeVar("R")


class Backend(ABC):
    """A kind of workers.

    Attributes
    ----------
    name : str
        Name in the option ``workers``.
    about : str
        A few words for help and documentation: where batches run, and what that needs.
    apart : bool
        True if whole jobs run side by side, each on cores of its own; see `tasks`.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    apart: ClassVar[bool] = False

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

    def tasks(
        self, function: Callable[[J], R], jobs: Sequence[J], cores: Callable[[J], int]
    ) -> Iterator[tuple[int, R | WorkerError]]:
        """Yield the number of each whole job and what ``function`` returns for it, as they end.

        By default they run one after the other in this process.

        Parameters
        ----------
        function : callable
            A function of a module; it raises nothing.
        jobs : sequence
        cores : callable
            Returns the cores that a job takes.

        Raises
        ------
        InstallError
            If software is missing.
        WorkerError
            If no worker can be had; one is yielded for a job whose process ended again and again.
        """
        for number, job in enumerate(jobs):
            yield number, function(job)
