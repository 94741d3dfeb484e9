"""The first pass of ``filter``: what each row's caption, size, columns and picture say about it.

Legend: N rows of a shard.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.shard_tables import good_rows, read_names, read_table
from pipeline.data.shards import ShardPictures
from pipeline.errors import ConfigError
from pipeline.filter.hashes import THUMB_BYTES, PictureHash, hash_picture
from pipeline.filter.labels import Labels
from pipeline.filter.language import LanguageClassifier
from pipeline.pictures.read import PictureError
from pipeline.recipe.sections import FILTER_COLUMNS, FilterConfig

_ROW_COLUMNS = ("uid", "key", "caption", "split", "status")
_NO_HASH = PictureHash(0, 0, bytes(THUMB_BYTES))


@dataclass(frozen=True)
class ColumnRule:
    """A rule on a number that the list brings; a row without the number breaks it."""

    reason: str
    field: str
    """Field of the section that holds the limit."""
    off: float
    """Value of the field without the rule."""
    is_most: bool
    """Whether the limit is the largest value that stays; else it is the smallest."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the column in known lists."""
        return FILTER_COLUMNS[self.field]


COLUMN_RULES = (
    ColumnRule("watermark", "max_watermark", 1.0, True),
    ColumnRule("nsfw", "max_nsfw", 1.0, True),
    ColumnRule("faces", "max_faces", -1, True),
    ColumnRule("similarity", "min_similarity", -1.0, False),
    ColumnRule("aesthetic", "min_aesthetic", 0.0, False),
)
_SHA256 = re.compile("[0-9a-fA-F]{64}")


