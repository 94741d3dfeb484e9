"""URLs that are fetched from the servers of these tests."""

import asyncio
from collections.abc import Sequence

from pipeline.data.causes import FetchError
from pipeline.data.fetch import Fetcher
from pipeline.data.hosts import Limits
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadConfig
from tests.data.conftest import make_picture

CONFIG = DownloadConfig(timeout_s=1, deadline_s=3.5, retries=0, max_body_bytes=2_000_000)
SPARE_S = 2.0
"""How long after its deadline the last of many URLs may end, in seconds."""
NEAR = ("127.0.0.0/8",)
Names = dict[str, tuple[float, list[str]]]
"""Of the fixture ``names``: seconds until a name is resolved, and its addresses."""
PICTURE = f"{len(make_picture(0))} bytes"
"""What ``cause_of`` says of a picture."""


def fetch_all(
    urls: Sequence[str],
    config: DownloadConfig = CONFIG,
    networks: Sequence[str] = NEAR,
    *,
    folders: Sequence[str] = (),
    limits: Limits | None = None,
) -> list[bytes | FetchError]:
    """Fetch URLs at once: the bytes of each, or its error."""

    async def one(fetcher: Fetcher, url: str) -> bytes | FetchError:
        try:
            with await fetcher.fetch(url) as body:
                return body.read()
        except FetchError as error:
            return error

    async def run() -> list[bytes | FetchError]:
        async with Fetcher(config, AddressRules(networks, folders), limits) as fetcher:
            return await asyncio.gather(*(one(fetcher, url) for url in urls))

    return asyncio.run(run())


def cause_of(result: bytes | FetchError) -> str:
    """The class of a failure, or the number of bytes that came."""
    return result.cause if isinstance(result, FetchError) else f"{len(result)} bytes"
