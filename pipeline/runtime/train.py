"""Trainings on Ray: one TorchTrainer for each network; a lost worker continues from the newest checkpoint."""

import os
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from pipeline import errors
from pipeline.errors import ConfigError, StepError, UnclipError
from pipeline.progress import Progress
from pipeline.runtime.context import StepContext, StepResult
from pipeline.store import LIVE

_RESULT = f"{LIVE}result.json"
_ERROR = f"{LIVE}error.json"
# How often Ray Train's controller looks at its workers: every start and end of a training waits for it (default: 2 s).
_RAY_TRAIN_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def run_clip(context: StepContext) -> StepResult:
    """Train CLIP, or take it as it is."""
    if context.recipe.clip.source == "pretrained":
        return _take_pretrained(context)
    return _train(context)


def run_prior(context: StepContext) -> StepResult:
    """Train the prior."""
    return _train(context)


def run_decoder(context: StepContext) -> StepResult:
    """Train the decoder."""
    return _train(context)


def run_upsampler_1(context: StepContext) -> StepResult:
    """Train the first upsampler."""
    return _train(context)


def run_upsampler_2(context: StepContext) -> StepResult:
    """Train the second upsampler."""
    return _train(context)


def _train(context: StepContext) -> StepResult:
    name, output = context.step.name, context.output
    resources = context.recipe.trained()[name].resources
    for file in (_ERROR, _RESULT):
        output.remove(file)
    os.environ.update({key: value for key, value in _RAY_TRAIN_SETTINGS.items() if key not in os.environ})
    use_gpu = resources.accelerator == "cuda"
    progress, num_steps = Progress(output), context.recipe.trained()[name].train.num_steps
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"context": context},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"{name}-{context.step.key}",
            storage_path=f"{output.uri}/{LIVE}ray",
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_reported(context)
        raise StepError(
            f"{name}: training failed after {resources.max_failures} restarts: {_cause(error)}; "
            f"its checkpoints are kept in {output.uri}; run again to continue"
        ) from error
    _raise_reported(context)
    progress.update(num_steps, num_steps, "steps", "trained", force=True)  # with the time that Ray Train takes to start
    return StepResult(metrics=output.read_json(_RESULT), num_workers=resources.num_workers)


def _run_worker(config: dict[str, Any]) -> None:
    """One worker of a training; runs in a process of its own."""
    from pipeline.train.assemble import TrainJob
    from pipeline.train.job import run_job

    context: StepContext = config["context"]
    output, world = context.output, ray.train.get_context()
    if output.exists(_ERROR):  # a restart cannot mend what a person has to
        return
    resources = context.recipe.trained()[context.step.name].resources
    num_threads = max(1, int(resources.cpus_per_worker))
    torch.set_num_threads(num_threads)
    rank = world.get_world_rank()
    job = TrainJob(
        name=context.step.name,
        recipe=context.recipe,
        inputs=context.inputs,
        output=output,
        digest=context.step.key,
        device=get_device() if resources.accelerator == "cuda" else torch.device("cpu"),
        rank=rank,
        world_size=world.get_world_size(),
        num_threads=num_threads,
    )
    progress = Progress(output)
    try:
        metrics = run_job(job, lambda done, total, message: progress.update(done, total, "steps", message))
    except UnclipError as error:
        output.write_json(_ERROR, {"class": type(error).__name__, "message": f"{context.step.name}: {error}"})
        if job.world_size > 1:
            raise  # the other workers may be waiting for this one
        return
    if rank == 0:
        output.write_json(_RESULT, metrics)


def _raise_reported(context: StepContext) -> None:
    """Raise the error that a worker wrote down for people."""
    if context.output.exists(_ERROR):
        reported = context.output.read_json(_ERROR)
        raise getattr(errors, reported["class"])(reported["message"])


def _cause(error: Exception) -> str:
    """The first worker's own error, in one line."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    cause = next(iter(failures.values()), error)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1]


def _take_pretrained(context: StepContext) -> StepResult:
    from models.clip import load_pretrained
    from pipeline.weights import num_parameters, save_clip_artifact

    section = context.recipe.clip
    is_folder = os.path.isdir(section.name)  # noqa: PTH112  (a name may also be a URI)
    name = f"local-dir:{section.name}" if is_folder else section.name
    has_own_weights = is_folder or name.startswith(("local-dir:", "hf-hub:"))
    try:
        clip = load_pretrained(name, None if has_own_weights else section.tag)
    except ValueError as error:
        raise ConfigError(f"clip.name, clip.tag: {error}") from error
    save_clip_artifact(context.output, clip)
    return StepResult(metrics={"num_parameters": num_parameters(clip.model)})
