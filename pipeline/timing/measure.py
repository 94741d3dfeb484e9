"""Measures a recipe on this machine: a rehearsal of all its steps on a few rows, in some seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.data.sources import count_pairs
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import needs_of, this_machine
from pipeline.recipe.steps import STEP_ROWS
from pipeline.timing.companion import companions, start_of_a_process_s
from pipeline.timing.pictures import evaluation_units
from pipeline.timing.rehearsal import Rehearsal
from pipeline.timing.trainings import RehearsedTraining
from pipeline.timing.units import RowUnits, TrainingUnits, Units, training_seconds
from pipeline.workspace.store import Artifact

_MOST_COMPANIONS = 7
Watch = Callable[[str], None]
"""Called with what is measured next."""


def measure(recipe: Recipe, finished: Mapping[str, Artifact], watch: Watch = lambda _what: None) -> Units:
    """Measure every step of a recipe that is not finished.

    Args:
        recipe: The recipe.
        finished: The artifacts of its finished steps, by name.
        watch: Called before each step.

    Raises:
        ConfigError: If this machine does not have the GPUs or CPUs of a step, or a pretrained CLIP is not known here.
        DataError: If the source has no usable row.
    """
    todo = [name for name in STEP_ROWS if getattr(recipe, name) is not None and name not in finished]
    _require_machine(recipe, todo)
    num_threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="unclip-time-") as folder:
            return _measure(recipe, Rehearsal(recipe, Path(folder), finished), todo, watch)
    finally:
        torch.set_num_threads(num_threads)


def _measure(recipe: Recipe, rehearsal: Rehearsal, todo: Collection[str], watch: Watch) -> Units:
    rows, trainings = dict[str, RowUnits](), dict[str, TrainingUnits]()

    def take(name: str) -> None:
        watch(name)
        if name in recipe.trained():
            trainings[name] = rehearsal.training(name)
        else:
            rows[name] = getattr(rehearsal, name)()

    watch("start of a process")
    process_s = start_of_a_process_s()
    # In the order of their inputs; a finished step gives the next ones what they read, except its rows, which are many.
    if set(todo) - {"evaluate"}:
        take("pairs")
        take("download")
        if "clip" in todo:
            take("clip")
        take("embed")
    for name in todo:
        if name == "index" or (name in recipe.trained() and name != "clip"):
            take(name)
    watch("evaluate")
    evaluation = evaluation_units(recipe, rehearsal.artifacts) if "evaluate" in todo else None
    success = rehearsal.num_good / rehearsal.num_pairs if rehearsal.num_pairs else 1.0
    units = Units(
        process_s=process_s,
        num_rows=count_pairs(recipe.pairs),
        success=success,
        rows=rows,
        trainings=trainings,
        evaluation=evaluation,
    )
    watch("workers side by side")
    return replace(units, crowding=_crowding(recipe, rehearsal, units))


def _crowding(recipe: Recipe, rehearsal: Rehearsal, units: Units) -> float:
    """Time of a step of the longest training with every CPU busy, over its time alone; on a GPU, 1."""
    sections = {name: recipe.trained()[name] for name in units.trainings}
    on_cpu = {name: section for name, section in sections.items() if section.resources.accelerator == "cpu"}
    if not on_cpu:
        return 1.0
    num_rows = round(units.num_rows * units.success)
    name = max(on_cpu, key=lambda name: training_seconds(on_cpu[name], units.trainings[name], num_rows))
    count = min(_MOST_COMPANIONS, int(this_machine().cpus // on_cpu[name].resources.cpus_per_worker) - 1)
    if count < 1:
        return 1.0
    job = rehearsal.job(name)
    training = RehearsedTraining(job)
    with companions(job, count):
        return max(1.0, training.step_s() / units.trainings[name].step_s)


def _require_machine(recipe: Recipe, names: Collection[str]) -> None:
    """Refuse a recipe that cannot run on this machine.

    Raises:
        ConfigError: If it has too few GPUs or CPUs for a step.
    """
    machine = this_machine()
    needs = {name: needs_of(getattr(recipe, name)) for name in names}
    on_gpu = [name for name, need in needs.items() if need.gpus * need.num_workers > torch.cuda.device_count()]
    if on_gpu:
        raise ConfigError(
            f'{", ".join(on_gpu)}: accelerator is "cuda", and torch sees {torch.cuda.device_count() or "no"} GPU here: '
            "their time can be measured only on the machine that will train. Run `unclip plan RECIPE --time` there, or "
            "count the arithmetic with `unclip plan RECIPE --cost`"
        )
    large = [name for name, need in needs.items() if need.cpus * need.num_workers > machine.cpus]
    if large:
        raise ConfigError(
            f"{', '.join(large)}: the workers need more CPUs than the {machine.cpus:g} of this machine, so a run here "
            "would wait for ever; lower resources.num_workers or resources.cpus_per_worker, or measure on a node of "
            "the cluster"
        )
