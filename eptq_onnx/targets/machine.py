"""Select the shipped target for onnxruntime on this machine."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_X86, _ARM = {"x86_64", "amd64"}, {"aarch64", "arm64"}
"""Names of processor architectures, in lower case."""
_CPUINFO = Path("/proc/cpuinfo")


def fitting() -> tuple[str, str]:
    """Return the name of the shipped target for this machine, and the reason."""
    processor = platform.machine().lower()
    if processor in _ARM:
        return "ort-arm64", "this machine is ARM64"
    if processor not in _X86:
        return (
            "ort-x64",
            f"{processor or 'this processor'} is neither x86-64 nor ARM64, and 7-bit weights never overflow",
        )
    vnni = has_vnni()
    if vnni is None:
        return (
            "ort-x64",
            "this system does not report whether the processor has VNNI, and 7-bit weights never overflow",
        )
    return ("ort-x64-vnni", "this machine has VNNI") if vnni else ("ort-x64", "this machine has no VNNI")


def saturates() -> bool:
    """Return True if this is an x86-64 processor that is known to lack VNNI."""
    return platform.machine().lower() in _X86 and has_vnni() is False


def has_vnni() -> bool | None:
    """Return True if an x86-64 processor has VNNI, which adds 8-bit products in 32 bits; None if unknown.

    Linux lists CPU features in /proc/cpuinfo, macOS in sysctl. Windows has no interface for them.
    """
    listed = ""
    if sys.platform == "linux":
        listed = cpuinfo()
    elif sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.leaf7_features"]
            listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    if not listed.strip():
        return None
    return re.search(r"\bavx(512)?_?vnni\b", listed, re.IGNORECASE) is not None


def cpuinfo() -> str:
    """Return what Linux reports about the processors; empty on other systems."""
    with suppress(OSError):
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    return ""
