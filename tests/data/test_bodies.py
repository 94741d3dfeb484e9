"""Bodies whose content encoding is undone, however they come."""

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data.bodies import read_body
from pipeline.data.causes import FetchError
from pipeline.data.opt_outs import parse_robots

_TEXT = b"User-agent: *\nDisallow: /private/\n"
_RAW = zlib.compressobj(wbits=-zlib.MAX_WBITS)
_BODIES = {
    ("gzip", "gzip"): gzip.compress(_TEXT),
    ("x-gzip", "gzip"): gzip.compress(_TEXT),
    ("gzip", "no gzip"): _TEXT,
    ("deflate", "zlib"): zlib.compress(_TEXT),
    ("deflate", "raw"): _RAW.compress(_TEXT) + _RAW.flush(),
    ("identity", "text"): _TEXT,
}


def _read(encoding: str, pieces: Sequence[bytes], max_bytes: int = 1000, *, is_cut: bool = False) -> bytes:
    async def iter_any() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def read() -> bytes:
        content = SimpleNamespace(iter_any=iter_any)
        response: Any = SimpleNamespace(content_length=None, headers={"Content-Encoding": encoding}, content=content)
        with await read_body(response, max_bytes, is_cut=is_cut) as body:
            return body.read()

    return asyncio.run(read())


@pytest.mark.parametrize(("encoding", "kind"), _BODIES)
def test_a_body_is_the_same_wherever_it_is_cut(encoding: str, kind: str) -> None:
    body = _BODIES[encoding, kind]
    for first in range(1, len(body)):
        assert _read(encoding, [body[:first], body[first:]]) == _TEXT, first
    assert _read(encoding, [bytes([value]) for value in body]) == _TEXT


def test_the_rules_of_a_robots_txt_in_small_pieces_hold() -> None:
    data = _read("gzip", [bytes([value]) for value in _BODIES["gzip", "gzip"]])
    assert not parse_robots(data, "unclip").allows("/private/1.jpg")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_a_body_without_bytes_is_empty(encoding: str) -> None:
    assert _read(encoding, []) == b""


def test_a_body_of_one_byte_is_what_it_is() -> None:
    assert _read("gzip", [b"x"]) == b"x"
    assert _read("identity", [b"x"]) == b"x"
    with pytest.raises(FetchError, match="body-cut"):
        _read("deflate", [b"x"])


def test_an_unknown_encoding_is_refused_at_the_first_byte() -> None:
    with pytest.raises(FetchError, match="encoding"):
        _read("br", [b"x"])


def test_a_body_in_small_pieces_has_its_limit() -> None:
    pieces = [bytes([value]) for value in gzip.compress(bytes(5000))]
    assert _read("gzip", pieces, is_cut=True) == bytes(1000)
    with pytest.raises(FetchError, match="body-size"):
        _read("gzip", pieces)
