"""The work of an evaluation: what is sampled and measured, cut into parts that any worker can do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.data.negatives import Bigrams
from pipeline.evaluate.prompts import PromptSet, Row


@dataclass(frozen=True)
class Part:
    """A run of consecutive items of one kind."""

    kind: str
    """``samples``, ``trained`` (samples of trained combinations) or ``validation`` (rows)."""
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the part's files and of its record."""
        return f"parts/{self.kind}-{self.number:05d}"


def plan_parts(counts: Mapping[str, int], batch_size: int) -> list[Part]:
    """Cut the items of each kind into parts of nearly equal size, of at most ``batch_size`` items each."""
    parts: list[Part] = []
    for kind, total in counts.items():
        count = math.ceil(total / batch_size)
        ends = [total * i // count for i in range(count + 1)] if count else [0]
        parts += [Part(kind, i, start, stop) for i, (start, stop) in enumerate(pairwise(ends))]
    return parts


def samples_of(num_prompts: int, num_shown: int, num_images: int) -> list[tuple[int, int]]:
    """(prompt number, image number) of each sample: one of every prompt, then the further ones of the shown prompts."""
    shown = range(min(num_shown, num_prompts))
    return [(i, 0) for i in range(num_prompts)] + [(i, j) for i in shown for j in range(1, num_images)]


@dataclass(frozen=True)
class Work:
    """Everything that an evaluation samples and measures; a function of the recipe and its inputs.

    It is made once, by the process that runs the step, and travels to the workers.
    """

    prompts: PromptSet
    trained: PromptSet
    """Prompts of trained combinations, for the difference to the held-out ones; empty for other sources."""
    rows: Sequence[Row]
    """For the measures of each network."""
    rows_split: str
    """Split of the rows: ``validation``, or ``train`` if there are no validation rows."""
    samples: Sequence[tuple[int, int]]
    """(prompt number, image number) of each sample."""
    parts: Sequence[Part]
    bigrams: Bigrams = frozenset()
    """Pairs of words of the corpus, for the hard negatives of captions."""

    @property
    def num_items(self) -> int:
        """Number of samples and rows together."""
        return len(self.samples) + len(self.trained.prompts) + len(self.rows)
