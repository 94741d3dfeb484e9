"""The download step: fetches the pictures of a shard, resizes them in processes of their own, writes the shard.

One event loop fetches; connections, resolved names and decoders live from shard to shard, and several shards may be
under way at once. Rows come to an end in any order; the shard is written sorted by key. A URL that stands in several
rows of a shard (one picture with several captions) is fetched once.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

import pyarrow as pa

from pipeline.data.bodies import DISK_ERRORS
from pipeline.data.causes import FetchError
from pipeline.data.connections import Connections
from pipeline.data.decoders import Decoders
from pipeline.data.fetch import Fetcher
from pipeline.data.hosts import Limits
from pipeline.data.outcomes import Failure, row_values, shard_schema
from pipeline.data.resize import Boxes, StoredPicture, read_boxes
from pipeline.data.shard_rows import stored_columns
from pipeline.data.shard_writer import (
    FAILED_TO_DOWNLOAD,
    FAILED_TO_RESIZE,
    ShardFiles,
    ShardRow,
    Span,
    key_of,
    time_of_day,
    write_shard,
)
from pipeline.data.urls import AddressRules
from pipeline.errors import UnclipError
from pipeline.pictures.read import PictureError
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.sections import DownloadConfig
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.forgotten import CAUSE

_log = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[int, Counter[str]], None]
"""Called every two seconds with the number of finished rows, and with those that failed by class."""

MEMORY_BYTES = 64 << 20
"""Part of a shard's stored pictures that stays in memory until they are written."""
_PROGRESS_S = 2.0
_LOGGED_CHARS = 1000
_LOOPBACK = "127.0.0.1/32"


def address_rules(pairs: PairsConfig, config: DownloadConfig) -> AddressRules:
    """The addresses and files that a recipe's URLs may name; also the demo's server and a folder source's pictures."""
    networks = [*config.allowed_networks, *([_LOOPBACK] if pairs.source == "drawn" else [])]
    own = [one.path if "://" in one.path else "/" for one in pairs.each()] if pairs.source == "folder" else []
    folders = [*config.allowed_folders, *own]
    return AddressRules(networks, folders)


