"""What every configuration is made with: a frozen dataclass, ready for pydantic but without it, and its checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def configclass(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that pydantic checks strictly (without pydantic)."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    pydantic_config = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}
    setattr(made, "__pydantic_config__", pydantic_config)  # noqa: B010  (pyright knows no such attribute)
    return made


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_prob(name: str, value: float) -> None:
    """Raise ValueError unless ``value``, of the field ``name``, is a probability."""
    require(0.0 <= value <= 1.0, f"{name} = {value}: a probability lies in [0, 1]")
