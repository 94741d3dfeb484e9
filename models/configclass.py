"""The decorator of every configuration: a frozen dataclass that pydantic can check, without importing it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")
_PYDANTIC = {"extra": "forbid", "strict": True, "allow_inf_nan": False, "use_attribute_docstrings": False}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def configclass(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that pydantic checks strictly (without pydantic)."""
    config_class = dataclass(frozen=True, kw_only=True)(cls)
    setattr(config_class, "__pydantic_config__", _PYDANTIC)  # noqa: B010  (pyright knows no such attribute)
    return config_class


@contextmanager
def described_fields() -> Generator[None]:
    """Inside this context pydantic also reads the fields' docstrings from the source, which takes most of its time."""
    _PYDANTIC["use_attribute_docstrings"] = True
    try:
        yield
    finally:
        _PYDANTIC["use_attribute_docstrings"] = False


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_prob(name: str, value: float) -> None:
    """Raise ValueError unless ``value``, of the field ``name``, is a probability."""
    require(0.0 <= value <= 1.0, f"{name} = {value}: a probability lies in [0, 1]")


def require_dropout(value: float) -> None:
    """Raise ValueError unless ``value``, of the field ``dropout``, is a probability that 16 bits hold below 1."""
    require(0.0 <= value < 1 - 2**-17, f"dropout = {value}: a probability lies in [0, 1 - 2^-17)")


def require_norm(image_norm: float) -> None:
    """Raise ValueError unless ``image_norm`` is a length that z_image can have."""
    require(0.0 < image_norm < float("inf"), f"image_norm = {image_norm}: must be positive and finite")
