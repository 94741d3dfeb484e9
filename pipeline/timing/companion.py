"""A second process that does the work of a worker while the first one is timed: what side by side costs.

It is a program of its own: ``python -m pipeline.timing.companion`` reads a pickled ``TrainJob`` from standard input, or
None. It prints ``imported``, then ``working`` when it has taken its first step, and works until its input ends, so that
it dies with the process that started it. Without a job it prints the processor time of its start and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import StepError

if TYPE_CHECKING:
    from pipeline.train.assemble import TrainJob


@contextlib.contextmanager
def companions(job: TrainJob, count: int) -> Generator[None]:
    """Let ``count`` processes train what ``job`` says inside the block."""
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_start(job)) for _ in range(count)]
        for child in children:
            _expect(child, "imported")
            _expect(child, "working")
        yield


def start_of_a_process_s() -> float:
    """Processor seconds in which a worker's process starts and imports what a training needs."""
    with _start(None) as child:
        _expect(child, "imported")
        return float(child.stdout.readline()) if child.stdout is not None else 0.0


@contextlib.contextmanager
def _start(job: TrainJob | None) -> Generator[subprocess.Popen[bytes]]:
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
        child.stdin.write(pickle.dumps(job))
        child.stdin.flush()
        yield child
    finally:
        child.kill()
        child.communicate()


def _expect(child: subprocess.Popen[bytes], word: str) -> None:
    assert child.stdout is not None
    line = child.stdout.readline().decode().strip()
    if line != word:
        raise StepError(f"a second process, in which training is timed, ended before it was {word}; is memory short?")


def _work(requests: BinaryIO) -> None:
    importlib.import_module("pipeline.timing.pictures")  # with it, all that any worker imports
    from pipeline.timing.trainings import RehearsedTraining

    print("imported", flush=True)  # noqa: T201  (the protocol)
    job: TrainJob | None = pickle.load(requests)  # from the process that started this one
    if job is None:
        print(time.process_time(), flush=True)  # noqa: T201
        return
    threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
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
