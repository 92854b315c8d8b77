"""Reader of sounds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.config.recipes import AudioRecipe, Channels
from eptq_onnx.data.inputs import Input
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers.base import Opened, Request, Wanted
from eptq_onnx.data.readers.files import FilesReader, collected
from eptq_onnx.errors import DataError, InstallError, one_line

_USUAL_RATE = 16000
"""Rate if no file says one."""
_MOST_SECONDS = 30.0
"""Longest sample, if the model leaves its length open and nobody says another."""
_MARGIN = 0.05
"""Seconds read around what is kept, so that resampling has no borders in it."""
_SURVEYED = 50
"""Files whose headers decide rate and length."""
_NAME = re.compile(r"wav|audio|sound|speech|signal|pcm", re.IGNORECASE)
"""Names of inputs that take sounds."""
_LONG = 4000
"""Values from which on an input without such a name is taken for one: a quarter of a second."""


class SoundReader(FilesReader):
    """Reads sounds, each a sample, resampled and cut to the model's input."""

    form = "a folder of sounds (.wav, .flac, .ogg, ...), subfolders included, prepared as --audio says"
    order = 38
    suffixes = frozenset(
        {".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf"}
    )

    def open(self, source: Any, request: Request) -> Opened:
        """Return all sounds that can be read."""
        path = Path(source)
        libraries = _Libraries.found()
        hearing = _hearing(path, self, request, libraries)
        found = collected(self, path, request, lambda file: _heard(file, hearing, libraries), "sounds")
        notes = (*hearing.notes, *found.notes)
        origin = Origin(str(path), {"audio": str(hearing.recipe)}, hearing.guessed, notes)
        return Opened({hearing.input.name: found.shelf.values()}, origin, names=found.names)

    def wanted(self, request: Request) -> Wanted | None:
        """Return sounds if the model has one input of that name, or one that is long."""
        try:
            axes = _axes_of(request.inputs)
        except DataError:
            return None
        if not _NAME.search(request.inputs[0].name) and (axes.frames or 0) < _LONG:
            return None
        given = request.reading.audio or AudioRecipe()
        recipe = given if given.rate else given.model_copy(update={"rate": _USUAL_RATE})
        notes = () if given.rate else ("nothing in the model says its rate: say the one it was trained with",)
        guessed = () if given.rate else ("rate (a usual one)",)
        return Wanted("sounds", ("--data", "recordings", "--audio", str(recipe)), guessed, notes)


@dataclass(frozen=True)
class _Libraries:
    """Modules that read and resample sounds."""

    files: Any
    resampling: Any

    @staticmethod
    def found() -> _Libraries:
        try:
            return _Libraries(import_module("soundfile"), import_module("soxr"))
        except (ImportError, OSError) as e:  # OSError: without libsndfile
            raise InstallError("sounds need soundfile and soxr: pip install 'eptq-onnx[audio]'.") from e


