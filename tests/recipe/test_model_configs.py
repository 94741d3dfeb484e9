"""The configurations of models/ as recipes read them."""

import dataclasses

import pytest
from pydantic import TypeAdapter, ValidationError

from models.diffusion import config as configs

CLASSES = [value for value in vars(configs).values() if dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("cls", CLASSES)
def test_config_refuses_unknown_keys_and_converts_nothing(cls: type) -> None:
    adapter = TypeAdapter(cls)
    assert adapter.validate_json("{}") == cls()
    with pytest.raises(ValidationError, match="no_such_key"):
        adapter.validate_json('{"no_such_key": 1}')
    first_int = next(field.name for field in dataclasses.fields(cls) if isinstance(field.default, int))
    with pytest.raises(ValidationError, match=first_int):
        adapter.validate_json(f'{{"{first_int}": "1"}}')
