"""Reads pictures of an object store for the download: one request a picture, whose failure has a class."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import tempfile
from collections.abc import Coroutine
from typing import Any

from pipeline.data.bodies import DISK_ERRORS, MEMORY_BYTES, Body
from pipeline.data.causes import FetchError
from pipeline.workspace.objects import ObjectStore
from pipeline.workspace.store_errors import status_of

_CHUNK_BYTES = 256 << 10
_CUT = frozenset({"ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"})
_LATE = frozenset({"ConnectTimeoutError", "ReadTimeoutError", "TimeoutError"})
_NO_CONNECTION = frozenset({"ClientConnectorError", "EndpointConnectionError"})
_LOST = frozenset({"ClientConnectionError", "ConnectionError", "HTTPClientError", "ServiceRequestError"})
_CLASSES = {"body-cut": _CUT, "timeout": _LATE, "connect": _NO_CONNECTION, "lost": _LOST}
"""Names of the drivers' errors by class: each driver has its own, and none of them need be installed."""


class StoreReader:
    """Reads files below one folder of a store.

    Args:
        folder: URI of the folder.
        num_connections: Most requests at once.
        timeout_s: Longest wait for one network operation, in seconds.

    Raises:
        ConfigError: If a package for this kind of store is missing.
    """

    def __init__(self, folder: str, num_connections: int, timeout_s: float) -> None:
        self._store = ObjectStore(folder)
        self._driver = self._store.driver(num_connections, timeout_s)

    async def read(self, name: str, max_bytes: int) -> Body:
        """One try to read a file.

        Args:
            name: Path from the folder.
            max_bytes: Largest file that is read.

        Returns:
            Its bytes as an open file, at the start; the caller closes it.

        Raises:
            FetchError: If it did not come; its class says why.
            ConfigError: If no file of the store can be read: it has no credentials, for example.
            StepError: If no file can be read because this machine's clock is wrong.
        """
        path = f"{self._store.path.rstrip('/')}/{name}"
        try:
            if not self._driver.async_impl:
                return await asyncio.to_thread(self._read_whole, path, max_bytes)
            # The driver's connections belong to its own event loop; a cancellation gets there.
            work: Coroutine[Any, Any, Body] = (
                self._stream_s3(path, max_bytes) if self._store.is_s3 else self._read_async(path, max_bytes)
            )
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._driver.loop))
        except FetchError:
            raise
        except Exception as error:  # botocore, aiohttp and other drivers each raise their own
            raise self._translated(error) from error

    async def _stream_s3(self, path: str, max_bytes: int) -> Body:
        """A GET whose body goes to the disk as it comes, where it is large; one that is too large is not read."""
        bucket, _, key = path.partition("/")
        answer = await self._driver._call_s3("get_object", self._driver.req_kw, Bucket=bucket, Key=key)
        with contextlib.closing(answer["Body"]) as stream:
            if answer["ContentLength"] > max_bytes:
                raise FetchError("body-size")
            body: Body = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
            try:
                while data := await stream.read(_CHUNK_BYTES):
                    body.write(data)
            except BaseException:  # also a cancellation: nobody else would close the file
                body.close()
                raise
        body.seek(0)
        return body

    async def _read_async(self, path: str, max_bytes: int) -> Body:
        info = await self._driver._info(path)
        if (info.get("size") or 0) > max_bytes:
            raise FetchError("body-size")
        return _spooled(await self._driver._cat_file(path))

    def _read_whole(self, path: str, max_bytes: int) -> Body:
        if (self._driver.info(path).get("size") or 0) > max_bytes:
            raise FetchError("body-size")
        return _spooled(self._driver.cat_file(path))

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return error
        if fault := self._store.fault_of_all(error):
            return fault
        if isinstance(error, FileNotFoundError | PermissionError):
            return FetchError("file", os.strerror(errno.EACCES if isinstance(error, PermissionError) else errno.ENOENT))
        names = {cls.__name__ for cls in type(error).__mro__}
        for cause, names_of_cause in _CLASSES.items():
            if names & names_of_cause:
                return FetchError(cause)
        status = status_of(error)
        return FetchError(f"http-{status}") if status >= 400 else FetchError("other", type(error).__name__)


def _spooled(data: bytes) -> Body:
    body: Body = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115  (the caller closes it)
    body.write(data)
    body.seek(0)
    return body
