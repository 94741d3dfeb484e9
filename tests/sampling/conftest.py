"""The tiny workspace of the evaluation's tests."""

from tests.evaluate.conftest import cascade, recipe, tiny

__all__ = ["cascade", "recipe", "tiny"]
