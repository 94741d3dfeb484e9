"""The first pass of ``filter_embeddings``: CLIP score and heads of each row; and the score of the share that stays.

Legend: N rows of a shard, D features of an embedding.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.shard_tables import read_names, read_table
from pipeline.data.vectors import to_numpy, to_unit
from pipeline.filter.heads import Head
from pipeline.filter.labels import Labels
from pipeline.recipe.sections import FilterEmbeddingsConfig

CLIP_SCORE = "clip_score"
"""Column of the embeddings, if the embed step stored it."""
NUM_BINS = 1 << 16
"""Bins of the histogram of CLIP scores: 3e-5 of cosine similarity each."""
_ROUNDING = 1e-9  # of the bin of a score

Floats = NDArray[np.float32]


class ScoreRules:
    """Labels the rows of shards by their embeddings.

    Args:
        config: The recipe's section.
        embed_dim: D.

    Raises:
        ConfigError: If the weights of a head cannot be used.
    """

    def __init__(self, config: FilterEmbeddingsConfig, embed_dim: int) -> None:
        self._config = config
        self._aesthetic, self._nsfw = (
            Head(path, embed_dim, field=f"filter_embeddings.{name}_weights") if path else None
            for name, path in (("aesthetic", config.aesthetic_weights), ("nsfw", config.nsfw_weights))
        )

    def __call__(self, embeddings: Path) -> pa.Table:
        """Measure one shard of the embed step; memory is that of its embeddings.

        Args:
            embeddings: Parquet file of the shard.

        Returns:
            One row for each embedded one: ``uid``, ``key``, ``reason`` (empty: stays so far), ``detail``,
            ``clip_score`` and, if there is a head, ``aesthetic`` and ``nsfw``.

        Raises:
            DataError: If the shard is damaged.
        """
        has_score = CLIP_SCORE in read_names(embeddings)
        table = read_table(embeddings, ["uid", "key", "z_image", CLIP_SCORE if has_score else "z_text"])
        z_image = to_unit(to_numpy(table["z_image"]))
        if has_score:
            scores = table[CLIP_SCORE].to_numpy().astype(np.float32)
        else:
            scores = np.einsum("nd,nd->n", z_image, to_unit(to_numpy(table["z_text"])))
        labels, limits = Labels(table.num_rows), self._config
        columns = {CLIP_SCORE: scores}
        if limits.min_clip_score > -1:
            breaks = scores < limits.min_clip_score
            labels.leave_out(breaks, "clip_score", lambda row: f"similarity {scores[row]:.3f}")
        if self._aesthetic is not None:
            aesthetic = columns["aesthetic"] = self._aesthetic(z_image)
            breaks = aesthetic < limits.min_aesthetic
            labels.leave_out(breaks, "aesthetic_head", lambda row: f"score {aesthetic[row]:.2f}")
        if self._nsfw is not None:
            nsfw = columns["nsfw"] = self._nsfw(z_image)
            labels.leave_out(nsfw > limits.max_nsfw, "nsfw_head", lambda row: f"score {nsfw[row]:.2f}")
        return pa.table(
            {"uid": table["uid"], "key": table["key"], "reason": labels.reasons, "detail": labels.details} | columns
        )


def least_score_of_share(tables: Iterable[pa.Table], share: float) -> float:
    """The CLIP score from which on ``share`` of the rows that stay so far have theirs.

    It is the lower border of a bin of a histogram, so that somewhat more rows may stay: those of one bin. Memory is
    that of the histogram and of one shard's scores.

    Args:
        tables: The measures of each shard, see ``ScoreRules``.
        share: Share of rows, in (0, 1].
    """
    histogram = np.zeros(NUM_BINS, np.int64)
    for table in tables:
        scores = staying_scores(table)
        bins = np.floor((scores.astype(np.float64) + 1) / 2 * NUM_BINS).astype(np.int64)
        histogram += np.bincount(bins.clip(0, NUM_BINS - 1), minlength=NUM_BINS)
    from_above = np.cumsum(histogram[::-1])
    enough = int(np.searchsorted(from_above, share * from_above[-1]))
    return (NUM_BINS - 1 - enough) / NUM_BINS * 2 - 1 - _ROUNDING


def staying_scores(measures: pa.Table) -> Floats:
    """CLIP scores of the rows that have no reason yet."""
    return measures[CLIP_SCORE].to_numpy()[stays(measures)]


def stays(measures: pa.Table) -> NDArray[np.bool_]:
    """The rows that have no reason yet, (N,)."""
    return np.array([not reason for reason in measures["reason"].to_pylist()], np.bool_)


def apply_share(measures: pa.Table, least_score: float) -> pa.Table:
    """The measured rows; those below the share that stays have their reason."""
    labels = Labels(measures.num_rows)
    labels.reasons, labels.details = measures["reason"].to_pylist(), measures["detail"].to_pylist()
    scores = measures[CLIP_SCORE].to_numpy()
    breaks = scores < least_score
    labels.leave_out(breaks, "clip_score_share", lambda row: f"similarity {scores[row]:.3f}, below {least_score:.3f}")
    columns = {"reason": pa.array(labels.reasons, pa.string()), "detail": pa.array(labels.details, pa.string())}
    return pa.table({name: columns.get(name, measures[name]) for name in measures.column_names})
