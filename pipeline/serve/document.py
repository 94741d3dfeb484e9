"""What the OpenAPI document says of the routes, whose bodies the server reads and checks itself, before any parsing."""

from typing import Any, cast

from pydantic import BaseModel

Json = dict[str, Any]

_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS: dict[int | str, Json] = {
    "4XX": {
        "description": "Refused: what is wrong, and with which field",
        "content": {"application/json": {"schema": _ERROR}},
    },
    503: {"description": "Not ready; with Retry-After", "content": {"application/json": {"schema": _ERROR}}},
}
"""The answers that every route may give beside its own."""
IN_TIME: dict[int | str, Json] = {
    **ERRORS,
    504: {"description": "Not finished within its timeout", "content": {"application/json": {"schema": _ERROR}}},
}
"""Those of a route whose body may have a timeout."""
_EVENT: Json = {
    "type": "object",
    "description": "Each of the events",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_STREAM: Json = {"text/event-stream": {"schema": _EVENT}}
_FILE: Json = {f"image/{form}": {"schema": {"type": "string", "format": "binary"}} for form in ("png", "jpeg", "webp")}
PICTURES: dict[int | str, Json] = {
    200: {
        "description": "Pictures as JSON, as events, or one as a file",
        "content": {"application/json": {}} | _STREAM | _FILE,
    },
    **IN_TIME,
}
"""The answers of a route for pictures."""


def json_body(body: type[BaseModel]) -> Json:
    """A route that reads a JSON object."""
    return _body("application/json", body.model_json_schema())


def form_body(body: type[BaseModel], num_pictures: int, *, takes_mask: bool) -> Json:
    """A route that reads a form with files.

    Args:
        body: Its texts.
        num_pictures: Files of the field ``image``, or ``image[]`` if there are several.
        takes_mask: Whether ``mask`` is another file.
    """
    file: Json = {"type": "string", "format": "binary"}
    schema = body.model_json_schema()
    pictures = {"image": file} if num_pictures == 1 else {"image[]": _list_of(file, num_pictures)}
    properties = cast("Json", schema["properties"]) | pictures | ({"mask": file} if takes_mask else {})
    required = [*schema.get("required", []), *pictures]
    return _body("multipart/form-data", schema | {"properties": properties, "required": required})


def _list_of(item: Json, number: int) -> Json:
    return {"type": "array", "items": item, "minItems": number, "maxItems": number}


def _body(media_type: str, schema: Json) -> Json:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
