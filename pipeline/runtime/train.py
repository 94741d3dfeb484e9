"""Trainings on Ray: a task for one worker, Ray Train for more; whatever ends one, it begins again where it was.

One worker needs no process group, and a task starts in 2 s; a TorchTrainer first starts five helper actors (10 to 19 s
on 2 cores). Both run the same ``pipeline.train.job.run_job``, and neither begins again by itself: how often it does
depends on what ended it (``restarts.py``). torch and Ray Train are imported only where a training runs, so that the
process that waits for it stays small.
"""

import contextlib
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Generator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray.exceptions

from pipeline import errors
from pipeline.allocator import is_out_of_memory, keep_freed_heaps
from pipeline.errors import ConfigError, StepError, UnclipError
from pipeline.recipe.plan import earlier_trainings
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime.calls import GivenUpError, MachineLostError, call
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.hang import HangWatch, Pulse
from pipeline.runtime.lost_workers import end_of, forget_places, here, last_line, note_places
from pipeline.runtime.memory import keep_halved_part, with_counted_part
from pipeline.runtime.placement import (
    cluster_has_roles,
    living_machines,
    needed,
    scaling_options,
    worker_options,
)
from pipeline.runtime.restarts import End, Restarts, out_of_memory
from pipeline.runtime.stopping import ROOM, StopNotice, handle_sigterm, is_stop_requested
from pipeline.runtime.validate import ValidationsBeside
from pipeline.runtime.worker_logs import logged
from pipeline.workspace.fence import begin_attempt
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import LIVE, Workspace

if TYPE_CHECKING:
    import torch

Json = dict[str, Any]

_END = f"{LIVE}end.json"
_ERROR = f"{LIVE}error.json"
# How often Ray Train's controller looks at its workers: every start and end of a training waits for it (default: 2 s).
_RAY_TRAIN_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}


def run_clip(context: StepContext) -> StepResult:
    """Train CLIP, or load a pretrained one."""
    if context.recipe.clip.source == "pretrained":
        return _load_clip(context)
    return run_training(context)


def run_training(context: StepContext) -> StepResult:
    """Train the network of a step.

    Raises:
        ConfigError: If its memory is to be counted, and the shape of a pretrained CLIP is not known.
        StepError: If the training ended more often than its budgets allow, was asked to end, or does not fit.
    """
    in_recipe = context.recipe.trained()[context.step.name].resources.micro_batch_size
    context = with_counted_part(context)
    needs = context.recipe.trained()[context.step.name].resources
    if not needs.validates_beside:
        end = _fit(context, in_recipe)
        return StepResult(metrics=end.metrics, files=end.files)
    with ValidationsBeside(context, needs) as validations:
        end = _fit(context, in_recipe)
        metrics = end.metrics | validations.finish()
    return StepResult(metrics=metrics, files=end.files)


def _fit(context: StepContext, micro_batch_in_recipe: int | str) -> End:
    """Train, from the newest checkpoint after each loss, until the network is finished; returns how it ended.

    Its metrics say how often it began again, and the ``micro_batch_size`` that it ended with if that is another one
    than the recipe's.
    """
    restarts = Restarts(context)
    while True:
        context = replace(context, attempt=uuid.uuid4().hex)
        begin_attempt(context.output, context.attempt)
        needs = context.recipe.trained()[context.step.name].resources
        end = (_fit_one if needs.most_workers == 1 else _fit_many)(context, needs)
        if end.kind == "finished":
            size = needs.micro_batch_size
            ended_with = {} if size == micro_batch_in_recipe else {"micro_batch_size": size}
            return replace(end, metrics=end.metrics | restarts.metrics | ended_with)
        if end.kind in {"preempted", "resized"} and is_stop_requested(context.output):
            raise StepError(f"{context.step.name}: {end.cause}; run again to continue")
        context = restarts.next(end)
        if end.kind == "out_of_memory" and micro_batch_in_recipe == "auto":
            keep_halved_part(context, end.largest_pass)


def _options(context: StepContext, resources: TrainResources) -> Json:
    """What each worker asks Ray for; the progress says that it is waited for."""
    options = worker_options(context.step.name, resources, has_roles=cluster_has_roles())
    progress = Progress(context.output, waits=True, notice=context.notice)
    progress.update(0, 1, "", f"waiting for {needed(resources.fewest_workers, options)}", force=True)
    return options


