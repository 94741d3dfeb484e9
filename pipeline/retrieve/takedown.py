"""Pairs that no index of a workspace may return: ``takedown.txt`` in the workspace, with a uid or a URL in each line.

`unclip delete` adds lines and `unclip restore` removes them. Every build of an index reads the file, whatever its
recipe and its embeddings, so a deleted pair does not come back with a new index. The same holds for what the workspace
has forgotten (``pipeline/workspace/forgotten.py``).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from pipeline.data.blank import are_forgotten
from pipeline.errors import ConfigError
from pipeline.workspace.forgotten import Forgotten
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are made when it is imported, and have no types

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
        names = pa.array(self.names, pa.string())
        is_named = pc.or_(*(pc.is_in(rows.column(column), value_set=names) for column in ("uid", "url")))
        return np.asarray(is_named.to_numpy()) | is_forgotten
