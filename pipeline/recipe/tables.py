"""The plain tables of a recipe: read from files, changed with ``--set``, merged and flattened."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any, cast

from pipeline.errors import ConfigError
from pipeline.recipe.folder import folder_tables

Json = dict[str, Any]
EXTENDS = "extends"
"""Key of a recipe file, not of a recipe: the file that it changes."""


def read_tables(file: Path, extended_by: tuple[Path, ...] = ()) -> Json:
    """The tables of a recipe, on those of the recipe that it extends.

    Args:
        file: As in ``load_recipe``.
        extended_by: The recipes that extend this one, the first in front.

    Raises:
        ConfigError: If a file is missing or malformed, or extends itself.
    """
    if file.resolve() in extended_by:
        raise ConfigError(f"{file}: extends itself, by way of {', '.join(str(path) for path in extended_by)}")
    tables = folder_tables(file) if file.is_dir() else _read_file(file)
    if EXTENDS not in tables:
        return tables
    base = tables.pop(EXTENDS)
    if not isinstance(base, str):
        raise ConfigError(f'{file}: {EXTENDS} = {base!r}: name one recipe, as in {EXTENDS} = "demo.toml"')
    return merge(read_tables(file.parent / base, (*extended_by, file.resolve())), tables)


def _read_file(file: Path) -> Json:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such recipe; see configs/ or write one with `unclip init`") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    try:
        tables: Any = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not a valid recipe: {error}") from None
    if not isinstance(tables, dict):
        raise ConfigError(f"{file}: not a valid recipe: it holds no tables")
    return cast("Json", tables)


def apply_override(data: Json, override: str) -> None:
    """Change one value of the tables, in place.

    Args:
        data: The tables.
        override: As in ``load_recipe``.

    Raises:
        ConfigError: If it is malformed, or names a field inside a value.
    """
    name, equals, raw = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"--set {override}: write it as section.key=value, for example --set prior.train.num_steps=500"
        )
    try:
        value: Any = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    table = data
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: depth + 1])} is a value, not a table")
    table[keys[-1]] = value


def merge(below: Json, above: Json) -> Json:
    """A copy of ``below`` with the values of ``above``; tables are merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = (
            merge(under, cast("Json", value)) if isinstance(under, dict) and isinstance(value, dict) else value
        )
    return merged


def flatten(tables: Json, prefix: str = "") -> Json:
    """Nested tables as one table: each value under its dotted name, after ``prefix``."""
    flat: Json = {}
    for name, value in tables.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def without_resources(tables: Json) -> Json:
    """The tables without every ``resources`` table: only what changes bytes."""
    return {
        key: without_resources(cast("Json", value)) if isinstance(value, dict) else value
        for key, value in tables.items()
        if key != "resources"
    }


def to_dict(config: object) -> Json:
    """The plain tables of a config object, in field order; tuples become lists."""
    return cast("Json", json.loads(json.dumps(dataclasses.asdict(cast("Any", config)))))
