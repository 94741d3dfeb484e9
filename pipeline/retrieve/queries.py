"""Queries: texts, picture files, embedding files and uids, alone or mixed with weights, as vectors of length one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.clip.frozen import FrozenClip
from pipeline.errors import ConfigError
from pipeline.pictures.read import read_file
from pipeline.retrieve.embedded import Floats
from pipeline.retrieve.retriever import Retriever

QueryKind = Literal["text", "image", "embedding", "uid"]

_BATCH = 256
_PICTURES = 32
"""Picture files that are embedded at once."""
_LEAST_LENGTH = 1e-6


@dataclass(frozen=True)
class Query:
    """One thing to look for."""

    kind: QueryKind
    value: str
    """The text itself; the path of a picture; the path of a vector (``.npy``, ``.json``); the uid of a pair."""
    weight: float = 1.0
    """Its part in a mixture; a negative weight leads away from it."""

    def __str__(self) -> str:
        name = f'"{self.value}"' if self.kind == "text" else f"{self.kind} {self.value}"
        return name if self.weight == 1 else f"{self.weight:g} x {name}"


class QueryEncoder:
    """Turns queries into vectors.

    Args:
        clip: The CLIP of the index.
        retriever: The index, for uids.
    """

    def __init__(self, clip: FrozenClip, retriever: Retriever) -> None:
        self._clip = clip
        self._retriever = retriever

    def encode(self, queries: Sequence[Query]) -> Floats:
        """The direction of the weighted sum of the queries' vectors, (D,).

        Raises:
            ConfigError: If a file cannot be read, no row has the uid, or the sum has no direction.
        """
        vectors = np.stack([self._encode_one(query) for query in queries])
        total = np.array([query.weight for query in queries], np.float32) @ vectors
        length = float(np.linalg.norm(total))
        if not length > _LEAST_LENGTH:
            raise ConfigError(f"search: {' + '.join(map(str, queries))} cancel each other: nothing is left to look for")
        return total / length

    def texts(self, texts: Sequence[str]) -> Floats:
        """z_text of texts, (N, D)."""
        parts = [
            self._clip.embed_text(list(texts[start : start + _BATCH])).cpu().numpy()
            for start in range(0, len(texts), _BATCH)
        ]
        return np.concatenate(parts)

    def picture(self, path: str) -> Floats:
        """z_image of a picture file, (D,).

        Raises:
            ConfigError: If it cannot be read.
        """
        return self._embed_pictures([self._pixels(path)])[0]

    def pictures(self, paths: Sequence[str]) -> tuple[Floats, list[str]]:
        """z_image of picture files, (N, D), several at a time.

        Returns:
            The vectors, zero for a file that cannot be read; and for each file why it cannot, empty if it can.
        """
        vectors, problems = np.zeros((len(paths), self._retriever.index.embed_dim), np.float32), [""] * len(paths)
        for start in range(0, len(paths), _PICTURES):
            pixels = dict[int, Any]()
            for place in range(start, min(start + _PICTURES, len(paths))):
                try:
                    pixels[place] = self._pixels(paths[place])
                except ConfigError as error:
                    problems[place] = str(error)
            if pixels:
                vectors[list(pixels)] = self._embed_pictures(list(pixels.values()))
        return vectors, problems

    def _pixels(self, path: str) -> Any:
        """What the network sees of a picture file, uint8 (H, W, 3)."""
        return self._clip.clip.inputs.framing(read_file(path))

    def _embed_pictures(self, pixels: Sequence[Any]) -> Floats:
        return self._clip.encode_image(torch.from_numpy(np.stack(pixels))).cpu().numpy()

    def row(self, uid: str) -> Floats:
        """z_image of a row of the index, (D,).

        Raises:
            ConfigError: If there is no such row.
        """
        vectors, [problem] = self.rows([uid])
        if problem:
            raise ConfigError(problem)
        return vectors[0]

    def rows(self, uids: Sequence[str]) -> tuple[Floats, list[str]]:
        """z_image of rows of the index, (N, D), read together: from an object store many at a time.

        Returns:
            The vectors, zero for a uid that no row has; and for each uid what is wrong with it, empty if nothing is.
        """
        vectors = np.zeros((len(uids), self._retriever.index.embed_dim), np.float32)
        ids = self._retriever.ids_of(uids)
        is_row = ids >= 0
        vectors[is_row] = self._retriever.index.vectors(ids[is_row])
        problems = [
            "" if there else f"uid {uid}: no row of the index has it"
            for uid, there in zip(uids, is_row.tolist(), strict=True)
        ]
        return vectors, problems

    def _encode_one(self, query: Query) -> Floats:
        if query.kind == "text":
            return self.texts([query.value])[0]
        if query.kind == "image":
            return self.picture(query.value)
        if query.kind == "uid":
            return self.row(query.value)
        return read_embedding(query.value, self._retriever.index.embed_dim)


def read_embedding(path: str, embed_dim: int) -> Floats:
    """The direction of a vector in a file: (D,) or (1, D) of ``.npy``, or a list of numbers in JSON.

    Raises:
        ConfigError: If it cannot be read, or is not D finite numbers; names the file.
    """
    try:
        if path.endswith(".json"):
            value: Any = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        else:
            value = np.load(path, allow_pickle=False)
        return to_direction(value, embed_dim)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, TypeError, RecursionError, EOFError) as error:
        raise ConfigError(f"{path}: is no embedding of {embed_dim} numbers (.npy or .json): {error}") from None


def to_direction(value: Any, embed_dim: int) -> Floats:
    """A vector of length one, (D,).

    Raises:
        ValueError: If the value is not D finite numbers that are not all zero.
    """
    vector = np.asarray(value)
    if vector.dtype.kind not in "fiu" or vector.size != embed_dim or vector.ndim > 2:
        raise ValueError(f"{vector.dtype} of shape {vector.shape}; this index takes {embed_dim} numbers")
    vector = vector.reshape(-1).astype(np.float64)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise ValueError("its numbers are not finite, or all zero")
    return (vector / length).astype(np.float32)
