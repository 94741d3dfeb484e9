"""Parts that all routes share: errors in OpenAI's form, body limits and clients that disconnect."""

import asyncio
import json
import math
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pipeline.serve.held import note_body
from pipeline.serve.protocols import DeadlinePassed, NotServing, OtherNetworks, Overloaded

Json = dict[str, Any]
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_RETRY_AFTER_S = 2
"""Where nothing better is known."""
_SWAPPED_S = 1
"""After a swap: what is served by now answers at once."""
_CLIENT_CLOSED_STATUS = 499
_MAX_ESCAPES = 1 << 20  # of strings: the parser takes 30 ns for each; PHP writes a slash of base64 as one
_MAX_SHOWN_CHARS = 60
"""Of a wrong value that an error repeats."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""Of every answer, unless it has its own."""
_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error answer in the form of OpenAI's API.

    Args:
        status: HTTP status.
        message: What is wrong and what to do.
        param: The wrong field.
        code: Short name for programs.
        retry_after_s: For 429 and 503: when to come back, in seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float = _RETRY_AFTER_S,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))} if self.status in {429, 503} else {}
        if self.status == 504:
            headers["X-Should-Retry"] = "false"  # OpenAI's client would ask again at once
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": error}, self.status, headers)


def server_event(name: str, data: Json) -> str:
    """One event of a stream."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


def error_event(message: str, kind: str, code: str) -> str:
    """The last event of a stream that fails: its status has been sent already.

    Args:
        message: What is wrong.
        kind: ``type`` of the error in OpenAI's form.
        code: Short name for programs.
    """
    return server_event("error", {"error": {"message": message, "type": kind, "code": code}})


def install_error_handlers(app: FastAPI) -> None:
    """Give every error, the framework's own too, OpenAI's form."""

    async def on_api_error(_: Request, error: Exception) -> JSONResponse:
        return cast("ApiError", error).response()

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        status = cast("HTTPException", error).status_code
        what, path = f"{request.method} {request.url.path}", request.url.path
        if status == 404:
            near = {f"/v1{path}", path.removeprefix("/v1")} & set(app.openapi()["paths"]) - {path}
            hint = f"; do you mean {near.pop()}? OpenAI's client takes a base_url that ends with /v1" if near else ""
            return ApiError(404, f"no such route: {what}{hint}", code="unknown_url").response()
        headers = cast("HTTPException", error).headers or {}
        if status == 405:
            message, code = f"{what}: this route takes {headers['Allow']}", "method_not_allowed"
        else:
            message, code = f"{what}: {cast('HTTPException', error).detail}", None
        response = ApiError(status, message, code=code).response()
        response.headers.update(headers)
        return response

    async def on_overload(_: Request, error: Exception) -> JSONResponse:
        wait_s = cast("Overloaded", error).retry_after_s or _RETRY_AFTER_S
        return ApiError(429, f"{error}; try again later", code="overloaded", retry_after_s=wait_s).response()

    async def on_absence(_: Request, error: Exception) -> JSONResponse:
        wait_s = _SWAPPED_S if isinstance(error, OtherNetworks) else _RETRY_AFTER_S
        return ApiError(503, f"{error}; try again shortly", code="not_ready", retry_after_s=wait_s).response()

    async def on_end(_: Request, error: Exception) -> JSONResponse:
        return ApiError(504, f"timeout: {error}", param="timeout", code="deadline_exceeded").response()

    async def on_bug(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"{type(error).__name__}: see the server's log", code="internal_error").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Overloaded, on_overload)
    app.add_exception_handler(NotServing, on_absence)
    app.add_exception_handler(DeadlinePassed, on_end)
    app.add_exception_handler(Exception, on_bug)


async def read_body(request: Request, limit_bytes: int) -> AsyncGenerator[bytes]:
    """The body in chunks, up to a limit.

    Raises:
        ApiError: 413 above it; 499 if the client leaves before the end, which nobody reads.
        Overloaded: If the bodies of the other requests under way leave no room for it.
    """
    too_large = ApiError(413, f"the body is above {limit_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit_bytes:
        raise too_large
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > limit_bytes:
                raise too_large
            note_body(request, num_bytes)
            yield chunk
    except ClientDisconnect:
        raise _client_left() from None


async def read_json(request: Request, limit_bytes: int, max_values: int | None = None) -> Json:
    """The body as a JSON object; its content type is ignored.

    Args:
        request: The request.
        limit_bytes: Largest body.
        max_values: Most values in lists and objects; they are counted before they are made, because an empty list takes
            3 bytes here and 64 in memory. None: as many as there are bytes.

    Raises:
        ApiError: 413 above a limit, 400 if it is not a JSON object.
    """
    body = bytearray()
    async for chunk in read_body(request, limit_bytes):
        body += chunk
    if max_values is not None and body.count(b",") > max_values:
        raise ApiError(413, f"the body has more than {max_values} values", code="body_too_large")
    has_escapes = b"\\" in body  # a search for one byte takes a tenth of one for two
    if has_escapes and max_values is not None and body.count(b"\\") > _MAX_ESCAPES:
        raise ApiError(413, f"the body has more than {_MAX_ESCAPES} backslashes", code="body_too_large")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        is_form = request.headers.get("content-type", "").startswith(("multipart/", "application/x-www-form"))
        reason = "a form came" if is_form else str(error) if isinstance(error, json.JSONDecodeError) else "unreadable"
        message = f'the body is not JSON ({reason}); send an object, such as {{"prompt": "a red star"}}'
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if has_escapes and (b"\\ud" in body or b"\\uD" in body):
        _require_whole_characters(value)
    return cast("Json", value)


def _require_whole_characters(value: Any) -> None:
    """Refuse half of a character (half an emoji, as a cut leaves it): no file and no answer could hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = repr(error.object[error.start])
        raise ApiError(400, f"the body has half of a character, {half}", code="invalid_json") from None


