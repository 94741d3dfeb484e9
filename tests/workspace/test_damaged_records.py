"""A damaged file of records is one sentence that names it; no advice takes a whole folder of work away."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.recipe.champion import champions
from pipeline.recipe.lineage import exported_weights
from pipeline.retrieve.versions import read_version
from pipeline.train.results import read_beside
from pipeline.workspace.forgotten import FORGOTTEN, PENDING, Forgotten, Pending
from pipeline.workspace.progress import PROGRESS, read_progress
from pipeline.workspace.store import Artifact, Workspace

_BRING = "bring it back from a copy"


@pytest.mark.parametrize(
    ("name", "read", "mend"),
    [
        (FORGOTTEN, Forgotten.read, f"{_BRING}$"),
        (PENDING, Pending.read, f"{_BRING}$"),
        ("recipes/my/champion.json", lambda root: champions(Workspace(root)), f"{_BRING}$"),
        (PROGRESS, lambda root: read_progress(Artifact(root)), "remove this file"),
        ("index.json", lambda root: read_version(Artifact(root)), _BRING),
        ("live/validation/beside.json", lambda root: read_beside(Artifact(root)), "remove this file"),
        ("unclip.json", lambda root: exported_weights(Artifact(f"{root}/prior")), "export the networks again"),
    ],
)
@pytest.mark.parametrize("content", [b"[1]", b"{", b"", b"\xff\xfe"])
def test_a_damaged_file_is_named(
    name: str, read: Callable[[str], object], mend: str, content: bytes, tmp_path: Path
) -> None:
    Artifact(str(tmp_path)).write_bytes(name, content)
    with pytest.raises(DataError, match=f"^{re.escape(f'{tmp_path}/{name}')}: .*; {mend}"):
        read(str(tmp_path))
