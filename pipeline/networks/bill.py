"""What a recipe costs in money: GPU and CPU hours, storage and requests, at the prices in its ``prices`` table.

The hours of a step are those of its last run on the same inputs with the same settings, or measured ones (``plan
--time``); without them a training and the embeddings are counted by their arithmetic. A step that has neither is named,
and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.data.make_pairs import MOST_READS
from pipeline.data.npy_folder import count_rows
from pipeline.data.sources import count_pairs
from pipeline.networks.costs import PEAK_FLOPS, UTILISATION, NetworkCost, build_clip
from pipeline.networks.table import kind_of
from pipeline.recipe.estimate import load_times
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.schedule import needs_of
from pipeline.recipe.status import StepStatus, plan_status
from pipeline.workspace.store import Workspace

Json = dict[str, Any]

REQUESTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "pairs": ((0, 43), (0, 29)),
    "download": ((7, 14), (4, 11)),
    "filter": ((9, 29), (4, 28)),
    "clip": ((6, 19), (0, 16)),
    "embed": ((6, 17), (2, 10)),
    "index": ((5, 84), (0, 38)),
    "prior": ((4, 28), (0, 17)),
    "decoder": ((7, 29), (0, 17)),
}
"""Requests of a step that read (GET, HEAD), and that write or list (PUT, LIST): for each shard, and for the step. It is
the table of docs/scaling.md, which a test measures, of few shards: of many, a page of a listing for each thousand files
is left out, and what is asked by the clock."""
TAR_REQUESTS = (6, 4)
"""Requests of `pairs` for each tar of a person's own, that read and that write."""
TASK_REQUESTS = (9, 3)
"""The same for each task that reads tars: one tar, or several of a list of more than ``MOST_READS``."""
_PICTURE_BYTES = 25_000
"""Of a stored picture at 256 px with its texts: LAION-400M takes 10 TB for 400 million."""
_ROW_BYTES = 150
"""Of a row's uid, key, URL and caption."""
_CAPTION_TOKENS = 20
"""Of a caption, start and end included: an assumption; at most CLIP's context length."""


@dataclass(frozen=True)
class Entry:
    """One line of a bill."""

    what: str
    unit: str
    price: float
    """For one unit."""
    amounts: dict[str, float]
    """Units, by what they are for."""

    @property
    def amount(self) -> float:
        """Units of all."""
        return sum(self.amounts.values())

    @property
    def money(self) -> float:
        """Price of all."""
        return self.amount * self.price


@dataclass(frozen=True)
class Bill:
    """What a recipe costs."""

    currency: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    """What is not counted."""

    @property
    def money(self) -> float:
        """The sum."""
        return sum(entry.money for entry in self.entries)

    def to_dict(self) -> Json:
        """All fields and the sums."""
        entries = [asdict(entry) | {"amount": entry.amount, "money": entry.money} for entry in self.entries]
        return {"currency": self.currency, "entries": entries, "notes": list(self.notes), "money": self.money}


def recipe_bill(recipe: Recipe, costs: Sequence[NetworkCost], *, until: str = "") -> Bill | None:
    """The bill of a recipe, finished steps included; None if it names no price.

    Args:
        recipe: The recipe.
        costs: Of ``recipe_costs``.
        until: Last step that is counted; empty: all.

    Raises:
        DataError: If the source of the pairs is missing or damaged.
    """
    prices = recipe.prices
    if prices.is_empty:
        return None
    steps = make_plan(recipe, until=until)
    num_rows, statuses = count_pairs(recipe.pairs), plan_status(Workspace(recipe.workspace), steps)
    folder = recipe.embed.import_from
    num_embedded = count_rows(Path(folder)) if folder else num_rows
    gpu_hours, cpu_hours, untimed = _hours(recipe, statuses, costs, num_rows, num_embedded)
    names = {step.name for step in steps}
    sizes = _gigabytes(recipe, statuses, costs, num_rows, num_embedded)
    sizes, reads, writes = (
        {name: amount for name, amount in one.items() if name in names}
        for one in (sizes, *requests_of(recipe, num_rows))
    )
    entries = (
        Entry("GPU", "hours", prices.gpu_hour, gpu_hours),
        Entry("CPU", "hours", prices.cpu_hour, cpu_hours),
        Entry(
            "storage",
            f"GB for {prices.storage_months:g} months",
            prices.storage_gb_month * prices.storage_months,
            sizes,
        ),
        Entry("reading requests", "thousand", prices.reads_1000, reads),
        Entry("writing requests", "thousand", prices.writes_1000, writes),
    )
    notes = [f"no time is known of {', '.join(untimed)}: `plan --time` measures it"] if untimed else []
    notes += [f"{entry.what}: no price" for entry in entries if not entry.price and entry.amount]
    return Bill(prices.currency, tuple(entry for entry in entries if entry.price and entry.amount), tuple(notes))