def parse(model: type[Model], body: Mapping[str, Any], *, is_form: bool = False) -> Model:
    """Validate the body as a ``model``; the values of a form are texts.

    Raises:
        ApiError: 400; names the first wrong field.
    """
    try:
        return model.model_validate_strings(body) if is_form else model.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, model) from None


def _refusal(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """What is wrong with a body, which may be large: nothing that outlives the answer refers to it.

    Without the context: a validator's own error leads by its frames to who keeps it, so that 24 MB would stay until the
    next search for such circles.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter: {param}{_similar(str(param), model)}"
        return ApiError(400, message, param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is required", param=param, code="missing_parameter")
    message, value = first["msg"].removeprefix("Value error, "), first["input"]
    if message.startswith("Input should") and isinstance(value, str | int | float):
        message = f"{message}, got {_shortened(value)}"
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def _shortened(value: str | float) -> str:
    """A wrong value as an error repeats it."""
    text = repr(value[:_MAX_SHOWN_CHARS] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


def _similar(param: str, model: type[BaseModel]) -> str:
    """The field that is meant by another name, if one is similar."""
    names, short = list(model.model_fields), param[:_MAX_SHOWN_CHARS]
    near = [name for name in names if short in name] or get_close_matches(short, names, n=1)
    return f"; do you mean {near[0]}?" if near else ""


def request_id_of(headers: Headers) -> str:
    """The id of a request: the client's own, if it sends one, or a new one."""
    own = headers.get("x-request-id", "")
    return own if _REQUEST_ID.fullmatch(own) else uuid.uuid4().hex


def add_headers(answer: MutableHeaders, request_id: str) -> None:
    """Give an answer the headers that all have."""
    for name, value in _HEADERS.items():
        answer.setdefault(name, value)
    answer["X-Request-Id"] = request_id


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Wait for ``work``, and cancel it as soon as the client disconnects.

    Raises:
        ApiError: 499, if the client has disconnected; nobody reads it.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            leaving.result()
            raise _client_left()
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def _until_disconnected(request: Request) -> None:
    """Wait until the client of a request whose body was read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _client_left() -> ApiError:
    return ApiError(_CLIENT_CLOSED_STATUS, "the client has disconnected")