@dataclass(frozen=True)
class _Axes:
    """How an input holds a sound.

    Parameters
    ----------
    frames, channels : int or None
        Their numbers; None where the model leaves them open.
    where : str
        ``first`` or ``last`` for an axis of channels in front of the frames or behind them; ``none`` without.
    """

    frames: int | None
    channels: int | None
    where: str

    def arranged(self, sound: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a sound of shape (frames, channels) without a batch axis."""
        if self.where == "none":
            return np.ascontiguousarray(sound[:, 0])
        return np.ascontiguousarray(sound.T) if self.where == "first" else sound


@dataclass(frozen=True)
class _Hearing:
    """How a model hears sounds: a recipe without gaps, for one input."""

    input: Input
    axes: _Axes
    recipe: AudioRecipe
    frames: int
    guessed: tuple[str, ...]
    notes: tuple[str, ...]


def _axes_of(inputs: tuple[Input, ...]) -> _Axes:
    """Return how the model's input holds sounds.

    Raises
    ------
    DataError
        If it does not.
    """
    info = inputs[0]
    sizes = [d if isinstance(d, int) else None for d in info.dims or ()]
    if len(inputs) == 1 and info.dtype is not None and info.dtype.kind == "f":
        if len(sizes) in (1, 2):
            return _Axes(sizes[-1], 1, "none")
        if len(sizes) == 3 and sizes[1] in (None, 1, 2) and sizes[2] not in (1, 2):
            return _Axes(sizes[2], sizes[1], "first")
        if len(sizes) == 3 and sizes[2] in (1, 2):
            return _Axes(sizes[1], sizes[2], "last")
    raise DataError(
        "sounds fill one float input (batch, values), (batch, channels, values) or (batch, "
        f"values, channels), but the model takes {'; '.join(map(str, inputs))}: give arrays, as a .npz file "
        "or module:function."
    )


def _hearing(path: Path, reader: SoundReader, request: Request, libraries: _Libraries) -> _Hearing:
    """Return how the model hears sounds.

    Raises
    ------
    DataError
        If it does not, or not so.
    """
    axes, info = _axes_of(request.inputs), request.inputs[0]
    wanted = request.reading.audio or AudioRecipe()
    surveyed = _survey(path, reader, libraries)
    guessed: list[str] = []
    notes: list[str] = []
    rate = wanted.rate
    if rate is None:
        rates = [own for own, _ in surveyed]
        rate = max(dict.fromkeys(rates), key=rates.count, default=_USUAL_RATE)
        guessed.append("rate (the most frequent of the files)")
        notes.append(
            f"nothing in the model says its rate, so that of the files was taken ({rate} a second): if the "
            "model was trained with another one, ranges and figures are wrong; --audio rate=... says it"
        )
    stereo = Channels.STEREO if axes.channels == 2 else Channels.MONO
    chosen = wanted.channels or stereo
    if wanted.channels is None:
        guessed.append("channels (the model's input)")
    elif axes.channels is not None and chosen is not stereo:
        raise DataError(
            f"channels={chosen.value} does not fit the input {info}: leave channels out of --audio."
        )
    if wanted.seconds is None:
        median = float(np.median([seconds for _, seconds in surveyed] or [1.0]))
        frames = axes.frames or max(1, round(min(median, _MOST_SECONDS) * rate))
        guessed.append("seconds (the model's input)" if axes.frames else "seconds (the median of the files)")
    else:
        frames = max(1, round(wanted.seconds * rate))
        if axes.frames not in (None, frames):
            raise DataError(
                f"seconds={wanted.seconds:g} at a rate of {rate} are {frames} values, but the model takes "
                f"{info}: leave seconds out of --audio, or say another rate."
            )
    recipe = AudioRecipe(rate=rate, seconds=frames / rate, channels=chosen)
    return _Hearing(info, axes, recipe, frames, tuple(guessed), tuple(notes))


def _survey(path: Path, reader: SoundReader, libraries: _Libraries) -> list[tuple[int, float]]:
    """Return rate and seconds of the first files that can be read."""
    found = []
    for file in reader.paths(path)[:_SURVEYED] if path.exists() else []:
        try:
            header = libraries.files.info(str(file))
        except Exception:  # the reason is told when the file is read
            continue
        if header.samplerate > 0 and header.frames > 0:
            found.append((int(header.samplerate), header.frames / header.samplerate))
    return found


def _heard(file: Path, hearing: _Hearing, libraries: _Libraries) -> NDArray[Any] | str:
    """Return a file as a sample, or why it cannot be read."""
    rate = hearing.recipe.rate or 1
    try:
        with libraries.files.SoundFile(str(file)) as sound:
            own = sound.samplerate
            # The middle, of which no more is read than is kept.
            needed = int(np.ceil(hearing.frames * own / rate + 2 * _MARGIN * own))
            start = max(0, (sound.frames - needed) // 2)
            sound.seek(start)
            values = sound.read(min(needed, max(sound.frames, 0)), dtype="float32", always_2d=True)
        if not values.size:
            return "it is empty"
        values = _mixed(values, hearing.recipe.channels or Channels.MONO)
        values = libraries.resampling.resample(values, own, rate) if own != rate else values
        values = np.nan_to_num(np.asarray(values, np.float32))
    except Exception as e:
        # The library raises its own errors, which have no common base in older versions.
        return one_line(e, 120).replace(str(file), file.name).rstrip(".") or type(e).__name__
    cut = max(0, (len(values) - hearing.frames) // 2)
    values = values[cut : cut + hearing.frames]
    padded = np.pad(values, ((0, hearing.frames - len(values)), (0, 0)))
    return hearing.axes.arranged(padded).astype(hearing.input.dtype or np.float32)


def _mixed(values: NDArray[Any], channels: Channels) -> NDArray[Any]:
    """Return values of shape (frames, channels) with the channels that are wanted."""
    if channels is Channels.MONO:
        return np.asarray(values.mean(axis=1, keepdims=True, dtype=np.float32))
    return values[:, :2] if values.shape[1] >= 2 else np.repeat(values, 2, axis=1)
