"""Prints docs/config.md from the recipe's types: ``python -m jobs.reference > docs/config.md``."""

import json
from typing import Any

from pipeline.recipe.recipe import default_tables, json_schema

Json = dict[str, Any]
_LIKE_ANOTHER = {"first_decoder"}
"""Sections whose fields are those of another one, defaults too: their description says which."""


def reference() -> str:
    """Every section, field, type, default and description, as Markdown."""
    schema = json_schema()
    lines = [
        "# Recipe reference",
        "",
        "`make docs` writes this page from the types in `pipeline/recipe/*sections.py` and `models/*/config.py`: every",
        "field with its default. A recipe holds only what differs. Tables named `resources` change no bytes and are no",
        'part of a key. `extends = "other.toml"`, a path from the recipe\'s own folder, puts its tables on those of',
        "another recipe, and `NAME = false` leaves out its step; `unclip config RECIPE` prints the result.",
    ]
    defaults = default_tables({name: {} for name in schema["properties"]})
    _section(schema, schema["properties"], defaults, ("", ""), lines)
    return "\n".join(lines) + "\n"


def _section(
    schema: dict[str, Any], fields: dict[str, Any], defaults: dict[str, Any], title: tuple[str, str], lines: list[str]
) -> None:
    """One table and those inside it; ``title`` is its dotted name, and a note for its heading."""
    name, note = title
    tables: list[tuple[tuple[str, str], dict[str, Any], dict[str, Any]]] = []
    rows: list[str] = []
    for field, spec in fields.items():
        dotted = f"{name}.{field}" if name else field
        if dotted in _LIKE_ANOTHER:
            tables.append(((dotted, ""), {"description": spec["description"]}, {}))
            continue
        targets = _tables_of(schema, spec)
        for kind, target in targets.items():
            default = defaults.get(field)
            if not isinstance(default, dict) or default.get("kind", "") != kind:
                default = _defaults(schema, target)
            heading_note = note or (f', `kind = "{kind}"`' if kind else "")
            tables.append(((dotted, heading_note), target, default))
        if not targets:
            default = json.dumps(defaults.get(field))
            rows.append(f"| `{field}` | {_type(spec)} | `{default}` | {_cell(spec.get('description', ''))} |")
    if name:
        lines += ["", f"## `[{name}]`{note}", ""]
    if rows:
        lines += ([] if name else [""]) + ["| field | type | default | meaning |", "|---|---|---|---|", *rows]
    for inner, target, default in tables:
        if inner[0] in _LIKE_ANOTHER:
            lines += ["", f"## `[{inner[0]}]`", "", _cell(target["description"])]
            continue
        _section(schema, target["properties"], default, inner, lines)


def _tables_of(schema: Json, spec: Json) -> dict[str, Json]:
    """The tables that a field may be, by their ``kind``; empty for a value."""
    options = [spec, *spec.get("anyOf", ()), *spec.get("allOf", ()), *spec.get("oneOf", ())]
    tables = [schema["$defs"][option["$ref"].rsplit("/", 1)[1]] for option in options if "$ref" in option]
    return {table["properties"].get("kind", {}).get("const", ""): table for table in tables}


def _defaults(schema: Json, table: Json) -> Json:
    values: dict[str, Any] = {}
    for field, spec in table["properties"].items():
        tables = _tables_of(schema, spec)
        values[field] = spec.get("default", _defaults(schema, next(iter(tables.values()))) if tables else None)
    return values


def _type(spec: dict[str, Any]) -> str:
    if "enum" in spec:
        return " or ".join(f"`{value}`" for value in spec["enum"])
    if "const" in spec:
        return f"`{spec['const']}`"
    if "anyOf" in spec:
        return " or ".join(_type(one) for one in spec["anyOf"])
    return str(spec.get("type", "any"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")  # noqa: T201  (its output is the document)
