"""Recognises pairs in what people look at: evaluations, ablations and batch searches.

A row with a uid or a URL is the pair that these name. Only what has neither (a prompt, the text of a query) is
recognised by its words: thousands of pairs may have the same caption.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.compute

from pipeline.data.shard_tables import read_groups, read_names
from pipeline.errors import DataError
from pipeline.workspace.store import RECORD_SUFFIX, Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

Json = dict[str, Any]

_PLACES = ("uid", "url", "image")
"""Fields that name a pair; ``image`` is the picture of a query."""
_IDENTITY = ("uid", "url")
_TEXTS = ("prompt", "text")
_CAPTION = "caption"
_FIELDS = (*_PLACES, *_TEXTS, _CAPTION)
_NEIGHBOURS = "neighbours"
"""Column of the answers of a search: a list of rows."""


@dataclass(frozen=True)
class Pairs:
    """By what some pairs are recognised."""

    names: frozenset[str]
    """Their uids and URLs."""
    captions: frozenset[str]

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """What a text may be that is made for one of them."""
        return self.names | self.captions

    @functools.cached_property
    def name_values(self) -> pa.Array:
        """The names, for Arrow."""
        return pa.array(sorted(self.names), pa.string())

    @functools.cached_property
    def word_values(self) -> pa.Array:
        """The words, for Arrow."""
        return pa.array(sorted(self.words), pa.string())

    def are_in(self, artifact: Artifact) -> bool:
        """Whether a file of an artifact shows one of the pairs.

        Raises:
            DataError: If a file cannot be read: it might show one.
        """
        return bool(self.words) and any(self._are_in_file(artifact, name) for name in artifact.names())

    def _are_in_file(self, artifact: Artifact, name: str) -> bool:
        if name.endswith(".parquet"):
            return self._are_in_table(artifact.ranged(name))
        if name.endswith(".jsonl"):
            lines = (artifact.find_bytes(name) or b"").splitlines()
            return any(self._are_in_json(_parsed(artifact, name, line)) for line in lines)
        if name.endswith(".json") and not name.endswith(RECORD_SUFFIX):
            return self._are_in_json(artifact.find_json(name))
        return False

    def _are_in_table(self, file: Path | IO[bytes]) -> bool:
        existing = read_names(file)
        is_named = any(name in existing for name in _IDENTITY)
        chosen = (*_PLACES, *_TEXTS, _NEIGHBOURS, *(() if is_named else (_CAPTION,)))
        columns = [name for name in chosen if name in existing]
        return bool(columns) and any(map(self._are_in_rows, read_groups(file, columns)))

    def _are_in_rows(self, rows: pa.Table) -> bool:
        for name in rows.column_names:
            if name == _NEIGHBOURS:
                neighbours = pc.list_flatten(rows.column(name))
                if any(_has(pc.struct_field(neighbours, one), self.name_values) for one in _IDENTITY):
                    return True
            elif _has(rows.column(name), self.name_values if name in _PLACES else self.word_values):
                return True
        return False

    def _are_in_json(self, value: Any) -> bool:
        """Whether a record has one; of its fields, only those count that may name a pair."""
        for record in _records(value):
            texts = {name: one for name in _FIELDS if isinstance(one := record.get(name), str)}
            is_named = any(texts.get(name) for name in _IDENTITY)
            for name, text in texts.items():
                if name in _PLACES:
                    words = self.names
                elif name == _CAPTION and is_named:
                    continue
                else:
                    words = self.words
                if text in words:
                    return True
        return False


def _has(column: Any, values: pa.Array) -> bool:
    return bool(pc.any(pc.is_in(column.cast(pa.string()), value_set=values)).as_py())


def _records(value: Any) -> Iterator[Json]:
    """Every record in a JSON value, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            record = cast("Json", one)
            yield record
            waiting += record.values()
        elif isinstance(one, list):
            waiting += cast("list[Any]", one)


def _parsed(artifact: Artifact, name: str, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{artifact.uri}/{name}: damaged ({error}); {artifact.mend()}") from None
