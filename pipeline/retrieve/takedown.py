"""Pairs that no index of a workspace may return: ``takedown.txt`` in the workspace, with a uid or a URL in each line.

`unclip delete` adds lines and `unclip restore` removes them. Every build of an index reads the file, whatever its
recipe and its embeddings, so a deleted pair does not come back with a new index. The same holds for what the workspace
has forgotten (``pipeline/workspace/forgotten.py``).
"""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.blank import are_forgotten
from pipeline.errors import ConfigError
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.store import Artifact

TAKEDOWN = "takedown.txt"


@dataclass(frozen=True)
class Takedown:
    """The uids and URLs of the file, each once, in the order in which they were added."""

    names: tuple[str, ...] = ()
    forgotten: Forgotten = field(default_factory=lambda: Forgotten(""))
    """Pairs that the workspace has forgotten, for which there are hashes alone."""

    @classmethod
    def read(cls, workspace: str) -> "Takedown":
        """The file of a workspace, by its root; no names if there is none."""
        root, forgotten = Artifact(workspace), Forgotten.read(workspace)
        if not root.exists(TAKEDOWN):
            return cls((), forgotten)
        lines = root.path(TAKEDOWN).read_bytes().decode("utf-8-sig").split("\n")  # a URL may have any other line break
        return cls(tuple(filter(None, lines)), forgotten)

    def write(self, workspace: str) -> None:
        """Replace the file of a workspace."""
        Artifact(workspace).write_bytes(TAKEDOWN, "".join(f"{name}\n" for name in self.names).encode())

    def add(self, names: Iterable[str]) -> "Takedown":
        """With more names.

        Raises:
            ConfigError: If a name has a line break: the file would hold two others.
        """
        all_names = tuple(dict.fromkeys([*self.names, *names]))
        for name in all_names:
            if "\n" in name:
                raise ConfigError(f"{name!r}: a name with a line break; give the uid of the pair")
        return replace(self, names=all_names)

    def remove(self, names: Iterable[str]) -> "Takedown":
        """Without some names."""
        removed = set(names)
        return replace(self, names=tuple(name for name in self.names if name not in removed))

    @property
    def digest(self) -> str:
        """SHA-256 of the names, and of what is forgotten."""
        forgotten = [self.forgotten.digest] if self.forgotten.entries else []
        return hashlib.sha256("\n".join([*self.names, *forgotten]).encode()).hexdigest()

    def has(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Whether the uid or the URL of each row is named or forgotten: (rows,)."""
        is_forgotten = are_forgotten(rows, self.forgotten)
        if not self.names:
            return is_forgotten
        uids, urls = (rows.column(column).to_pylist() for column in ("uid", "url"))
        is_named = [uid in self._name_set or url in self._name_set for uid, url in zip(uids, urls, strict=True)]
        return np.array(is_named, np.bool_) | is_forgotten

    @functools.cached_property
    def _name_set(self) -> frozenset[str]:
        """The names, hashed once: a build asks for every shard, and there may be millions of names."""
        return frozenset(self.names)
