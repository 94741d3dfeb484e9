"""How long a training stands still after ``kill -9`` of a worker, and where the time goes, on the CPU.

    python -m benchmarks.recovery

A tiny upsampler is trained on a Ray of this machine; one of its workers is killed, and it goes on from its newest
checkpoint. Seconds count from the kill: ``next_step_s`` until the first step after it is done, which the columns before
divide: until the loss is noticed, the processes are there, they have imported (torch, open_clip), have the network, the
checkpoint, their first batch, and have done the step; of several workers the last one counts. Ray's own is the same
with an empty training: a task that is started again for one worker, Ray Train's restart for two. Floor: less than 20 s
more. A table without these columns is of an earlier program, whose time ended with the checkpoint, before the reader.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
import ray.exceptions

from pipeline.runtime import train
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext
from pipeline.workspace.progress import ProgressState, read_progress
from pipeline.workspace.store import Artifact

_NUM_STEPS = 100_000
_LIMIT_S = 120.0
MOST_S = 20.0
PARTS = ("processes", "imports", "network", "checkpoint", "reader", "first_step")
"""What a worker does until its first step is done, in this order."""


def run() -> list[dict[str, Any]]:
    """One row for each number of workers."""
    with connect():
        return [_row(num_workers) for num_workers in (1, 2)]


def _row(num_workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        row = _ours(Path(folder), num_workers)
        own_s = (_task if num_workers == 1 else _ray_train)(Path(folder))
    return row | {"ray_s": own_s, "more_than_ray_s": row["next_step_s"] - own_s, "below": MOST_S}


def _ours(folder: Path, num_workers: int) -> dict[str, Any]:
    from pipeline.recipe.recipe import parse_recipe
    from tests.tiny.recipe import tiny_tables
    from tests.tiny.training import upsampler_context

    resources = {"num_workers": num_workers, "cpus_per_worker": 0.5, "save_every_steps": 50, "log_every_steps": 1}
    upsampler = {"train": {"num_steps": _NUM_STEPS, "batch_size": 2}, "resources": resources}
    context = upsampler_context(parse_recipe(tiny_tables(folder, upsampler_1=upsampler)))
    _notes(context).mkdir(parents=True)
    task = ray.remote(num_cpus=0, max_retries=0)(_run_training).remote(context)
    _wait(lambda: _state(context.output).done > 2 * resources["save_every_steps"])
    killed = _kill(": train" if num_workers == 1 else "RayTrainWorker")
    _wait(lambda: bool(_state(context.output).notice))
    noticed = time.time()
    _wait(lambda: len(times_of(_notes(context), PARTS[-1], killed)) == num_workers)
    ray.cancel(task, force=True)
    return {"workers": num_workers, **divided(_notes(context), killed, noticed)}


def _state(output: Artifact) -> ProgressState:
    return read_progress(output) or ProgressState(0, 1, "", 0, 0, "", 0, 0)


def _run_training(context: StepContext) -> None:
    """The training, whose workers note when each of the parts is done."""
    with patch.object(train, "_run_alone", _alone), patch.object(train, "_run_ranked", _ranked):
        train.run_training(context)


def _alone(context: StepContext) -> Any:
    with parts_noted(_notes(context)):
        return train._run_alone(context)  # pyright: ignore[reportPrivateUsage]


def _ranked(config: dict[str, Any]) -> None:
    with parts_noted(_notes(config["context"])):
        train._run_ranked(config)  # pyright: ignore[reportPrivateUsage]


def _notes(context: StepContext) -> Path:
    return Path(context.recipe.workspace) / "notes"


@contextlib.contextmanager
def parts_noted(folder: Path) -> Generator[None]:
    """Let the training that this process runs in the block note in a folder when each of the parts is done."""

    def note(part: str) -> None:
        (folder / f"{part}-{os.getpid()}").write_text(repr(time.time()), encoding="utf-8")

    def noted(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            result = call(*arguments, **options)
            note(part)
            return result

        return act

    note("processes")
    from pipeline.train import job

    note("imports")
    make_step, iterate_batches = job.make_step, job.iterate_batches

    def make_noted_step(*arguments: Any, **options: Any) -> Callable[..., Any]:
        step = make_step(*arguments, **options)
        steps = itertools.chain([noted(step, "first_step")], itertools.repeat(step))

        def take(*of_step: Any) -> None:
            next(steps)(*of_step)

        return take

    def iterate_noted_batches(*arguments: Any, **options: Any) -> Iterator[Any]:
        with contextlib.closing(iterate_batches(*arguments, **options)) as batches:
            yield noted(next, "reader")(batches)
            yield from batches

    with (
        patch.object(job, "start_training", noted(job.start_training, "network")),
        patch.object(job, "continue_training", noted(job.continue_training, "checkpoint")),
        patch.object(job, "iterate_batches", iterate_noted_batches),
        patch.object(job, "make_step", make_noted_step),
    ):
        yield


def times_of(folder: Path, part: str, killed: float) -> list[float]:
    """When the workers that began after the kill have done a part, in seconds since the epoch."""
    times = [float(file.read_text(encoding="utf-8") or 0) for file in folder.glob(f"{part}-*")]
    return [one for one in times if one > killed]


def divided(folder: Path, killed: float, noticed: float) -> dict[str, float]:
    """The seconds from the kill to the end of the first step, and those of each part of them."""
    ends = [killed, noticed, *(max(times_of(folder, part, killed)) for part in PARTS)]
    seconds = [stop - start for start, stop in itertools.pairwise(ends)]
    names = ("noticed_s", *(f"{part}_s" for part in PARTS))
    return dict(zip(names, seconds, strict=True)) | {"next_step_s": ends[-1] - killed}


def _enter(folder: str) -> None:
    """An empty training: it notes that it runs."""
    (Path(folder) / str(time.time_ns())).touch()
    time.sleep(_LIMIT_S)


def _task(folder: Path) -> float:
    entries = folder / "entries"
    entries.mkdir()
    start = ray.remote(max_retries=0)(_enter).remote
    first = start(str(entries))
    _wait(lambda: len(list(entries.iterdir())) == 1)
    killed = _kill("_enter")
    try:
        ray.get(first)
    except ray.exceptions.WorkerCrashedError:
        second = start(str(entries))
    _wait(lambda: len(list(entries.iterdir())) == 2)
    back = time.time()
    ray.cancel(second, force=True)
    return back - killed


def _ray_train(folder: Path) -> float:
    entries = folder / "entries"
    entries.mkdir()
    task = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(str(entries))
    _wait(lambda: len(list(entries.iterdir())) == 2)
    killed = _kill("RayTrainWorker")
    _wait(lambda: len(list(entries.iterdir())) == 4)
    back = time.time()
    ray.cancel(task, force=True)
    return back - killed


def _fit(folder: str) -> None:
    """An empty training on two workers."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        lambda config: _enter(config["folder"]),
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(storage_path=f"{folder}-ray", failure_config=FailureConfig(max_failures=1)),
    ).fit()


def _kill(name: str) -> float:
    """Kill one worker of this process's Ray by what it runs; when that was, in seconds since the epoch."""
    for child in psutil.Process().children(recursive=True):
        if name in " ".join(child.cmdline()) and child.cmdline()[0].startswith("ray::"):
            child.kill()
            return time.time()
    raise RuntimeError(f"no worker runs {name}")


def _wait(until: Any) -> None:
    end = time.monotonic() + _LIMIT_S
    while not until():
        if time.monotonic() > end:
            raise TimeoutError("the training does not go on")
        time.sleep(0.02)


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parser.parse_args()
    rows = run()
    from benchmarks.side_by_side import publish  # workers look at this file, too, and are to import torch by themselves

    publish("recovery", rows, vars(arguments))


if __name__ == "__main__":
    main()
