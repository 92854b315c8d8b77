"""Folders of sounds: rates, lengths, channels, and files that are none."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from graphs import parse
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx import Data, DataError, InstallError, data

RATE = 8000


def model(dims: str = "N,4000", kind: str = "float") -> Any:
    return parse(f"g ({kind}[{dims}] x) => ({kind}[{dims}] y) {{ y = Identity (x) }}")


def tone(seconds: float = 1.0, rate: int = RATE, hertz: float = 100.0, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    return np.stack([wave] * channels, 1)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    for k in range(4):
        soundfile.write(tmp_path / f"{k}.wav", tone(1 + k), RATE)
        soundfile.write(tmp_path / "more" / f"{k}.flac", tone(1 + k), RATE)
    return tmp_path


def loaded(source: Path, of: Any = None, **options: Any) -> data.Candidates:
    return data.load(Data(source, **options), of or model())


def test_a_folder_is_read_with_its_subfolders(sounds):
    found = loaded(sounds, audio=f"rate={RATE}")
    assert found.samples[0].count == 8
    assert found.samples[0].take([0])["x"].shape == (1, 4000)
    assert found.origin.recipe == {"audio": "rate=8000,seconds=0.5,channels=mono"}
    assert found.origin.guessed == ("channels (the model's input)", "seconds (the model's input)")
    assert found.origin.notes == ()
    assert loaded(sounds / "1.wav").samples[0].count == 1
    assert loaded(sounds, samples=3).samples[0].count == 3


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ("N,4000", (4000,)), ("4000", (4000,)), ("N,1,4000", (1, 4000)), ("N,2,4000", (2, 4000)),
        ("N,4000,1", (4000, 1)), ("1,4000,2", (4000, 2)), ("N,C,4000", (1, 4000)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_and_axes_are_those_of_the_model(tmp_path, dims, shape, channels):
    for k in range(2):
        soundfile.write(tmp_path / f"{k}.wav", tone(channels=channels), RATE)
    found = loaded(tmp_path, model(dims)).samples[0].take([0])["x"]
    assert found.shape in (shape, (1, *shape))
    assert np.abs(found).max() == pytest.approx(0.5, abs=0.01)


def test_channels_that_are_wanted_are_mixed_or_kept(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([np.full(4000, 0.5), np.full(4000, -0.25)], 1), RATE)
    np.testing.assert_allclose(loaded(tmp_path).samples[0].take([0])["x"], 0.125, atol=1e-3)
    both = loaded(tmp_path, model("N,C,4000"), audio="channels=stereo").samples[0].take([0])["x"]
    np.testing.assert_allclose(both[0, :, 0], [0.5, -0.25], atol=1e-3)


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([4000, 11025, 16000, 44100, 48000]), st.floats(0.05, 2), st.sampled_from([1, 2]))
def test_any_rate_and_length_become_the_models(tmp_path_factory, rate, seconds, channels):
    folder = tmp_path_factory.mktemp("sounds")
    soundfile.write(folder / "a.wav", tone(seconds, rate, channels=channels), rate)
    found = loaded(folder, audio=f"rate={RATE}").samples[0].take([0])["x"][0]
    assert found.shape == (4000,)
    length = min(4000, round(seconds * RATE))
    inner = found[200 : length - 200]
    if len(inner) > 400:
        # The tone is still one of 100 Hz, and as loud; what is missing is silent and at the end.
        spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
        assert np.argmax(spectrum) * RATE / len(inner) == pytest.approx(100, abs=RATE / len(inner))
        assert np.abs(inner).max() == pytest.approx(0.5, abs=0.02)
    assert not found[length + 2 :].any()


def test_longer_sounds_keep_their_middle(tmp_path):
    ramp = np.linspace(-0.9, 0.9, 12001).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", ramp, RATE, subtype="FLOAT")
    found = loaded(tmp_path).samples[0].take([0])["x"][0]
    np.testing.assert_allclose(found, ramp[4000:8000], atol=1e-3)


def test_of_a_sound_of_hours_only_the_middle_is_read(tmp_path):
    """Eighteen hours: 1 GB, of which nothing but the middle is in the file."""
    size = 2**30
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE,
                         2, 16, b"data", size)  # fmt: skip
    with open(tmp_path / "a.wav", "wb") as file:
        file.write(header)
        file.seek(len(header) + size // 2 - 4000)
        file.write(np.full(4000, 2**14, "<i2").tobytes())
        file.truncate(len(header) + size)
    tracemalloc.start()
    try:
        found = loaded(tmp_path, audio=f"rate={RATE}").samples[0].take([0])["x"]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found, 0.5, atol=1e-3)
    assert most < 2**24


def test_what_the_model_leaves_open_is_that_of_the_files(sounds):
    found = loaded(sounds, model("N,T"))
    assert found.origin.recipe == {"audio": "rate=8000,seconds=2.5,channels=mono"}
    assert any("nothing in the model says its rate" in note for note in found.origin.notes)
    assert loaded(sounds, model("N,T"), audio="seconds=0.25").samples[0].take([0])["x"].shape == (1, 2000)


def test_broken_sounds_are_named_and_left_out(sounds):
    whole = (sounds / "0.wav").read_bytes()
    (sounds / "broken.wav").write_bytes(whole[:20])
    (sounds / "empty.wav").write_bytes(b"")
    (sounds / "text.flac").write_text("hello")
    soundfile.write(sounds / "silent.wav", np.zeros(0), RATE)
    found = loaded(sounds, audio=f"rate={RATE}")
    assert found.samples[0].count == 8
    [note] = found.origin.notes
    assert note.startswith("4 of 12 sounds cannot be read and are left out: ")
    assert "silent.wav (it is empty)" in note


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_never_end_a_run(sounds, seed):
    rng = np.random.default_rng(seed)
    for k in range(12):
        content = bytearray((sounds / ("0.wav" if k % 2 else "more/0.flac")).read_bytes())
        for place in rng.integers(0, 200 if k % 3 else len(content), 1 + k):
            content[place] = rng.integers(0, 256)
        (sounds / f"x{k}{'.wav' if k % 2 else '.flac'}").write_bytes(content)
    samples = loaded(sounds, audio=f"rate={RATE}").samples[0]
    assert samples.count >= 8
    assert np.isfinite(samples.take(range(samples.count))["x"]).all()


@pytest.mark.parametrize(
    ("dims", "kind", "options", "message"),
    [
        ("N,4000", "int64", {}, "sounds fill one float input .* but the model takes 'x' int64"),
        ("N,80,100", "float", {}, r"but the model takes 'x' float32 \(any, 80, 100\)"),
        ("N,3,8,8", "float", {}, "sounds fill one float input"),
        ("N,4000", "float", {"audio": "channels=stereo"}, "channels=stereo does not fit"),
        ("N,4000", "float", {"audio": "rate=8000,seconds=1"}, "seconds=1 at a rate of 8000 are 8000 values"),
    ],
)
def test_what_the_model_does_not_take_is_told(sounds, dims, kind, options, message):
    with pytest.raises(DataError, match=message) as e:
        loaded(sounds, model(dims, kind), **options)
    assert "\n" not in str(e.value)


def test_what_is_missing_is_told(tmp_path, sounds, monkeypatch):
    with pytest.raises(DataError, match=r"none\.wav does not exist"):
        loaded(tmp_path / "none.wav")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the sounds of .*alone can be read"):
        loaded(tmp_path / "alone")
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(InstallError, match=r"eptq-onnx\[audio\]"):
        loaded(sounds)
