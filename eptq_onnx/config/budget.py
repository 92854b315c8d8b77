"""Limits for mixed precision."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eptq_onnx.config.choices import BudgetUnit


class Budget(BaseModel):
    """Limit for mixed precision, written as ``weights=3.5``.

    Parameters
    ----------
    unit : BudgetUnit
        ``weights``: mean bits of a weight; ``bytes`` of the written file; ``bitops``: multiplications of one
        sample, each times the bits of both factors; ``activations``: mean bits of an activation's value;
        ``time``: seconds of one run on this machine.
    amount : float
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: BudgetUnit
    amount: float = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        unit, _, amount = value.partition("=")
        if unit not in {u.value for u in BudgetUnit} or not amount:
            raise ValueError(
                "write weights=BITS, activations=BITS, bytes=COUNT, bitops=COUNT or time=SECONDS"
            )
        return {"unit": unit, "amount": amount}

    def __str__(self) -> str:
        return f"{self.unit.value}={self.amount:.15g}"
