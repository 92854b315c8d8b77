"""Where samples come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """Where calibration data comes from, and what was done to it.

    Parameters
    ----------
    label : str
        Name of the source, for messages.
    recipe : dict of str to str
        What was done, as options of the command: ``image`` → ``size=224,...``. What was guessed is in it.
    guessed : tuple of str
        What of the recipe was guessed, and from what.
    notes : tuple of str
        What was left out, cut or taken for something, each with the reason.
    made_up : bool
        True for values that are not samples at all.
    needed : bool
        False if the run learns nothing from samples.
    """

    label: str
    recipe: dict[str, str] = field(default_factory=dict)
    guessed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    made_up: bool = False
    needed: bool = True

    @property
    def told(self) -> tuple[str, ...]:
        """The recipe, with what was guessed, and the notes, for a user who gave these samples."""
        return (*([f"samples: {self}"] if self.recipe else []), *self.notes)

    def __str__(self) -> str:
        done = [f"--{name} '{text}'" for name, text in self.recipe.items()]
        guesses = [f"guessed: {'; '.join(self.guessed)}"] if self.guessed else []
        return "; ".join([self.label, *done, *guesses])