def _fit_one(context: StepContext, resources: TrainResources) -> End:
    """Train on one worker, a task."""
    forget_places(context.output)
    options = _options(context, resources)
    machines, watch = living_machines(), HangWatch(context, resources.hang_timeout_s)
    try:
        with watch:
            options = {"name": f"{context.step.name}: train", **options}
            return call(_run_alone, context, options=options, is_given_up=lambda: watch.is_stuck)
    except GivenUpError:  # it may wake up, but writes nothing once another start has begun
        assert watch.end is not None  # it is stuck
        return replace(watch.end, cause=f"{watch.end.cause}, and its process does not end")
    except MachineLostError as error:
        return End("preempted", f"a machine was lost ({error})")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UnclipError):
            raise error.cause from None
        return End("failed", last_line(error), error=error)
    except ray.exceptions.RayError as error:
        end = end_of(context, error, machines)
        # Memory that runs out, and a machine that goes silent, let a worker stand still, too.
        return watch.end if watch.end is not None and end.kind == "failed" else end


def _fit_many(context: StepContext, resources: TrainResources) -> End:
    """Train on several workers: Ray Train forms the process group."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.exceptions import PreemptionError

    from pipeline.runtime.scaling import RoomPolicy, RoomTrainer

    output = context.output
    for file in (_ERROR, _END):
        output.remove(file)
    forget_places(output)
    os.environ.update({key: value for key, value in _RAY_TRAIN_SETTINGS.items() if key not in os.environ})
    num_gpus = _num_gpus(resources)
    options = _options(context, resources)
    scaling = ScalingConfig(num_workers=resources.num_workers, use_gpu=num_gpus > 0, **scaling_options(options))
    machines = living_machines()
    try:
        # Ray Train looks whether it can write where checkpoints would be that nobody reports to it. Its own drivers of
        # stores know fewer addresses than ours, and its controller stands on the machine of this process.
        with tempfile.TemporaryDirectory(prefix="unclip-") as folder, _own_interrupts():
            RoomTrainer(
                _run_ranked,
                policy=RoomPolicy(scaling, context, options),
                train_loop_config={"context": context},
                torch_config=TorchConfig(backend="nccl" if num_gpus else "gloo", timeout_s=resources.hang_timeout_s),
                scaling_config=scaling,
                run_config=RunConfig(
                    name=f"{context.step.name}-{context.step.key}",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
                    callbacks=_callbacks(context),
                ),
            ).fit()
    except PreemptionError:
        return End("preempted", "its machine was taken away")
    except (TrainingFailedError, ray.exceptions.RayError) as error:  # the latter if the controller itself is lost
        _raise_reported(context)
        return End(**output.read_json(_END)) if output.exists(_END) else end_of(context, error, machines)
    _raise_reported(context)
    return End(**output.read_json(_END))


@contextlib.contextmanager
def _own_interrupts() -> Generator[None]:
    """After the block an interrupt does what it did before: Ray Train's handler stays, and asks a dead actor."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _callbacks(context: StepContext) -> list[Any]:
    """What Ray Train calls: in a worker before it trains, and in its controller when there are workers."""
    from ray.train.v2._internal.execution.callback import WorkerCallback, WorkerGroupCallback

    class HandleTermination(WorkerCallback):
        def after_init_train_context(self) -> None:
            """Called in the main thread of a worker, before the training begins in another one."""
            handle_sigterm()

    class NotePlaces(WorkerGroupCallback):
        def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002  (Ray's signature)
            """Called before each try to form a group of workers."""
            forget_places(context.own_output)

        def after_worker_group_start(self, worker_group: Any) -> None:
            """Called when all workers of a group are there, before they train."""
            note_places(context.own_output, worker_group.execute(here))

    return [HandleTermination(), NotePlaces()]


def _run_alone(context: StepContext) -> End:
    """The only worker; runs in a process of its own."""
    note_places(context.own_output, [here()])
    return _run_worker(context)


def _run_ranked(config: dict[str, Any]) -> None:
    """One of several workers; runs in a process of its own."""
    from ray.train import get_context

    context: StepContext = config["context"]
    output, world = context.own_output, get_context()
    try:
        with logged(context.step.name, f"rank-{world.get_world_rank()}"):
            end = _run_worker(context, world.get_world_rank(), world.get_world_size())
    except UnclipError as error:
        output.write_json(_ERROR, {"class": type(error).__name__, "message": str(error)})
        raise  # the other workers may be waiting for this one
    if end.kind == "out_of_memory":
        output.write_json(_END, asdict(end))
        raise StepError(end.cause)
    if world.get_world_rank() == 0:
        output.write_json(_END, asdict(end))


def _run_worker(context: StepContext, rank: int = 0, world_size: int = 1) -> End:
    """Train on one worker; runs in a process of its own, which starts when it has its CPUs."""
    progress = Progress(context.own_output, notice=context.notice, num_workers=world_size)
    if rank == 0:  # a large checkpoint takes minutes to read, and the machines that were waited for are there
        progress.update(0, 1, "networks", "loading", force=True)
    from pipeline.networks.cores import use_cores
    from pipeline.train.assemble import EarlierTraining, TrainJob
    from pipeline.train.job import run_job
    from pipeline.train.stop import StoppedError

    name, output, workspace = context.step.name, context.own_output, Workspace(context.recipe.workspace)
    section = context.recipe.trained()[name]
    resources = section.resources
    num_threads = use_cores(resources.cpus_per_worker)
    keep_freed_heaps()  # of several workers each trains in a thread of Ray Train's
    job = TrainJob(
        name=name,
        recipe=context.recipe,
        inputs=context.inputs,
        output=output,
        digest=context.step.key,
        device=_device(resources, world_size),
        rank=rank,
        world_size=world_size,
        num_threads=num_threads,
        earlier=tuple(
            EarlierTraining(workspace.artifact(name, key), key, last_step)
            for key, last_step in earlier_trainings(context.step)
        ),
    )
    try:
        with (
            StopNotice(output, reads_requests=rank == 0) as notice,
            Pulse(context, resources.hang_timeout_s, resources.most_workers) as pulse,
        ):
            metrics = run_job(
                job, lambda done, total, message: progress.update(done, total, "steps", message), notice, pulse
            )
    except StoppedError as error:
        if rank == 0:
            progress.update(error.step, section.train.total_steps, "steps", str(error), force=True)
        return End("resized" if error.reason == ROOM else "preempted", str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return out_of_memory(section, world_size, str(error).partition("\n")[0])
    except UnclipError as error:
        raise type(error)(f"{name}: {error}") from error
    if rank == 0:
        progress.update(section.train.total_steps, section.train.total_steps, "steps", "trained", force=True)
    return End("finished", metrics=metrics, files=output.known() if rank == 0 else {})


def _device(resources: TrainResources, world_size: int) -> "torch.device":
    import torch

    if resources.accelerator == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StepError('accelerator is "cuda", but torch sees no GPU here; install the gpu build or set "cpu"')
    if world_size == 1:
        return torch.device("cuda")
    from ray.train.torch import get_device

    device = get_device()
    torch.cuda.set_device(device)  # collectives of objects take the current one
    return device


def _num_gpus(resources: TrainResources) -> int:
    return 1 if resources.accelerator == "cuda" else 0


def _raise_reported(context: StepContext) -> None:
    """Raise the UnclipError that a worker reported."""
    if context.output.exists(_ERROR):
        reported = context.output.read_json(_ERROR)
        raise getattr(errors, reported["class"])(reported["message"])


def _load_clip(context: StepContext) -> StepResult:
    from pipeline.clip.files import load_pretrained
    from pipeline.networks.clip import save_clip_artifact
    from pipeline.networks.files import num_parameters

    section, progress = context.recipe.clip, Progress(context.output)
    progress.update(0, 1, "networks", f"loading {section.name}", force=True)
    is_folder = os.path.isdir(section.name)  # noqa: PTH112  (a name may also be a URI)
    name = f"local-dir:{section.name}" if is_folder else section.name
    has_own_weights = name.startswith(("local-dir:", "hf-hub:"))
    try:
        clip = load_pretrained(name, None if has_own_weights else section.tag)
    except ValueError as error:
        raise ConfigError(f"clip.name, clip.tag: {error}") from error
    save_clip_artifact(context.output, clip)
    progress.update(1, 1, "networks", force=True)
    return StepResult(metrics={"num_parameters": num_parameters(clip.model)}, files=context.output.known())
