"""Where float networks, scores and gradients are computed: the CPU, or a device that onnxruntime knows.

The written file is always checked on the CPU, whose integer kernels it is for. What a device cannot do is
computed on the CPU, and `told` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from eptq_onnx.errors import CapabilityError, ConfigError, one_line

CPU, AUTO = "cpu", "auto"
_CPU_PROVIDER = "CPUExecutionProvider"
_RECORD = "session.record_ep_graph_assignment_info"
"""Entry that lets onnxruntime (1.24 or newer) say which node runs where; older versions ignore it."""
_MOST_NAMED = 8
"""Most operators that a note names."""


class _Provider(NamedTuple):
    """A provider, its options, the package that brings it, and what help says."""

    name: str
    options: Mapping[str, str]
    package: str
    about: str


_PROVIDERS = {
    # Without TF32, whose products have 10 bits of mantissa.
    "cuda": _Provider("CUDAExecutionProvider", {"use_tf32": "0"}, "onnxruntime-gpu", "NVIDIA, by CUDA"),
    "openvino": _Provider(
        "OpenVINOExecutionProvider", {"precision": "FP32"}, "onnxruntime-openvino", "Intel, by OpenVINO"
    ),
    "dml": _Provider("DmlExecutionProvider", {}, "onnxruntime-directml", "Windows, by DirectML; untried"),
    "coreml": _Provider("CoreMLExecutionProvider", {}, "onnxruntime", "macOS, by Core ML; untried"),
}
ABOUT = {
    CPU: "the processor",
    AUTO: "cuda if it is there, else cpu",
    **{name: provider.about for name, provider in _PROVIDERS.items()},
}
"""Names of devices, and what each is."""


@dataclass
class _Device:
    """A device, and what it has computed."""

    name: str
    provider: _Provider
    sessions: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)


_current: ContextVar[_Device | None] = ContextVar("device", default=None)
"""The device of the current run; threads that work for it inherit it."""


@contextmanager
def on(name: str, known: Sequence[str], installed: str) -> Iterator[None]:
    """Compute on a device in a block; ``known`` are the providers of ``installed``, the onnxruntime here.

    Raises
    ------
    ConfigError
        If there is no such device.
    CapabilityError
        If onnxruntime has no provider for it.
    """
    if name not in ABOUT:
        raise ConfigError(f"device {name!r} is unknown: choose one of {', '.join(ABOUT)}.")
    if name == AUTO:
        name = "cuda" if _PROVIDERS["cuda"].name in known else CPU
    found = None
    if name != CPU:
        provider = _PROVIDERS[name]
        if provider.name not in known:
            raise CapabilityError(
                f"device {name}: {installed} has no {provider.name}: install {provider.package} in its "
                "place, or leave the device out."
            )
        found = _Device(name, provider)
    token = _current.set(found)
    try:
        yield
    finally:
        _current.reset(token)


def chosen() -> str:
    """Return the name of the current device."""
    device = _current.get()
    return CPU if device is None else device.name


def session(ort: Any, model: bytes | str, options: Any, disabled: Sequence[str], *, moves: bool) -> Any:
    """Return an onnxruntime session of a model, on the current device if it ``moves`` there.

    Raises
    ------
    CapabilityError
        If the device cannot be used.
    """
    device = _current.get() if moves else None
    if device is None:
        return ort.InferenceSession(model, options, [_CPU_PROVIDER], disabled_optimizers=list(disabled))
    options.add_session_config_entry(_RECORD, "1")
    wanted = [(device.provider.name, dict(device.provider.options)), _CPU_PROVIDER]
    try:
        made = ort.InferenceSession(model, options, wanted, disabled_optimizers=list(disabled))
    except Exception as e:
        # The providers' exceptions have no common base but Exception.
        device.refused[one_line(e, 120)] += 1
        return ort.InferenceSession(model, options, [_CPU_PROVIDER], disabled_optimizers=list(disabled))
    if device.provider.name not in made.get_providers():
        raise CapabilityError(
            f"device {device.name}: onnxruntime cannot start its {device.provider.name}, whose libraries or "
            "driver may be missing: leave the device out, or see onnxruntime's requirements for it."
        )
    device.sessions += 1
    device.elsewhere.update(_on_cpu(made))
    return made


def _on_cpu(made: Any) -> list[str]:
    """Return the operators of a session's nodes that the CPU computes, if onnxruntime tells."""
    assigned: Any = getattr(made, "get_provider_graph_assignment_info", list)()
    return [n.op_type for part in assigned if part.ep_name == _CPU_PROVIDER for n in part.get_nodes()]


def told() -> list[str]:
    """Return notes on what the current device has computed, and what the CPU has in its place."""
    device = _current.get()
    if device is None:
        return []
    notes = [
        f"device {device.name} computed float networks, scores and gradients in {device.sessions} sessions; "
        "the written file was checked on the CPU"
    ]
    if device.elsewhere:
        names = [name for name, _ in device.elsewhere.most_common()]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        notes.append(f"the CPU computed these operators for it: {', '.join(names[:_MOST_NAMED])}{more}")
    if device.refused:
        why, _ = device.refused.most_common(1)[0]
        count = sum(device.refused.values())
        notes.append(f"{count} sessions ran on the CPU, because {device.provider.name} refused them: {why}")
    return notes
