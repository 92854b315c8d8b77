"""What another process needs to make the same session again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

_USUAL = {"optimize": True, "threads": 1, "integers": True}
"""Options that need not be given."""
_MOST = 8
"""Sessions that a process keeps, those used last."""


@dataclass(frozen=True)
class Recipe:
    """A session that can be made again.

    Parameters
    ----------
    kind : type
        Class of the session.
    model : ndarray of uint8
        The serialized model. Weights in files stay there: other machines need the same folder.
    options : mapping of str to object
        Keywords of the constructor.
    within : callable
        Returns the context that the session is made in: its custom operators.
    """

    kind: type
    model: NDArray[np.uint8]
    options: Mapping[str, Any]
    within: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(
        cls, session: object, model: ModelProto, options: Mapping[str, Any], within: Callable[[], Any]
    ) -> Recipe:
        """Return the recipe of a session that was made of a model."""
        changed = {name: value for name, value in options.items() if value != _USUAL[name]}
        return cls(type(session), np.frombuffer(model.SerializeToString(), np.uint8), changed, within)

    @cached_property
    def digest(self) -> str:
        """What tells this recipe from others."""
        told = repr((self.kind, sorted(self.options.items()), getattr(self.within, "args", ())))
        return hashlib.sha256(told.encode() + hashlib.sha256(self.model.data).digest()).hexdigest()


class _Made:
    """The sessions that this process has made from recipes."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: OrderedDict[str, Any] = OrderedDict()

    def get(self, recipe: Recipe, digest: str) -> Any:
        with self._guard:
            if digest not in self._known:
                with recipe.within():
                    self._known[digest] = recipe.kind(
                        ModelProto.FromString(recipe.model.tobytes()), **recipe.options
                    )
                while len(self._known) > _MOST:
                    self._known.popitem(last=False)
            self._known.move_to_end(digest)
            return self._known[digest]


_made = _Made()


def made(recipe: Recipe, digest: str) -> Any:
    """Return the session of a recipe; a process makes it once."""
    return _made.get(recipe, digest)
