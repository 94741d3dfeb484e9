"""Decoding of stored pictures and tokenising of captions, ahead of the network, in threads or in other processes.

A process reads chunks from its standard input, with the pictures still encoded in their
tar, and leaves pixels in memory that it shares with the process that started it. It ends with its input, so it does not
outlive that process, whatever ends that one.
"""

import mmap
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.allocator import keep_freed_memory
from pipeline.clip.files import load_inputs
from pipeline.clip.inputs import ClipInputs
from pipeline.data.shards import ShardPictures
from pipeline.errors import DataError
from pipeline.pictures.frame import Pixels
from pipeline.pictures.read import PictureError, decode

CHUNK_ROWS = 64
"""Rows that are decoded at a time."""
_NUM_THREADS = 2  # decoding takes a few hundredths of the time of a network on the CPU
_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """Rows of one shard, with their pictures still encoded; at most ``CHUNK_ROWS``."""

    pictures: ShardPictures
    keys: list[str]
    uids: list[str]
    captions: list[str]


@dataclass(frozen=True)
class DecodedChunk:
    """What the network reads of a chunk; N rows have a picture that can be read."""

    pixels: Pixels
    """(N, px, px, 3), framed as CLIP's own preprocessing does."""
    tokens: NDArray[np.int32]
    """(N, L)."""
    good: list[int]
    """Numbers of these rows in the chunk."""
    failures: dict[int, tuple[str, str]]
    """Reason and detail of the other rows."""


class Decoders(Protocol):
    """Decodes chunks in the background."""

    num_ahead: int
    """Chunks that are decoded before their shard waits for the network."""

    def submit(self, chunk: Chunk) -> Callable[[], DecodedChunk]:
        """Begin to decode a chunk; returns a function that waits for it and raises what the decoding raised."""
        ...


class ThreadDecoders:
    """Decodes in threads of this process: enough for a network on the CPU."""

    num_ahead = 2 * _NUM_THREADS

    def __init__(self, inputs: ClipInputs) -> None:
        self._inputs = inputs
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="decode")

    def submit(self, chunk: Chunk) -> Callable[[], DecodedChunk]:
        """See ``Decoders``."""
        return self._threads.submit(decode_chunk, self._inputs, chunk).result


class ProcessDecoders:
    """Decodes in other processes, for a GPU: in threads, Python would decode one picture at a time for much of it.

    Args:
        folder: The CLIP's folder.
        num_processes: Number of processes.
    """

    def __init__(self, folder: Path, num_processes: int) -> None:
        self.num_ahead = num_processes + 2
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._idle.put(_Process(folder))

    def submit(self, chunk: Chunk) -> Callable[[], DecodedChunk]:
        """See ``Decoders``."""
        return self._threads.submit(self._decode, chunk).result

    def close(self) -> None:
        """End the processes; no chunk may be on its way."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().end()

    def _decode(self, chunk: Chunk) -> DecodedChunk:
        process = self._idle.get()
        try:
            return process.decode(replace(chunk, pictures=chunk.pictures.part(chunk.keys)))
        finally:
            self._idle.put(process)


def decode_chunk(inputs: ClipInputs, chunk: Chunk) -> DecodedChunk:
    """Decode the pictures of a chunk and tokenise its captions.

    Raises:
        DataError: If a row has no picture in the tar, or another row's; names shard, key and uid.
    """
    squares: list[Pixels] = []
    good: list[int] = []
    failures: dict[int, tuple[str, str]] = {}
    for row, (key, uid) in enumerate(zip(chunk.keys, chunk.uids, strict=True)):
        data = chunk.pictures.read(key, uid)
        try:
            squares.append(inputs.framing(decode(data, where=uid)))
            good.append(row)
        except PictureError as error:
            failures[row] = (error.reason, error.detail)
    side_px = inputs.framing.side_px
    pixels = np.stack(squares) if squares else np.zeros((0, side_px, side_px, 3), np.uint8)
    captions = [chunk.captions[row] for row in good]
    tokens = inputs.tokenize(captions).numpy() if captions else np.zeros((0, inputs.context_length))
    return DecodedChunk(pixels, tokens.astype(np.int32), good, failures)


class _Process:
    """One decoding process; one thread at a time may use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        side_px = load_inputs(folder).framing.side_px
        self._shape = (CHUNK_ROWS, side_px, side_px, 3)
        self._file = os.memfd_create("unclip-pixels")  # not in /dev/shm, which is small in a container
        self._pixels = _share_pixels(self._file, self._shape)
        self._process = self._start()

    def decode(self, chunk: Chunk) -> DecodedChunk:
        """Decode a chunk; a process that died is replaced once.

        Raises:
            DataError: See ``decode_chunk``; or if the process died twice.
        """
        try:
            result = self._ask(chunk)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.end()
            self._process = self._start()
            try:
                result = self._ask(chunk)
            except (EOFError, OSError, pickle.UnpicklingError):
                raise DataError(
                    f"{chunk.pictures.where(chunk.keys[0], chunk.uids[0])}: the process that decodes pictures died "
                    f"twice at this row or the {len(chunk.keys) - 1} after it (too little memory?)"
                ) from None
        if isinstance(result, Exception):
            raise result
        return replace(result, pixels=self._pixels[: len(result.good)].copy())

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, chunk: Chunk) -> DecodedChunk | Exception:
        questions, answers = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        pickle.dump(chunk, questions)
        questions.flush()
        return pickle.load(answers)

    def _start(self) -> "subprocess.Popen[bytes]":
        # Not with -m: the classes of a module that runs as a program have other names, and pickle goes by names.
        code = f"import sys, {__name__} as module; module.serve(sys.argv[1], int(sys.argv[2]))"
        arguments = [sys.executable, "-c", code, str(self._folder), str(self._file)]
        changes = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._file],
            env=os.environ | changes | {"CUDA_VISIBLE_DEVICES": ""},
        )


def _share_pixels(file: int, shape: tuple[int, ...]) -> Pixels:
    """An array on the memory of a file."""
    num_bytes = int(np.prod(shape))
    os.ftruncate(file, num_bytes)
    return np.frombuffer(mmap.mmap(file, num_bytes), np.uint8).reshape(shape)


def serve(folder: str, file: int) -> None:
    """Decode the chunks on standard input until it ends: what a process of ``ProcessDecoders`` does.

    Args:
        folder: The CLIP's folder.
        file: Descriptor of the memory that the pixels are left in.
    """
    answers: Any = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may come between the answers
    torch.set_num_threads(1)
    keep_freed_memory(_KEPT_BYTES)
    inputs = load_inputs(Path(folder))
    side_px = inputs.framing.side_px
    pixels = _share_pixels(file, (CHUNK_ROWS, side_px, side_px, 3))
    while True:
        try:
            chunk: Chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = decode_chunk(inputs, chunk)
            pixels[: len(result.good)] = result.pixels
            answer: DecodedChunk | Exception = replace(result, pixels=result.pixels[:0])
        except Exception as error:  # noqa: BLE001  (raised again in the process that asked)
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
