"""Mutations of calibration files."""

from __future__ import annotations

import io
import zipfile

import numpy as np
from mutant_bases import EXTREME_FLOATS, Mutant, Rng, damaged, pick


# ---- mutations of the samples ------------------------------------------------------------------------------
def _archive(m: Mutant) -> dict[str, bytes]:
    members = {}
    for name, value in m.samples.items():
        buffer = io.BytesIO()
        np.save(buffer, value, allow_pickle=True)
        members[f"{name}.npy"] = buffer.getvalue()
    return members


def _zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def data_values(m: Mutant, rng: Rng) -> str:
    """Change values, types or shapes of one array."""
    m.in_data = True
    name = pick(rng, list(m.samples))
    value = m.samples[name]
    how = int(rng.integers(8))
    if how == 0:
        value = value.astype(
            pick(
                rng,
                (
                    np.float64,
                    np.float16,
                    np.int8,
                    np.int64,
                    np.bool_,
                    np.complex64,
                    "S4",
                    "U2",
                    "datetime64[s]",
                ),
            )
        )
    elif how == 1:
        value = value[: int(rng.integers(0, 2))]
    elif how == 2:
        value = value.reshape(-1) if rng.random() < 0.5 else value[None]
    elif how == 3:
        value = np.array(3).astype(value.dtype)  # dates, too, take integers so
    elif how == 4:
        value = np.array([v for v in value] + [None], dtype=object)
    elif how == 5 and value.dtype.kind == "f":
        value = value.copy()
        value.reshape(-1)[0] = pick(rng, EXTREME_FLOATS)
    elif how == 6:
        value = np.full(value.shape, pick(rng, (0, 1, 5, 100))).astype(value.dtype)
    else:
        value = np.asfortranarray(value).astype(value.dtype.newbyteorder(">"))
    m.samples[name] = value
    return f"{name} is {value.dtype} {value.shape}"


def data_members(m: Mutant, rng: Rng) -> str:
    """Rename, double or leave out arrays of the archive, or put odd ones in."""
    m.in_data = True
    name = pick(rng, list(m.samples))
    how = int(rng.integers(3))
    if how == 0:
        m.samples["other"] = m.samples[name]
        return "one more array"
    if how == 1:
        m.samples["other"] = m.samples.pop(name)
        return "another name"
    members = _archive(m)
    members[pick(rng, ("../evil.npy", "x.txt", "x", "z.npz", f"{name}.npy.npy"))] = b"text"
    m.data_bytes = _zipped(members)
    return "a member that is no array"


def data_bytes(m: Mutant, rng: Rng) -> str:
    """Damage bytes of the file."""
    m.in_data = True
    members = _archive(m)
    if rng.random() < 0.4:
        name = pick(rng, list(members))
        members[name] = damaged(members[name][:200], rng) + members[name][200:]
        m.data_bytes = _zipped(members)
        return f"bytes of {name}"
    m.data_bytes = damaged(_zipped(members, int(pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))), rng)
    return "bytes of the archive"
