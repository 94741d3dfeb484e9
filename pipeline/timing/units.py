"""The measured times of small pieces of a recipe, and the time of every step from them: plain arithmetic.

The pieces are one training step, one row, one picture. So the same measurement gives the time of any number of steps,
rows and pictures.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.evaluate.work import plan_parts
from pipeline.recipe.estimate import StepTime
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.recipe.steps import STEP_ROWS
from pipeline.recipe.train_sections import ClipStepConfig


@dataclass(frozen=True, kw_only=True)
class RowUnits:
    """Times of a data step, in seconds."""

    row_s: float
    """One row on one worker."""
    unshared_row_s: float = 0.0
    """What a row takes beyond that, however many workers there are."""
    fixed_s: float = 0.0
    """What does not depend on the rows, without the start of the process."""


@dataclass(frozen=True, kw_only=True)
class TrainingUnits:
    """Times of a training on one worker, in seconds."""

    step_s: float
    """One optimizer step on this worker's share of the batch, with its rows in memory; of several workers on CPUs with
    what they exchange."""
    start_s: float = 0.0
    """Building the network and reading CLIP, without the captions."""
    row_s: float = 0.0
    """Reading and decoding one row that is not in memory."""
    caption_s: float = 0.0
    """Encoding one caption."""
    most_cached_rows: float = math.inf
    """Rows whose pictures are kept in memory; with more rows, none is kept."""
    most_encoded_rows: float = math.inf
    """Rows whose captions are encoded once; with more rows, each batch encodes its own."""
    save_s: float = 0.0
    """Validation and checkpoint, between the steps; of a validation beside them what it takes from the workers."""
    end_s: float = 0.0
    """Validation and writing the artifact, after the last step."""


@dataclass(frozen=True, kw_only=True)
class EvaluationUnits:
    """Times of the evaluation on one worker, in seconds."""

    start_s: float
    """Loading the cascade."""
    sample_s: float
    """One sampled and measured picture."""
    row_s: float
    """One validation row: its embedding by the prior."""
    reconstruction_s: float
    """What a reconstructed row takes beyond that: its picture from z_image, and its enlargements."""
    num_reconstructions: int
    """Rows that are reconstructed."""
    most_prompts: float = math.inf
    """Prompts that there are: scenes of the drawn source, or lines of a file. Captions are as many as rows."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """All that was measured of a recipe on a machine; a step that was not measured is absent."""

    process_s: float
    """Start of a worker's process, with its imports."""
    num_rows: int
    """Rows of the source."""
    num_imported: int | None = None
    """Rows of embeddings that others made (``embed.import_from``); None: the download's are embedded."""
    success: float = 1.0
    """Share of the rows that the download brings."""
    pass_shares: Mapping[str, float] = field(default_factory=dict[str, float])
    """Share of its rows that a filter keeps, by step."""
    rows: dict[str, RowUnits] = field(default_factory=dict[str, RowUnits])
    """By data step."""
    trainings: dict[str, TrainingUnits] = field(default_factory=dict[str, TrainingUnits])
    """By step that trains a network."""
    evaluation: EvaluationUnits | None = None
    crowding: float = 1.0
    """See ``Machine``."""

    def rows_of(self, name: str) -> int:
        """Rows that a step gets."""
        if name in {"pairs", "download"}:
            return self.num_rows
        inputs, rows = STEP_ROWS[name].inputs, self.num_rows * self.success
        if name != "filter":
            rows *= self.pass_shares.get("filter", 1.0)
        if self.num_imported is not None and (name == "embed" or "embed" in inputs):
            rows = self.num_imported
        return round(rows * self.pass_shares.get("filter_embeddings", 1.0) if "filter_embeddings" in inputs else rows)


def step_times(recipe: Recipe, units: Units) -> dict[str, StepTime]:
    """The time of every measured step of a recipe.

    Args:
        recipe: The measured recipe, or one that differs in numbers of steps, rows or pictures alone.
        units: What was measured.

    Returns:
        Times by step name.
    """
    times: dict[str, StepTime] = {}
    for name, unit in units.rows.items():
        num_rows = units.rows_of(name)
        times[name] = StepTime(units.process_s + unit.fixed_s + num_rows * unit.unshared_row_s, num_rows * unit.row_s)
    for name, unit in units.trainings.items():
        num_rows = units.rows_of(name) - _validation_rows(recipe, units, name)
        times[name] = StepTime(units.process_s + training_seconds(recipe.trained()[name], unit, num_rows))
    if units.evaluation is not None:
        # Training rows stand in for validation rows where there are none: ``pipeline.evaluate.prompts.held_out_rows``.
        num_rows = _validation_rows(recipe, units, "evaluate") or units.rows_of("evaluate")
        times["evaluate"] = _evaluation_time(recipe, units.evaluation, units.process_s, num_rows)
    return times


def _validation_rows(recipe: Recipe, units: Units, name: str) -> int:
    """Rows of a step that are set aside for validation."""
    is_imported = units.num_imported is not None and "embed" in STEP_ROWS[name].inputs
    share = recipe.embed.import_validation_prob if is_imported else recipe.pairs.validation_prob
    return round(units.rows_of(name) * share)


def training_seconds(section: TrainedSection, unit: TrainingUnits, num_rows: int) -> float:
    """Seconds of a training on ``num_rows`` rows, without the start of its process."""
    if isinstance(section, ClipStepConfig) and section.source == "pretrained":
        return unit.start_s
    train, resources = section.train, section.resources
    samples = train.total_steps * train.batch_size / resources.fewest_workers  # as which it is planned
    reads = min(samples, num_rows) if num_rows <= unit.most_cached_rows else samples
    captions = num_rows if num_rows <= unit.most_encoded_rows else samples
    saves = max(0, train.total_steps - 1) // resources.save_every_steps
    work_s = train.total_steps * unit.step_s + reads * unit.row_s + captions * unit.caption_s
    return unit.start_s + work_s + saves * unit.save_s + unit.end_s


def _evaluation_time(recipe: Recipe, unit: EvaluationUnits, process_s: float, held_out_rows: int) -> StepTime:
    """The parts of an evaluation are few, so that workers wait for the last one: their schedule gives the time."""
    config = recipe.evaluate
    is_drawn = recipe.pairs.source == "drawn" and not config.prompts_path
    num_rows = min(config.num_prompts, held_out_rows)
    most_prompts = unit.most_prompts if is_drawn or config.prompts_path else num_rows
    num_prompts = int(min(config.num_prompts, most_prompts))
    num_samples = num_prompts + min(config.num_shown, num_prompts) * (config.num_images_per_shown - 1)
    num_trained = min(config.num_trained_prompts, num_prompts) if is_drawn else 0
    sizes = [size for total in (num_samples, num_trained) for size in _part_sizes(total, config.batch_size)]
    parts = [size * unit.sample_s for size in sizes]
    of_rows = [size * unit.row_s for size in _part_sizes(num_rows, config.batch_size)]
    if of_rows:
        of_rows[0] += min(unit.num_reconstructions, num_rows) * unit.reconstruction_s
    workers = config.resources.num_workers
    return StepTime(process_s + unit.start_s, workers * makespan([*parts, *of_rows], workers))


def _part_sizes(total: int, most: int) -> list[int]:
    return [part.stop - part.start for part in plan_parts({"": total}, most)]


def makespan(parts: Sequence[float], num_workers: int) -> float:
    """Seconds until the last of ``parts`` is done, if each free worker takes the next one."""
    free_at = [0.0] * num_workers
    for seconds in parts:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return max(free_at)
