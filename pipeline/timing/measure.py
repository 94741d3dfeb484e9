"""Measures a recipe on this machine: a rehearsal of all its steps on a few rows, in some seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.data.npy_folder import count_rows
from pipeline.data.sources import count_pairs
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import Machine, needs_of, this_machine
from pipeline.recipe.steps import STEP_ROWS
from pipeline.timing.companion import companions, start_of_a_process_s, training_together
from pipeline.timing.pictures import evaluation_units
from pipeline.timing.rehearsal import Rehearsal
from pipeline.timing.trainings import RehearsedTraining
from pipeline.timing.units import EvaluationUnits, RowUnits, TrainingUnits, Units, training_seconds
from pipeline.workspace.store import Artifact

_MOST_COMPANIONS = 7
Watch = Callable[[str], None]
"""Called with what is measured next."""


def measure(
    recipe: Recipe,
    finished: Mapping[str, Artifact],
    watch: Watch = lambda _what: None,
    only: Collection[str] | None = None,
) -> Units:
    """Measure steps of a recipe that are not finished.

    Args:
        recipe: The recipe.
        finished: The artifacts of its finished steps, by name.
        watch: Called before each step.
        only: The steps to measure; None: all that are not finished.

    Raises:
        ConfigError: If this machine does not have the GPUs or CPUs of a step, or a pretrained CLIP is not known here.
        DataError: If the source has no usable row.
    """
    names = [name for name in STEP_ROWS if getattr(recipe, name) is not None and name not in finished]
    todo = names if only is None else [name for name in names if name in only]
    steps = _steps_of(recipe, todo, finished)
    _require_machine(recipe, todo, steps)
    num_threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="unclip-time-") as folder:
            return _measure(recipe, Rehearsal(recipe, Path(folder), finished, watch), todo, steps, watch)
    finally:
        torch.set_num_threads(num_threads)


def _steps_of(recipe: Recipe, todo: Collection[str], finished: Collection[str]) -> list[str]:
    """The steps that a rehearsal takes, each after its inputs: those to measure (not evaluate), and what they read.

    A finished network is read as it is. The rows of a finished data step are many, so the rehearsal makes a few itself.
    """
    networks = {*recipe.trained()} & {*finished}
    names = {*todo} - {"evaluate"}
    if recipe.embed.import_from:  # the few pictures of a rehearsal are not those of the imported rows
        names -= {name for name in recipe.trained() if {"download", "embed"} <= {*STEP_ROWS[name].inputs}}
    for name in reversed(STEP_ROWS):
        if name in names and getattr(recipe, name).reads_inputs:
            row = STEP_ROWS[name]
            inputs = {*row.inputs} - ({*row.inputs_of_own_rows} if recipe.embed.import_from else set())
            names |= {one for one in inputs if getattr(recipe, one) is not None} - networks
    return [name for name in STEP_ROWS if name in names]


def _measure(recipe: Recipe, rehearsal: Rehearsal, todo: Collection[str], steps: Sequence[str], watch: Watch) -> Units:
    rows, trainings = dict[str, RowUnits](), dict[str, TrainingUnits]()
    watch("start of a process")
    process_s = start_of_a_process_s()
    for name in steps:
        watch(name)
        if name in recipe.trained():
            trainings[name] = rehearsal.training(name, process_s)
        elif (unit := rehearsal.rows(name)) is not None:
            rows[name] = unit
    evaluation: EvaluationUnits | None = None
    if "evaluate" in todo and {*recipe.trained()} & {*todo} <= trainings.keys():
        watch("evaluate")
        evaluation = evaluation_units(recipe, rehearsal.artifacts)
    is_import = bool(recipe.embed.import_from)
    units = Units(
        process_s=process_s,
        num_rows=0 if is_import and "pairs" not in steps else count_pairs(recipe.pairs),
        num_imported=count_rows(Path(recipe.embed.import_from)) if is_import else None,
        success=rehearsal.num_good / rehearsal.num_read if rehearsal.num_read else 1.0,
        pass_shares=rehearsal.pass_shares,
        rows=rows,
        trainings=trainings,
        evaluation=evaluation,
    )
    watch("workers side by side")
    units = replace(units, crowding=_crowding(recipe, rehearsal, units))
    for name in [name for name in todo if name in trainings and _exchanges(recipe, name)]:
        watch(f"workers of {name} together")
        step_s = max(trainings[name].step_s, _step_together_s(recipe, rehearsal, name, this_machine(units.crowding)))
        trainings[name] = replace(trainings[name], step_s=step_s)
    return replace(units, trainings=trainings)


def _crowding(recipe: Recipe, rehearsal: Rehearsal, units: Units) -> float:
    """Time of a step of the longest training with every CPU busy, over its time alone; on a GPU, 1."""
    sections = {name: recipe.trained()[name] for name in units.trainings}
    on_cpu = {
        name: section
        for name, section in sections.items()
        if section.resources.accelerator == "cpu" and units.trainings[name].step_s  # a pretrained CLIP takes none
    }
    if not on_cpu:
        return 1.0
    name = max(on_cpu, key=lambda name: training_seconds(on_cpu[name], units.trainings[name], units.rows_of(name)))
    count = min(_MOST_COMPANIONS, int(this_machine().cpus // on_cpu[name].resources.cpus_per_worker) - 1)
    if count < 1:
        return 1.0
    job = rehearsal.job(name)
    training = RehearsedTraining(job)
    with companions(job, count):
        return max(1.0, training.step_s() / units.trainings[name].step_s)


def _exchanges(recipe: Recipe, name: str) -> bool:
    """Whether several workers of a training exchange gradients on CPUs."""
    resources = recipe.trained()[name].resources
    is_trained = name != "clip" or recipe.clip.source == "train"
    return is_trained and resources.accelerator == "cpu" and resources.fewest_workers > 1


def _step_together_s(recipe: Recipe, rehearsal: Rehearsal, name: str, machine: Machine) -> float:
    """Time of a step in which the workers of a training exchange what they do, if working side by side cost nothing."""
    resources = recipe.trained()[name].resources
    with training_together(rehearsal.job(name), resources.fewest_workers) as job:
        return RehearsedTraining(job).step_s() / machine.slowdown(resources.fewest_workers * resources.cpus_per_worker)


def _require_machine(recipe: Recipe, todo: Collection[str], steps: Collection[str]) -> None:
    """Refuse a recipe that cannot be measured on this machine.

    Raises:
        ConfigError: If it has too few GPUs for one of ``steps``, or too few CPUs for one that will run.
    """
    machine = this_machine()
    needs = {name: needs_of(getattr(recipe, name)) for name in STEP_ROWS if name in {*todo, *steps}}
    on_gpu = [name for name, need in needs.items() if need.gpus * need.num_workers > torch.cuda.device_count()]
    if on_gpu:
        raise ConfigError(
            f'{", ".join(on_gpu)}: accelerator is "cuda", and torch sees {torch.cuda.device_count() or "no"} GPU here: '
            "their time can be measured only on the machine that will train. Run `unclip plan RECIPE --time` there, or "
            "count the arithmetic with `unclip plan RECIPE --cost`"
        )
    large = [name for name in todo if needs[name].cpus * needs[name].num_workers > machine.cpus]
    if large:
        raise ConfigError(
            f"{', '.join(large)}: the workers need more CPUs than the {machine.cpus:g} of this machine, so a run here "
            "would wait for ever; lower resources.num_workers or resources.cpus_per_worker, or measure on a node of "
            "the cluster"
        )
