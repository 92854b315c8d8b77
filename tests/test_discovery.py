"""Files that extend the package are found by themselves, in the order of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from eptq_onnx import discovery
from eptq_onnx.passes.base import Pass
from eptq_onnx.pipeline import PIPELINE

ROOT = Path(discovery.__file__).parent


def test_all_modules_of_a_package_are_found():
    found = [module.__name__.rpartition(".")[2] for module in discovery.modules("eptq_onnx.passes")]
    assert found == sorted(path.stem for path in (ROOT / "passes").glob("[a-z]*.py"))


def test_classes_are_found_where_they_are_defined_and_abstract_ones_are_not():
    found = discovery.classes("eptq_onnx.passes", Pass)  # type: ignore[type-abstract]
    assert Pass not in found
    assert len(found) == len(set(found))
    assert set(found) == {type(step) for step in PIPELINE}


def test_a_package_may_have_nothing_of_a_kind():
    class Other(ABC):
        @abstractmethod
        def run(self) -> None: ...

    assert discovery.classes("eptq_onnx.passes", Other) == []  # type: ignore[type-abstract]
