"""Other processes that do the work of a worker while this one is timed: what side by side, and together, costs.

Each is a program of its own: ``python -m pipeline.timing.companion`` reads a pickled ``TrainJob`` from standard input,
or None, and the file over which its process group meets, or an empty string. It prints ``imported``, ``ready``, then
``working`` when it has taken its first step, and works until its input ends, so that it dies with the process that
started it. Without a job it prints the processor time of its start and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import StepError

if TYPE_CHECKING:
    from pipeline.train.assemble import TrainJob

_ENDED = "a second process, in which training is timed, ended before it {}; is memory short?"
_MEETING_S = 60.0
"""How long processes that are ready may take to find one another."""
_LAST_WORDS_S = 5.0
"""How long after it is missed a process may take to end."""


@contextlib.contextmanager
def companions(job: TrainJob, count: int) -> Generator[None]:
    """Let ``count`` processes train what ``job`` says inside the block."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_start(job)) for _ in range(count)]
        for child in children:
            for word in ("imported", "ready", "working"):
                _expect(child, word)
        yield


@contextlib.contextmanager
def training_together(job: TrainJob, num_workers: int) -> Generator[TrainJob]:
    """A process group of ``num_workers``, on this machine's processors; this process is its first worker.

    Yields:
        The job of this worker. The others take a step whenever it takes one.

    Raises:
        StepError: If one of the others ends inside the block.
    """
    import torch.distributed

    with tempfile.TemporaryDirectory(prefix="unclip-group-") as folder, contextlib.ExitStack() as stack:
        jobs, meeting = [replace(job, rank=rank, world_size=num_workers) for rank in range(num_workers)], f"{folder}/at"
        children = [stack.enter_context(_start(other, meeting)) for other in jobs[1:]]
        for child in children:
            for word in ("imported", "ready"):
                _expect(child, word)
        try:
            _join(jobs[0], meeting)
            yield jobs[0]
        except RuntimeError as error:  # torch's of a lost connection has no class of its own
            if _has_lost(children):
                raise StepError(_ENDED.format("had taken its steps")) from error
            raise
        finally:
            for child in children:  # first, or it says in a traceback that it has lost this process
                child.kill()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def start_of_a_process_s() -> float:
    """Processor seconds in which a worker's process starts and imports what a training needs."""
    with _start(None) as child:
        _expect(child, "imported")
        return float(child.stdout.readline()) if child.stdout is not None else 0.0


@contextlib.contextmanager
def _start(job: TrainJob | None, meeting: str = "") -> Generator[subprocess.Popen[bytes]]:
    # A recipe's relative paths start at the person's folder, so this process starts there, too; with -P it imports
    # nothing that lies there.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.timing.companion"],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the parent alone
    )
    assert child.stdin is not None
    try:
        child.stdin.write(pickle.dumps((job, meeting)))
        child.stdin.flush()
        yield child
    finally:
        child.kill()
        child.communicate()


def _expect(child: subprocess.Popen[bytes], word: str) -> None:
    assert child.stdout is not None
    line = child.stdout.readline().decode().strip()
    if line != word:
        raise StepError(_ENDED.format(f"was {word}"))


def _has_lost(children: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether a process has ended, or does so now."""
    end = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < end and all(child.poll() is None for child in children):
        time.sleep(0.05)
    return any(child.poll() is not None for child in children)


def _join(job: TrainJob, meeting: str) -> None:
    from torch.distributed import FileStore, init_process_group  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.distributed_c10d import PrefixStore

    store = FileStore(meeting, job.world_size)
    store.set(f"worker {job.rank}", "is here")
    # Connections wait for as long as a step may take; one that was lost before is to be missed earlier.
    store.wait([f"worker {rank}" for rank in range(job.world_size)], timedelta(seconds=_MEETING_S))
    init_process_group(
        "gloo",
        store=PrefixStore("group", store),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.section.resources.hang_timeout_s),
    )


def _work(requests: BinaryIO) -> None:
    importlib.import_module("pipeline.timing.pictures")  # with it, all that any worker imports
    from pipeline.timing.trainings import RehearsedTraining

    print("imported", flush=True)  # noqa: T201  (the protocol)
    job: TrainJob | None
    job, meeting = pickle.load(requests)  # from the process that started this one
    if job is None:
        print(time.process_time(), flush=True)  # noqa: T201
        return
    threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
    print("ready", flush=True)  # noqa: T201
    if meeting:
        _join(job, meeting)
    training = RehearsedTraining(job)
    training.take_step()
    print("working", flush=True)  # noqa: T201
    while True:
        training.take_step()


def _end_with(requests: BinaryIO) -> None:
    requests.read()
    os._exit(0)


if __name__ == "__main__":
    _work(sys.stdin.buffer)
