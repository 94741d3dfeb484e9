"""How long a training stands still after ``kill -9`` of a worker, and where the time goes, on the CPU.

    python -m benchmarks.recovery

A tiny upsampler is trained on a Ray of this machine; one of its workers is killed, and it goes on from its newest
checkpoint. Seconds count from the kill: until the loss is noticed, and until the first step after it, with the start of
processes, their imports (torch, open_clip), the network, the checkpoint and the reader. Ray's own is the same with an
empty training: a task that is started again for one worker, Ray Train's restart for two. Floor: less than 20 s more.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions

from benchmarks.side_by_side import publish
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.connection import connect
from pipeline.runtime.train import run_training
from pipeline.workspace.progress import ProgressState, read_progress
from pipeline.workspace.store import Artifact
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context

_NUM_STEPS = 100_000
_LIMIT_S = 120.0
MOST_S = 20.0


def run() -> list[dict[str, Any]]:
    """One row for each number of workers."""
    with connect():
        return [_row(num_workers) for num_workers in (1, 2)]


def _row(num_workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        noticed_s, back_s = _ours(Path(folder), num_workers)
        own_s = (_task if num_workers == 1 else _ray_train)(Path(folder))
    more_s = back_s - own_s
    row = {"workers": num_workers, "noticed_s": noticed_s, "next_step_s": back_s, "ray_s": own_s}
    return row | {"more_than_ray_s": more_s, "below": MOST_S}


def _ours(folder: Path, num_workers: int) -> tuple[float, float]:
    resources = {"num_workers": num_workers, "cpus_per_worker": 0.5, "save_every_steps": 50, "log_every_steps": 1}
    upsampler = {"train": {"num_steps": _NUM_STEPS, "batch_size": 2}, "resources": resources}
    context = upsampler_context(parse_recipe(tiny_tables(folder, upsampler_1=upsampler)))
    task = ray.remote(num_cpus=0, max_retries=0)(run_training).remote(context)
    _wait(lambda: _state(context.output).done > 2 * resources["save_every_steps"])
    killed = _kill(": train" if num_workers == 1 else "RayTrainWorker")
    _wait(lambda: bool(_state(context.output).notice))
    noticed = time.monotonic()
    _wait(lambda: bool(_state(context.output).notice) and _state(context.output).has_begun)
    back = time.monotonic()
    ray.cancel(task, force=True)
    return noticed - killed, back - killed


def _state(output: Artifact) -> ProgressState:
    return read_progress(output) or ProgressState(0, 1, "", 0, 0, "", 0, 0)


def _enter(folder: str) -> None:
    """An empty training: it notes that it runs."""
    (Path(folder) / str(time.monotonic_ns())).touch()
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
    back = time.monotonic()
    ray.cancel(second, force=True)
    return back - killed


def _ray_train(folder: Path) -> float:
    entries = folder / "entries"
    entries.mkdir()
    task = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(str(entries))
    _wait(lambda: len(list(entries.iterdir())) == 2)
    killed = _kill("RayTrainWorker")
    _wait(lambda: len(list(entries.iterdir())) == 4)
    back = time.monotonic()
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
    """Kill one worker of this process's Ray by what it runs; when that was."""
    for child in psutil.Process().children(recursive=True):
        if name in " ".join(child.cmdline()) and child.cmdline()[0].startswith("ray::"):
            child.kill()
            return time.monotonic()
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
    publish("recovery", run(), vars(arguments))


if __name__ == "__main__":
    main()
