"""How a start of a training ended, and whether the training begins again: each kind of end has a budget of its own."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.data.order import Share
from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.recipe.train_sections import ClipStepConfig
from pipeline.runtime.context import StepContext
from pipeline.workspace.store import LIVE, Artifact

Json = dict[str, Any]
Kind = Literal["finished", "resized", "preempted", "out_of_memory", "failed"]
"""``resized``: it has ended to begin again with more workers, which no budget counts."""
_COUNTED = f"{LIVE}restarts.json"
_CHECKPOINT = re.compile(rf"{LIVE}checkpoints/(\d+)\.safetensors")
_COUNTS = {"preempted": "num_preemptions", "out_of_memory": "num_out_of_memory", "failed": "num_failures"}


@dataclass(frozen=True)
class End:
    """How one start of a training ended."""

    kind: Kind
    cause: str = ""
    """Why it did not finish."""
    metrics: Json = field(default_factory=dict[str, Any])
    """What a finished one measured."""
    files: Json = field(default_factory=dict[str, Any])
    """Size and SHA-256 of the files that its first worker has written."""
    largest_pass: int = 0
    """Samples in one pass for which the memory did not suffice."""
    error: Exception | None = None
    """The error that it failed with, where a person should see all of it."""


def out_of_memory(section: TrainedSection, num_workers: int, cause: str, *, is_own: bool = True) -> End:
    """The end of a start in which a worker had too little memory, for itself or (not ``is_own``) beside others.

    Where less at a time is not possible, the latter is an error like others: it need not come again.
    """
    largest = Share(section.train.batch_size, 0, num_workers).largest_part(section.resources.samples_a_pass)
    if not is_own and not _can_be_halved(section, largest):
        return End("failed", f"a worker failed ({cause})")
    words = f"{'' if is_own else 'perhaps '}out of memory with {largest} samples at a time ({cause})"
    return End("out_of_memory", words, largest_pass=largest)


class Restarts:
    """The starts of one training: how many are left to this run, and how many there were in all runs.

    Errors that come again at one checkpoint use up their budget; those of a training of weeks that goes on between them
    do not.

    Args:
        context: The step.
    """

    def __init__(self, context: StepContext) -> None:
        self._context = context
        self._counts = Counter[Kind]()
        self._failed_at = 0
        self._in_all_runs = Counter[str](context.output.find_json(_COUNTED) or {})

    def next(self, end: End) -> StepContext:
        """The step as the next start runs it, after one that did not finish.

        Raises:
            StepError: If there were more ends of this kind than the recipe allows, or memory does not suffice for one
                sample at a time.
        """
        context, name = self._context, self._context.step.name
        notice = f"{end.cause}; it goes on from its newest checkpoint"
        if end.kind == "resized":
            self._context = replace(context, notice=notice)
            return self._context
        section = context.recipe.trained()[name]
        if end.kind == "failed":
            self._forget_failures_before(_newest_checkpoint(context.output))
        self._counts[end.kind] += 1
        self._in_all_runs[_COUNTS[end.kind]] += 1
        context.output.write_json(_COUNTED, self._in_all_runs)
        limit = _limits(section)[end.kind]
        if self._counts[end.kind] > limit:
            if end.error is not None:
                raise end.error
            raise StepError(
                f"{name}: training {_WORDS[end.kind].format(limit)}: {end.cause}; its checkpoints are kept in "
                f"{context.output.uri}; run again to continue"
            )
        if end.kind == "out_of_memory":
            half = (end.largest_pass + 1) // 2
            if not _can_be_halved(section, end.largest_pass):
                raise StepError(
                    f"{name}: {end.cause}, and less is not possible; set resources.checkpointing, or num_shards = 0 "
                    "with more workers, or make the network smaller; `unclip plan --cost` counts its memory"
                )
            notice = f"{end.cause}; it goes on with {half} (resources.micro_batch_size = {half}), the same training"
            context = replace(context, recipe=with_micro_batch(context.recipe, name, half))
        self._context = replace(context, notice=notice)
        return self._context

    def _forget_failures_before(self, step: int) -> None:
        """Begin to count errors anew if there is a later checkpoint than at the error before."""
        if step > self._failed_at:
            self._counts["failed"] = 0
        self._failed_at = step

    @property
    def metrics(self) -> Json:
        """How often a start of it ended before it was finished, in this run and in those before, for the manifest."""
        return dict(self._in_all_runs)


_WORDS = {
    "preempted": "was preempted more than {} times",
    "out_of_memory": "ran out of memory more than {} times",
    "failed": "failed more than {} times without a new checkpoint in between",
}


def _newest_checkpoint(output: Artifact) -> int:
    """Its step; 0 if there is none. Without torch, which the process that waits for a training does not load."""
    return max((int(found[1]) for name in output.names() if (found := _CHECKPOINT.fullmatch(name))), default=0)


def _limits(section: TrainedSection) -> dict[Kind, int]:
    resources = section.resources
    return {
        "preempted": resources.max_preemptions,
        "out_of_memory": resources.max_out_of_memory,
        "failed": resources.max_failures,
    }


def _can_be_halved(section: TrainedSection, largest_pass: int) -> bool:
    """Whether a pass may have fewer samples: the batch norms of a ResNet need the batch undivided."""
    is_resnet = isinstance(section, ClipStepConfig) and section.model.vision == "resnet"
    return largest_pass > 1 and not is_resnet


def with_micro_batch(recipe: Recipe, name: str, size: int) -> Recipe:
    """The recipe with another ``micro_batch_size`` of one training."""
    section = recipe.trained()[name]
    section = replace(section, resources=replace(section.resources, micro_batch_size=size))
    return replace(recipe, **{name: section})