class Downloader:
    """Downloads shards; use it in a ``with`` block. Its methods may be called from several threads.

    Args:
        config: The recipe's section.
        rules: Addresses and files that URLs may name.
        limits: Limits of hosts that several workers share; default: those of this downloader alone.
        num_decoders: Processes that decode and resize.
    """

    def __init__(
        self, config: DownloadConfig, rules: AddressRules, limits: Limits | None = None, *, num_decoders: int = 1
    ) -> None:
        self.config = config
        """The recipe's section."""
        self._rules = rules
        self._limits = limits
        self._num_decoders = num_decoders
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="downloads")
        self._stack = contextlib.AsyncExitStack()
        self._num_done = self._num_waits = 0
        self._fetch_s = 0.0
        self._unforeseen = set[str]()
        """Types of the errors that were logged."""

    def __enter__(self) -> Downloader:
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def download(
        self,
        rows: pa.Table,
        shard: str,
        files: ShardFiles,
        on_progress: OnProgress | None = None,
        *,
        first: int = 0,
    ) -> Counter[str]:
        """Download the rows of a shard and write its files.

        Args:
            rows: The rows of ``read_rows``, or some of them.
            shard: Shard name.
            files: The files to write.
            on_progress: Receives the progress.
            first: Number of the first row within its shard.

        Returns:
            Numbers of rows: ``in`` = ``ok`` + ``failed_to_download`` + ``failed_to_resize``.

        Raises:
            StepError: If the disk is full.
        """
        keys = [key_of(shard, first + row, self.config.samples_per_shard) for row in range(rows.num_rows)]
        start = time.monotonic()
        with (
            translate_os_errors(f"download: shard {shard}: {files.tar.parent}"),
            tempfile.SpooledTemporaryFile(MEMORY_BYTES) as scratch,
        ):
            result = self.fetch_rows(rows, keys, scratch, on_progress)
            schema = shard_schema(rows, self.config)
            return write_shard(result, schema, self.config.encode_format, files, start=time_of_day(start))

    def beat(self) -> int:
        """A number that grows from call to call while rows of any shard end, or wait for their host's turn."""
        self._num_waits += self._fetcher.num_waiting > 0
        return self._num_done + self._num_waits

    @property
    def busy_s(self) -> float:
        """Seconds of all URLs together, each from its connection to its stored picture or failure.

        Waits for a host's turn, and for a connection after that, are not counted.
        """
        return self._fetch_s - self._fetcher.stopped_s

    def fetch_rows(
        self, rows: pa.Table, keys: Sequence[str], scratch: IO[bytes], on_progress: OnProgress | None = None
    ) -> list[ShardRow]:
        """Fetch rows, and return them in their order.

        Args:
            rows: Rows of the pairs.
            keys: Their keys.
            scratch: File that receives the stored pictures; it must outlive the result.
            on_progress: Receives the progress.

        Raises:
            OSError: If the disk is full.
        """
        return self._run(self._fetch_rows(rows, keys, scratch, on_progress))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also Ctrl-C, which reaches this thread and not the loop's
            future.cancel()
            raise

    async def _open(self) -> None:
        config = self.config
        self._connections = Connections(config.resources.num_connections)
        self._decoders = await self._stack.enter_async_context(Decoders(config, self._num_decoders))
        fetcher = Fetcher(config, self._rules, self._limits, self._connections)
        self._fetcher = await self._stack.enter_async_context(fetcher)

    async def _fetch_rows(
        self, rows: pa.Table, keys: Sequence[str], scratch: IO[bytes], on_progress: OnProgress | None
    ) -> list[ShardRow]:
        same: defaultdict[_Request, list[int]] = defaultdict(list)
        for row, request in enumerate(_requests(rows, self.config)):
            same[request].append(row)
        stored = stored_columns(rows, self.config).to_pylist()
        results: list[ShardRow | None] = [None] * len(stored)
        causes: Counter[str] = Counter()

        async def work(request: _Request, numbers: list[int]) -> None:
            async with self._connections:
                start = time.monotonic()
                outcome = await self._fetch_one(request)
                self._fetch_s += time.monotonic() - start
            picture = _append(scratch, outcome.data) if isinstance(outcome, StoredPicture) else None
            for number in numbers:
                values = row_values(stored[number], keys[number], outcome, self.config)
                results[number] = ShardRow(values, picture)
            if isinstance(outcome, Failure):
                causes[outcome.cause] += len(numbers)
            self._num_done += len(numbers)

        tasks = [asyncio.create_task(work(request, numbers)) for request, numbers in same.items()]
        if tasks and on_progress is not None:
            tasks.append(asyncio.create_task(_report(results, causes, tasks[:], on_progress)))
        try:
            await asyncio.gather(*tasks)
        except BaseException:  # also a cancellation: no task may outlive the shard
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return cast("list[ShardRow]", results)

    async def _fetch_one(self, request: _Request) -> StoredPicture | Failure:
        """Fetch and store a picture; nothing that a row or a host brings ends the shard.

        Raises:
            UnclipError: If no row can be fetched: a store has no credentials, decoders do not start.
            OSError: If the disk is full.
        """
        try:
            return await self._fetch_and_store(request)
        except UnclipError:
            raise
        except Exception as error:  # each such row would end its shard at every run, and with it the step
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            kind = type(error).__name__
            if kind not in self._unforeseen:
                self._unforeseen.add(kind)
                _log.warning(
                    "%s: unforeseen, so its row is left out; the next of its kind are not logged",
                    request.url[:_LOGGED_CHARS],
                    exc_info=error,
                )
            return Failure(FAILED_TO_DOWNLOAD, "other", f"other: {kind}")

    async def _fetch_and_store(self, request: _Request) -> StoredPicture | Failure:
        if not request.url:  # every pair has a URL, until it is forgotten
            return Failure(FAILED_TO_DOWNLOAD, CAUSE, CAUSE)
        if request.boxes is None:  # a face that the list wants blurred must not be stored as it is
            return Failure(FAILED_TO_DOWNLOAD, "boxes", "boxes")
        try:
            body = await self._fetcher.fetch(request.url)
        except FetchError as error:
            return Failure(FAILED_TO_DOWNLOAD, error.cause, str(error))
        with body:
            try:
                return await self._decoders.store(body, request.boxes, request.checksum)
            except FetchError as error:
                status = FAILED_TO_DOWNLOAD if error.cause == "hash" else FAILED_TO_RESIZE
                return Failure(status, error.cause, str(error))
            except PictureError as error:
                return Failure(FAILED_TO_RESIZE, error.reason, error.reason)


@dataclass(frozen=True)
class _Request:
    """What is fetched; rows with equal requests share one."""

    url: str
    boxes: Boxes | None
    """None: they are malformed."""
    checksum: str


async def _report(
    results: Sequence[ShardRow | None], causes: Counter[str], tasks: Sequence[asyncio.Task[None]], call: OnProgress
) -> None:
    is_last = False
    while not is_last:
        await asyncio.wait(tasks, timeout=_PROGRESS_S)
        is_last = all(task.done() for task in tasks)
        done = sum(row is not None for row in results)
        await asyncio.to_thread(call, done, causes.copy())


def _append(scratch: IO[bytes], data: bytes) -> Span:
    offset = scratch.seek(0, io.SEEK_END)
    scratch.write(data)
    return Span(scratch, offset, len(data))


def _requests(rows: pa.Table, config: DownloadConfig) -> list[_Request]:
    def values(column: str) -> list[Any]:
        return rows.column(column).to_pylist() if column else [None] * rows.num_rows

    columns = zip(rows.column("url").to_pylist(), values(config.blur_column), values(config.hash_column), strict=True)
    return [_Request(url or "", read_boxes(boxes), str(checksum or "")) for url, boxes, checksum in columns]
