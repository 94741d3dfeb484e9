"""The OpenAPI document as a page for people: every route, and every field of its body with its limits."""

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8884; }
"""


def api_page(document: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The page, and a policy that lets it have its own style and nothing else.

    Args:
        document: OpenAPI's.
        name: Of the model.
    """
    routes = [
        _route(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}: routes</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>{escape(name)}: routes</h1>'
        '<p>Programs read <a href="/openapi.json">openapi.json</a>; <a href="/">the page</a> makes pictures.</p>'
        f"{''.join(routes)}</html>"
    )
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return page, f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; frame-ancestors 'none'"


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    title = f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
    content: Mapping[str, Any] = operation.get("requestBody", {}).get("content", {})
    return title + "".join(_fields(form, media["schema"]) for form, media in content.items())


def _fields(form: str, schema: Mapping[str, Any]) -> str:
    required = set(schema.get("required", []))
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{'required' if name in required else ''}</td>"
        f"<td>{escape(_values(field))}</td></tr>"
        for name, field in sorted(schema["properties"].items(), key=lambda item: item[0] not in required)
    ]
    return f"<p><code>{escape(form)}</code></p><table>{''.join(rows)}</table>"


def _values(schema: Mapping[str, Any]) -> str:
    """What a field may be, in words."""
    if "anyOf" in schema:
        kinds = [_values(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = "file" if schema.get("format") == "binary" else str(schema.get("type", "any"))
    if "items" in schema:
        kind = f"list of {_values(schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        kind += f", {low:g} to {high:g}"
    for key, words in (("maxLength", "at most {} characters"), ("maxItems", "at most {}")):
        kind += f", {words.format(schema[key])}" if key in schema else ""
    return kind
