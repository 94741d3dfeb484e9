"""Search of a recipe's pairs: by text, picture, embedding or uid, with a filter, without near-duplicates.

searcher = Searcher.open(load_recipe("configs/demo.toml"))
results = searcher.search([Query("text", "a blue circle")], SearchOptions(k=10, where="width >= 512"))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.networks.clip import load_clip_artifact
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.queries import Query, QueryEncoder
from pipeline.retrieve.retriever import Results, Retriever
from pipeline.retrieve.segment import Modality
from pipeline.workspace.store import Artifact

STEPS = ("clip", "index")
"""Finished steps that a search reads."""


@dataclass(frozen=True)
class SearchOptions:
    """How to search, whatever the query is."""

    k: int = 10
    """Neighbours of each query."""
    modality: Modality = "image"
    """Compare with the pictures or with the captions of the pairs."""
    where: str = ""
    """Filter by column, see ``pipeline.retrieve.where``; empty: none."""
    distinct: float | None = None
    """Cosine of two pictures from which on they are near-duplicates; None: all are kept."""


class Searcher:
    """Searches the index of finished steps; CLIP is loaded with the first query.

    Args:
        artifacts: The artifacts of ``STEPS``, by step name.
        device: Torch device of CLIP.
        version_number: Version of the index; None: the newest.

    Raises:
        DataError: If a file is missing or damaged.
        StepError: If the version is gone.
    """

    def __init__(self, artifacts: dict[str, Artifact], device: str = "cpu", version_number: int | None = None) -> None:
        self._artifacts = artifacts
        self._device = device
        self.retriever = Retriever.open(artifacts["index"], version_number=version_number)

    @classmethod
    def open(cls, recipe: Recipe, device: str = "cpu") -> "Searcher":
        """Open the index of a recipe.

        Raises:
            ConfigError: If a step is not finished; names the command that finishes it.
            DataError: If a file is missing or damaged.
        """
        return cls(finished_artifacts(recipe, STEPS), device)

    @cached_property
    def encoder(self) -> QueryEncoder:
        """Turns queries into vectors."""
        return QueryEncoder(load_clip_artifact(self._artifacts["clip"], self._device), self.retriever)

    def search(self, queries: Sequence[Query], options: SearchOptions) -> Results:
        """Find the pairs nearest to the weighted sum of the queries, of which there is at least one.

        Raises:
            ConfigError: If a query or the filter cannot be read.
            DataError: If an artifact is damaged.
        """
        conditions = self.retriever.conditions(options.where, options.distinct)
        vector = self.encoder.encode(queries)
        [results] = self.retriever.search(vector[None], options.k, options.modality, conditions)
        return results
