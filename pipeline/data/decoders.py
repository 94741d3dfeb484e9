"""Processes that decode and resize pictures beside the downloads.

A decoder is a program of its own (``python -m pipeline.data.decoders``) that decodes one picture at a time: the
downloads never wait for a picture, several are decoded at once, and a picture that takes its decoder down costs one
row. The memory of a decoder is limited, and so is its time for a picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import logging
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from pipeline.allocator import keep_freed_memory
from pipeline.data.bodies import Body
from pipeline.data.causes import FetchError
from pipeline.data.resize import Boxes, Resizer, StoredPicture
from pipeline.errors import StepError
from pipeline.pictures.read import MAX_MEMORY_BYTES, PictureError
from pipeline.recipe.sections import DownloadConfig

Size = tuple[int, int]
"""Width and height, in pixels."""
Read = Callable[[], bytes]
"""Reads a picture's file; called when its turn has come, so that few are in memory."""

_LIMIT_S = 60.0
_TRIES, _STARTS = 2, 3
_PAUSE_S = 2.0
"""Before a process that does not start is started again; twice as long before the last time."""
_PICTURES_AT_ONCE = 2
_OOM_SCORE = b"800"
_SPARE_BYTES, _KEPT_BYTES = 256 << 20, 64 << 20
_PIPE_BYTES = 1 << 20
"""A picture passes in one piece, so that each side is woken once for it."""
_MEASURE = b"null"
"""Facts of a picture that is stored as it is."""
_HEADER = struct.Struct("<QQQ")
"""Of a message: number of the picture, bytes of its facts (JSON), bytes of the picture."""


class Decoders:
    """A few decoders; use it inside ``async with``.

    Args:
        config: The recipe's section.
        count: Number of processes.
    """

    def __init__(self, config: DownloadConfig, count: int) -> None:
        self._config = config
        self._count = count
        self._free: asyncio.Queue[_Decoder] = asyncio.Queue()

    async def __aenter__(self) -> Decoders:
        self._all = [_Decoder(self._config) for _ in range(self._count)]
        for decoder in self._all * _PICTURES_AT_ONCE:
            self._free.put_nowait(decoder)
        await asyncio.gather(*(decoder.start() for decoder in self._all))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(decoder.stop() for decoder in self._all))

    async def store(self, body: Body, boxes: Boxes = (), checksum: str = "") -> StoredPicture:
        """What ``Resizer.store`` makes of a downloaded file, in the next free process.

        Raises:
            FetchError: As ``Resizer.store``; or of class ``killer`` if the picture took two decoders down, or one for
                longer than a minute.
            PictureError: As ``Resizer.store``.
        """
        return await self._ask(json.dumps([boxes, checksum]).encode(), body.read)

    async def measure(self, read: Read) -> Size:
        """What ``Resizer.measure`` says of a file, in the next free process.

        Raises:
            FetchError: Of class ``killer``, as ``store``.
            PictureError: As ``Resizer.measure``.
        """
        measured = await self._ask(_MEASURE, read)
        return measured.width, measured.height

    async def _ask(self, facts: bytes, read: Read) -> StoredPicture:
        decoder = await self._free.get()
        try:
            return await decoder.ask(facts, read())
        finally:
            self._free.put_nowait(decoder)