class RowRules:
    """Labels the rows of shards and measures what the search for duplicates needs.

    Args:
        config: The recipe's section.

    Raises:
        ConfigError: If a language is unknown.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._language = LanguageClassifier(config.languages) if config.languages else None

    def __call__(self, tar: Callable[[], Path], parquet: Path, shard: str) -> pa.Table:
        """Measure one shard of the download; memory is that of its table and of one picture.

        Args:
            tar: Gives the pictures of the shard. It is called only if a rule reads a picture: a tar in an object store
                is a hundred times as large as its table.
            parquet: Table of the shard.
            shard: Name of the shard.

        Returns:
            The good rows, sorted by key: ``uid``, ``key``, ``split``, ``reason`` (empty: stays so far), ``detail``; for
            the search for duplicates ``digest`` (of the picture's file), ``group`` (only rows of one group are
            duplicates), ``direct``, ``mirrored`` and ``thumb`` (see ``hash_picture``).

        Raises:
            ConfigError: If a rule needs a column that the shard does not have.
            DataError: If the shard is damaged.
        """
        names = read_names(parquet)
        table = good_rows(read_table(parquet, [*_ROW_COLUMNS, *self._more_columns(names)])).sort_by("key")
        labels = Labels(table.num_rows)
        captions = [(caption or "").strip() for caption in table["caption"].to_pylist()]
        self._apply_to_captions(captions, labels)
        self._apply_to_sizes(table, labels)
        self._apply_to_columns(table, labels)
        columns: dict[str, Any] = {name: table[name] for name in ("uid", "key", "split")}
        if self._config.duplicates != "keep":
            columns |= self._measure_pictures(tar, table, shard, labels, captions)
        return pa.table(columns | {"reason": labels.reasons, "detail": labels.details})

    def _more_columns(self, names: list[str]) -> list[str]:
        """Columns to read beside those of every shard.

        Raises:
            ConfigError: If a rule needs a column that is not in ``names``.
        """
        config = self._config
        more = [find_column(names, rule.columns, rule.field) for rule in self._column_rules()]
        if config.nsfw_tags:
            more.append(find_column(names, FILTER_COLUMNS["nsfw_tags"], "nsfw_tags"))
        if config.min_image_px or config.max_aspect_ratio:
            more += ["original_width", "original_height"]
        if config.duplicates != "keep" and "sha256" in names:
            more.append("sha256")
        return more

    def _column_rules(self) -> list[ColumnRule]:
        return [rule for rule in COLUMN_RULES if getattr(self._config, rule.field) != rule.off]

    def _apply_to_captions(self, captions: list[str], labels: Labels) -> None:
        config = self._config
        labels.leave_out(
            (len(text) < config.min_caption_chars or len(text.split()) < config.min_caption_words for text in captions),
            "short_caption",
            lambda row: f"{len(captions[row].split())} words, {len(captions[row])} characters",
        )
        if config.max_caption_chars:
            labels.leave_out(
                (len(text) > config.max_caption_chars for text in captions),
                "long_caption",
                lambda row: f"{len(captions[row])} characters",
            )
        if self._language is not None:
            classify = self._language
            languages = [classify(text) for text in captions]
            labels.leave_out(
                (name not in config.languages and prob < config.min_language_prob for prob, name in languages),
                "language",
                lambda row: f"probably {languages[row][1]}; {', '.join(config.languages)}: {languages[row][0]:.2f}",
            )

    def _apply_to_sizes(self, table: pa.Table, labels: Labels) -> None:
        config = self._config
        if not config.min_image_px and not config.max_aspect_ratio:
            return
        sizes = [
            sorted((width or 0, height or 0))
            for width, height in zip(
                table["original_width"].to_pylist(), table["original_height"].to_pylist(), strict=True
            )
        ]

        def describe(row: int) -> str:
            return f"{sizes[row][0]} px by {sizes[row][1]} px"

        labels.leave_out((shorter < config.min_image_px for shorter, _ in sizes), "small_image", describe)
        if config.max_aspect_ratio:
            limit = config.max_aspect_ratio
            labels.leave_out((longer > limit * shorter for shorter, longer in sizes), "aspect_ratio", describe)

    def _apply_to_columns(self, table: pa.Table, labels: Labels) -> None:
        for rule in self._column_rules():
            name = find_column(table.column_names, rule.columns, rule.field)
            limit: float = getattr(self._config, rule.field)
            values = [to_number(value) for value in table[name].to_pylist()]
            labels.leave_out((value is None for value in values), f"no_{rule.reason}", _constant(f"{name} is missing"))
            labels.leave_out(
                (value is not None and (value > limit if rule.is_most else value < limit) for value in values),
                rule.reason,
                _value_of(name, values),
            )
        if self._config.nsfw_tags:
            tags = ["" if tag is None else str(tag) for tag in table[FILTER_COLUMNS["nsfw_tags"][0]].to_pylist()]
            labels.leave_out((tag not in self._config.nsfw_tags for tag in tags), "nsfw_tag", _value_of("NSFW", tags))

    def _measure_pictures(
        self, tar: Callable[[], Path], table: pa.Table, shard: str, labels: Labels, captions: list[str]
    ) -> dict[str, Any]:
        """Digests and hashes of the rows that stay so far; of the others they are zero."""
        rows = list(zip(table["key"].to_pylist(), table["uid"].to_pylist(), strict=True))
        has_digest = "sha256" in table.column_names
        # A tar that was taken in may hold anything under this name.
        texts: list[str | None] = table["sha256"].to_pylist() if has_digest else [None for _ in rows]
        digests = [text if text and _SHA256.fullmatch(text) else "" for text in texts]
        is_near, one_caption = self._config.duplicates == "near", self._config.same_caption_only
        staying: list[int] = np.flatnonzero(labels.stays()).tolist()
        reads_pictures = any(is_near or not digests[row] for row in staying)
        pictures = ShardPictures(tar(), shard) if reads_pictures else None
        hashes = [_NO_HASH for _ in rows]
        corrupt: dict[int, str] = {}
        for row in staying:
            data = b"" if pictures is None else pictures.read(*rows[row])
            digests[row] = digests[row] or hashlib.sha256(data).hexdigest()
            if is_near:
                try:
                    hashes[row] = hash_picture(data, where=f"filter: shard {shard}: key {rows[row][0]}")
                except PictureError as error:
                    corrupt[row] = error.reason
        labels.leave_out((row in corrupt for row in range(len(rows))), "corrupt", corrupt.__getitem__)
        stays = labels.stays()
        return {
            "digest": pa.array(
                [
                    bytes.fromhex(digest)[:16] if stay else bytes(16)
                    for digest, stay in zip(digests, stays, strict=True)
                ],
                pa.binary(16),
            ),
            "group": pa.array([_group(caption) if one_caption else 0 for caption in captions], pa.uint64()),
            "direct": pa.array([item.direct for item in hashes], pa.uint64()),
            "mirrored": pa.array([item.mirrored for item in hashes], pa.uint64()),
            "thumb": pa.array([item.thumb for item in hashes], pa.binary(THUMB_BYTES)),
        }


def find_column(names: list[str], candidates: tuple[str, ...], field: str) -> str:
    """The first of some names that a table has.

    Raises:
        ConfigError: If it has none; says how to bring the column there.
    """
    for name in candidates:
        if name in names:
            return name
    raise ConfigError(
        f"filter.{field}: the shards have no column {' or '.join(candidates)}; if the list has it, name it in "
        "download.extra_columns"
    )


def to_number(value: Any) -> float | None:
    """A number of a column, as a number or text; the length of a list (also as JSON); None if there is none."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, (list, tuple)):
            return float(len(value))
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except (ValueError, OverflowError, RecursionError):  # no JSON; digits beyond a float; lists in lists without end
        return None
    return None if math.isnan(number) else number


def _group(caption: str) -> int:
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little")


def _constant(text: str) -> Callable[[int], str]:
    return lambda _row: text


def _value_of(name: str, values: list[Any]) -> Callable[[int], str]:
    return lambda row: f"{name} {values[row]:.3g}" if isinstance(values[row], float) else f"{name} {values[row]}"