def format_bill(bill: Bill) -> str:
    """The bill for a terminal."""
    lines = list[str]()
    for entry in bill.entries:
        parts = ", ".join(f"{name} {_short(amount)}" for name, amount in entry.amounts.items() if amount)
        amount = f"{_short(entry.amount)} {entry.unit} at {entry.price:g}"
        lines.append(f"{entry.what:<17}{amount:<30}{entry.money:>14,.2f} {bill.currency}  ({parts})")
    notes = [f"not counted: {note}" for note in bill.notes]
    return "\n".join([*lines, f"{'together':<47}{bill.money:>14,.2f} {bill.currency}", *notes])


def _short(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.2g}"


def _hours(
    recipe: Recipe, statuses: Sequence[StepStatus], costs: Sequence[NetworkCost], num_rows: int, num_embedded: int
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """GPU and CPU hours by step, and the steps of which no time is known."""
    times, _ = load_times(recipe, [status.step for status in statuses])
    counted = {cost.name: cost.hours(recipe.prices.gpu) for cost in costs}
    clip = next(cost for cost in costs if cost.name == "clip")
    if not recipe.embed.import_from:  # imported embeddings run through no network
        counted["embed"] = num_embedded * clip.sampling_flops / (PEAK_FLOPS[recipe.prices.gpu] * UTILISATION) / 3600
    gpu_hours, cpu_hours, untimed = dict[str, float](), dict[str, float](), list[str]()
    num_shards = _num_shards(recipe, num_rows)
    for step in (status.step for status in statuses):
        needs, time = needs_of(getattr(recipe, step.name)), times.get(step.name)
        if time is not None:
            is_training = step.name in recipe.trained()
            # Each worker holds its CPUs while it starts, and while all of them wait for a host with limits.
            workers = needs.num_workers if is_training else min(needs.most_workers, max(1, num_shards))
            hours = (time.shared_s + time.fixed_s * workers) / 3600
            (gpu_hours if needs.gpus else cpu_hours)[step.name] = hours * (needs.gpus or needs.cpus)
        elif needs.gpus and step.name in counted:
            gpu_hours[step.name] = counted[step.name]
        elif counted.get(step.name, 1.0):  # a CLIP that is loaded takes no time
            untimed.append(step.name)
    return gpu_hours, cpu_hours, untimed


def _gigabytes(
    recipe: Recipe, statuses: Sequence[StepStatus], costs: Sequence[NetworkCost], num_rows: int, num_embedded: int
) -> dict[str, float]:
    """Size of each step's files: as they are if it is finished, else estimated; an index is as large as its vectors."""
    with torch.device("meta"):
        dims = build_clip(recipe).dims
    vectors = 2 * 2 * dims.embed_dim
    tokens = min(_CAPTION_TOKENS, dims.context_length)
    states = tokens * (2 * dims.text_width + 4) + 2 * dims.embed_dim if recipe.embed.token_states else 0
    estimated: dict[str, float] = {
        "download": num_rows * _PICTURE_BYTES * (recipe.download.image_px / 256) ** 2,
        "embed": num_embedded * (vectors + states + _ROW_BYTES),
        "index": num_embedded * vectors,
        **{cost.name: cost.weights_bytes for cost in costs},
    }
    manifests = {status.step.name: status.manifest for status in statuses if status.manifest and status.state == "done"}
    there = {name: float(sum(one["bytes"] for one in manifest.files.values())) for name, manifest in manifests.items()}
    return {name: size / 1e9 for name, size in (estimated | there).items()}


def requests_of(recipe: Recipe, num_rows: int) -> tuple[dict[str, float], dict[str, float]]:
    """Thousands of requests of each step that read, and that write or list; none of a local workspace."""
    reads, writes = dict[str, float](), dict[str, float]()
    if Workspace(recipe.workspace).is_local:
        return reads, writes
    num_shards = _num_shards(recipe, num_rows)
    for name, (read, written) in _requests_by_step(recipe, num_shards).items():
        reads[name] = (read[0] * num_shards + read[1]) / 1000
        writes[name] = (written[0] * num_shards + written[1]) / 1000
    return reads, writes


def _num_shards(recipe: Recipe, num_rows: int) -> int:
    return math.ceil(num_rows / recipe.download.samples_per_shard)


def _requests_by_step(recipe: Recipe, num_shards: int) -> Mapping[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Requests of the steps; a training is counted as the one of those in the table that reads the same files."""
    filters = ("filter",) if recipe.filter else ()
    by_step = {name: REQUESTS[name] for name in ("pairs", "download", *filters, "embed", "index")}
    if recipe.pairs.source == "shards":
        num_tasks = min(num_shards, MOST_READS * len(recipe.pairs.each()))
        (_, reads), (_, writes) = REQUESTS["pairs"]
        besides = reads + TASK_REQUESTS[0] * num_tasks, writes + TASK_REQUESTS[1] * num_tasks
        by_step["pairs"] = ((TAR_REQUESTS[0], besides[0]), (TAR_REQUESTS[1], besides[1]))
    for name, section in recipe.trained().items():
        kind = kind_of(section.model)
        if name != "clip" or recipe.clip.source == "train":
            by_step[name] = REQUESTS["prior" if not kind.pictures else "decoder" if kind.embeddings else "clip"]
    return by_step