class Measures:
    """Decodes pictures that are stored as they are, for a caller that is no coroutine; use it in a ``with`` block.

    A worker has a decoder for each of its processors. A picture may take the memory that every later reader gives it:
    nothing makes it smaller.

    Args:
        config: The recipe's section; its memory of a picture is that of downloads, which resize.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self._count = max(1, int(config.resources.cpus_per_worker))
        self._decoders = Decoders(replace(config, blur_column="", max_memory_bytes=MAX_MEMORY_BYTES), self._count)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Measures:
        self._runner.run(self._decoders.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._decoders.__aexit__())
        self._runner.close()

    def sizes(self, reads: Sequence[Read]) -> list[Size | FetchError | PictureError]:
        """Width and height of files, or why one cannot be decoded, in their order.

        Raises:
            StepError: If no decoder can be started.
        """
        return self._runner.run(self._sizes(reads))

    async def _sizes(self, reads: Sequence[Read]) -> list[Size | FetchError | PictureError]:
        sizes, waiting = dict[int, Size | FetchError | PictureError](), iter(enumerate(reads))

        async def measure() -> None:
            for number, read in waiting:
                try:
                    sizes[number] = await self._decoders.measure(read)
                except (FetchError, PictureError) as error:
                    sizes[number] = error

        tasks = [asyncio.create_task(measure()) for _ in range(self._count * _PICTURES_AT_ONCE)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [sizes[number] for number in range(len(reads))]


class _Decoder:
    """One process. It gets its next picture while it decodes one, so that it never waits; it answers in order."""

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self._requests: asyncio.StreamWriter | None = None
        self._turn = asyncio.Lock()
        self._numbers = itertools.count(1)
        """Of pictures."""
        self._asked: dict[int, tuple[bytes, bytes]] = {}
        """Facts and file of each picture without an answer, in the order of their turns."""
        self._is_ready = False
        """Whether the process has, or gets as they come, all pictures in ``_asked``."""

    async def start(self) -> None:
        """Start the process, send it the recipe's section, wait until it is ready, and send it what was asked.

        Raises:
            StepError: If it cannot be started, or ends before it is ready, again and again.
        """
        reason = ""
        for number in range(_STARTS):
            await asyncio.sleep(number * _PAUSE_S)  # the machine may be short of memory or processes for a moment
            try:
                await self._launch()
                self._write(0, b"", pickle.dumps(self._config))
                await self._read(_HEADER.size)
                self._is_ready = True
                for asked, (facts, data) in self._asked.items():
                    self._write(asked, facts, data)
            except (OSError, asyncio.IncompleteReadError) as error:
                status = await self.stop()
                reason = str(error) if status is None else f"status {status}"
            else:
                return
        raise StepError(f"download: a process that decodes pictures does not start ({reason}); see its log")

    async def _launch(self) -> None:
        with contextlib.ExitStack() as stack:
            # A pair of our own, because uvloop, which Ray's workers take, does not show the one that it makes.
            ours, theirs = map(stack.enter_context, socket.socketpair())
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIPE_BYTES)
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "pipeline.data.decoders",
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.PIPE,
                cwd=Path(__file__).parents[2],
            )
            theirs.close()
            _, self._requests = await asyncio.open_unix_connection(sock=ours)
            stack.pop_all()

    async def stop(self) -> int | None:
        """End the process; returns its exit status."""
        self._is_ready = False
        self._kill()
        process, self._process = self._process, None
        requests, self._requests = self._requests, None
        if requests is not None:
            requests.close()
        return None if process is None else await process.wait()

    async def ask(self, facts: bytes, data: bytes) -> StoredPicture:
        """Send a picture, and wait for its answer after those of the pictures before it.

        A picture whose process ends is sent to the next one at once, before the pictures that wait behind it: only
        the picture that is being decoded loses a try.

        Args:
            facts: Boxes to blur and its checksum, as JSON.
            data: The downloaded file.

        Raises:
            FetchError: As ``Decoders.store``.
            PictureError: As ``Decoders.store``.
        """
        number = next(self._numbers)
        self._asked[number] = (facts, data)
        if self._is_ready:
            self._write(number, facts, data)
        try:
            async with self._turn:  # its queue is in the order of ``_asked``: nothing is awaited in between
                return await self._wait(number)
        except asyncio.CancelledError:
            self._is_ready = False  # its answer would be taken for that of the next picture
            self._kill()
            raise
        finally:
            del self._asked[number]

    async def _wait(self, number: int) -> StoredPicture:
        num_lost = 0
        while True:
            if not self._is_ready:
                await self.stop()
                await self.start()
            try:
                async with asyncio.timeout(_LIMIT_S):
                    return await self._answer(number)
            except TimeoutError:
                await self.stop()
                raise FetchError("killer", f"decoding took longer than {_LIMIT_S:.0f} s") from None
            except (OSError, asyncio.IncompleteReadError):
                if not self._is_ready:  # ended because another picture was cancelled
                    continue
                status, num_lost = await self._end(), num_lost + 1
                if num_lost == _TRIES:
                    raise FetchError("killer", f"its decoder ended with status {status}") from None

    async def _end(self) -> int | None:
        """End a process that does not answer; returns its exit status, its own if it ended by itself."""
        process, status = self._process, None
        if process is not None:
            with contextlib.suppress(TimeoutError):
                status = await asyncio.wait_for(process.wait(), 0.2)
        stopped = await self.stop()
        return stopped if status is None else status

    async def _answer(self, number: int) -> StoredPicture:
        answered, num_facts, num_bytes = _HEADER.unpack(await self._read(_HEADER.size))
        answer = json.loads(await self._read(num_facts))
        data = await self._read(num_bytes)
        if answered != number:
            raise OSError("an answer to another picture")
        if "cause" in answer:
            raise FetchError(answer["cause"], answer["detail"])
        if "reason" in answer:
            raise PictureError("download", answer["reason"], answer["detail"])
        return StoredPicture(data=data, **answer)

    async def _read(self, num_bytes: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        return await self._process.stdout.readexactly(num_bytes)

    def _write(self, number: int, facts: bytes, data: bytes) -> None:
        assert self._requests is not None
        self._requests.write(_message(number, facts, data))

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _message(number: int, facts: bytes, data: bytes) -> bytes:
    return b"".join((_HEADER.pack(number, len(facts), len(data)), facts, data))


def _answer(resizer: Resizer, facts: bytes, data: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        stored = resizer.measure(data) if facts == _MEASURE else resizer.store(data, *json.loads(facts))
    except FetchError as error:
        return {"cause": error.cause, "detail": error.detail}, b""
    except PictureError as error:
        return {"reason": error.reason, "detail": error.detail}, b""
    except MemoryError:
        return {"reason": "image needs too much memory", "detail": ""}, b""
    values = vars(stored).copy()
    return values, values.pop("data")


def _read_message(stream: IO[bytes]) -> tuple[int, bytes, bytes] | None:
    """The next message of the parent: number, facts and picture; None if it has ended."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    number, num_facts, num_bytes = _HEADER.unpack(header)
    facts, data = stream.read(num_facts), stream.read(num_bytes)
    return (number, facts, data) if len(data) == num_bytes else None


def _limit_memory(config: DownloadConfig) -> None:
    """Refuse memory beyond what a picture may take, and be the first that the system ends if memory is short."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + config.max_memory_bytes + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_bytes(_OOM_SCORE)


def main() -> int:
    """Serve the parent until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end is noticed here
    logging.getLogger("exifread").setLevel(logging.CRITICAL)
    requests, answers = os.fdopen(os.dup(0), "rb", _PIPE_BYTES), os.fdopen(os.dup(1), "wb", _PIPE_BYTES)
    with contextlib.suppress(OSError):  # a user has only so much of it
        fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    message = _read_message(requests)
    if message is None:
        return 0
    config: DownloadConfig = pickle.loads(message[2])
    resizer = Resizer(config)
    keep_freed_memory(_KEPT_BYTES)
    _limit_memory(config)
    os.dup2(quiet, 2)  # libtiff and libpng write a line for every damaged picture
    os.dup2(quiet, 1)
    answers.write(_message(0, b"", b""))
    answers.flush()
    while (message := _read_message(requests)) is not None:
        number, facts, picture = message
        values, data = _answer(resizer, facts, picture)
        answers.write(_message(number, json.dumps(values).encode(), data))
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
