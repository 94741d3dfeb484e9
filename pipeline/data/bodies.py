"""Bodies of answers: read up to a limit, their content encoding undone, and kept on the disk where they are large."""

from __future__ import annotations

import contextlib
import errno
import tempfile
import zlib
from collections.abc import AsyncGenerator
from typing import IO, Any

import aiohttp

from pipeline.data.causes import FetchError

Body = IO[bytes]

MEMORY_BYTES = 1 << 20
"""Part of a body that stays in memory; the rest goes to a temporary file: hundreds of bodies arrive at once."""
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors of the temporary file: no fault of the row."""
_GZIP = b"\x1f\x8b"


async def read_body(response: aiohttp.ClientResponse, max_bytes: int, *, is_cut: bool = False) -> Body:
    """The body, its content encoding undone.

    Args:
        response: The answer.
        max_bytes: Largest body, before and after its encoding is undone.
        is_cut: Whether a larger one is cut after so many bytes; else it is refused.

    Raises:
        FetchError: If it is larger, or its end or its encoding is wrong.
    """
    if (response.content_length or 0) > max_bytes and not is_cut:
        raise FetchError("body-size")
    body: Body = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
    try:
        await _copy_body(response, body, max_bytes, is_cut=is_cut)
    except BaseException:  # also a cancellation: nobody else would close the file
        body.close()
        raise
    body.seek(0)
    return body


async def _copy_body(response: aiohttp.ClientResponse, body: Body, max_bytes: int, *, is_cut: bool) -> None:
    encoding = "".join(filter(str.isprintable, response.headers.get("Content-Encoding", ""))).strip().lower()[:40]
    is_encoded = encoding not in {"identity", "", "none"}
    decoder: Any = None
    num_bytes = 0
    async with contextlib.aclosing(_pieces(response)) as pieces:
        async for piece, is_first in pieces:
            if is_first and is_encoded:
                decoder = _decoder(encoding, piece)
            try:
                data = piece if decoder is None else decoder.decompress(piece, max_bytes + 1)
            except zlib.error:
                raise FetchError("encoding", encoding) from None
            body.write(data[: max_bytes - num_bytes])
            num_bytes += len(data)
            if num_bytes > max_bytes or (decoder is not None and decoder.unconsumed_tail):
                if is_cut:
                    return
                raise FetchError("body-size")
    if decoder is not None and not decoder.eof:
        raise FetchError("body-cut", encoding)


async def _pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[tuple[bytes, bool]]:
    """A body as it comes, and whether a piece is the first one: that has the bytes by which an encoding is known."""
    start, is_first = b"", True
    async for chunk in response.content.iter_any():
        piece = start + chunk
        if is_first and len(piece) < len(_GZIP):
            start = piece
            continue
        yield piece, is_first
        start, is_first = b"", False
    if start:
        yield start, is_first


def _decoder(encoding: str, start: bytes) -> Any:
    """What undoes a content encoding; None if the body does not have it, whatever its header says."""
    if encoding in {"gzip", "x-gzip"}:
        return zlib.decompressobj(16 + zlib.MAX_WBITS) if start.startswith(_GZIP) else None
    if encoding == "deflate":
        is_zlib = len(start) > 1 and start[0] & 15 == 8 and (start[0] << 8 | start[1]) % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
    raise FetchError("encoding", encoding)
