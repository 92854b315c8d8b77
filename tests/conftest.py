from __future__ import annotations

import os

# Each process of pytest-xdist keeps to one core, before anything counts cores: threads of several would wait
# for each other.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from eptq_onnx import engines, targets
from eptq_onnx.engines.base import Engine
from eptq_onnx.passes.diagnose import Diagnose
from eptq_onnx.passes.measure import Measure
from eptq_onnx.passes.place import Place
from eptq_onnx.runtimes import web

# Machines are noisy: how long a draw takes says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

MODELS = Path(__file__).resolve().parent.parent / "models"

INSTALLED = [name for name, engine in reversed(engines.registered().items()) if engine.available()]
"""The engines that run here: the standard one does everywhere."""


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The engine that is chosen by itself."""
    return engines.make()


@pytest.fixture(scope="session", params=INSTALLED)
def each_engine(request: pytest.FixtureRequest) -> Engine:
    """All engines that run here, one after the other."""
    return engines.make(request.param)


@pytest.fixture
def measured_speed() -> None:
    """Have the speed measured, which takes longer than to quantize the small models of most tests."""


@pytest.fixture(autouse=True)
def _unmeasured_speed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measured_speed" not in request.fixturenames:
        monkeypatch.setattr(Measure, "enabled", lambda *_: False)


@pytest.fixture
def diagnosed() -> None:
    """Have layers compared and causes of noise found, which takes longer than to quantize small models."""


@pytest.fixture(autouse=True)
def _undiagnosed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "diagnosed" not in request.fixturenames:
        monkeypatch.setattr(Diagnose, "enabled", lambda *_: False)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the timings of this process and of those that it starts out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(web.FOLDER, str(web.folder()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def timed() -> None:
    """Have operators chosen by time, which takes longer than to quantize the small models of most tests."""


@pytest.fixture(autouse=True)
def _untimed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "timed" not in request.fixturenames:
        monkeypatch.setattr(Place, "enabled", lambda *_: False)


@pytest.fixture
def this_machine() -> None:
    """Have the default target chosen by the machine, which other tests must not depend on."""


@pytest.fixture(autouse=True)
def _any_machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "this_machine" not in request.fixturenames:
        monkeypatch.setattr(targets.machine, "fitting", lambda: ("ort-x64", "for the tests"))
        monkeypatch.setattr(targets, "fit_of", lambda name, target: None)


@pytest.fixture(scope="session")
def models_folder() -> Path:
    return MODELS
