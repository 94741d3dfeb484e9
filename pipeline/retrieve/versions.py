"""The versions of an index: an immutable file for each, so that a reader sees one of them whole.

``index.json`` is version 0, which the step built. A change writes ``changes/<number>.json``, after the files that it
names. The newest number is the index; an earlier version and its files, but ``index.json``, stay until the next change
but one removes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import StepError
from pipeline.recipe.appended import CHANGE, newest_change
from pipeline.retrieve.embedded import Ids
from pipeline.workspace.manifest import read_record
from pipeline.workspace.objects import Json
from pipeline.workspace.store import Artifact

FIRST_VERSION = "index.json"
BASE_SEGMENT = "segment_00000"
"""The segment that the step built."""
_DESCRIPTIONS = "files.json"


@dataclass(frozen=True)
class Version:
    """What an index consists of."""

    number: int
    """Changes since the index was built."""
    segments: tuple[str, ...]
    """Folders of the segments; an id is searched in this order."""
    deleted: str
    """File with the sorted ids of deleted rows; empty: none is deleted."""
    deleted_described: Json = field(default_factory=dict[str, Any])
    """Size and SHA-256 of that file; empty if an earlier release wrote it, or there is none."""

    @property
    def file(self) -> str:
        """Name of the version's file."""
        return f"changes/{self.number:06d}.json" if self.number else FIRST_VERSION

    def write(self, index: Artifact) -> None:
        """Publish the version; its files must be published already."""
        index.write_json(self.file, asdict(self))

    def read_deleted(self, index: Artifact) -> Ids:
        """The sorted ids of deleted rows."""
        return np.load(index.path(self.deleted)) if self.deleted else np.zeros(0, np.int64)


def read_version(index: Artifact, number: int | None = None) -> Version:
    """The newest version, or that of a number.

    Raises:
        DataError: If its file is missing or damaged.
        StepError: If the version of this number is gone.
    """
    if number is None:
        name, content = newest_change(index) or (FIRST_VERSION, index.read_bytes(FIRST_VERSION))
        return _parse(index, name, content)
    name = Version(number, (), "").file
    content = index.find_bytes(name)
    if content is None and (newest := read_version(index)).number > number:
        raise version_is_gone(index, number, newest.number)
    return _read(index, name) if content is None else _parse(index, name, content)


def version_is_gone(index: Artifact, number: int, newest: int) -> StepError:
    """The error for a version whose files later changes have removed."""
    return StepError(f"{index.uri}: version {number} is gone: the index has version {newest} by now")


def last_versions(index: Artifact, names: Sequence[str], count: int) -> list[Version]:
    """The last versions, the newest last.

    Args:
        index: The index.
        names: Of its files, sorted; only these versions are read, however many changes there were.
        count: How many, at most.

    Raises:
        DataError: If a file is missing or damaged.
    """
    changes = [name for name in names if CHANGE.fullmatch(name)]
    return [_read(index, name) for name in [FIRST_VERSION, *changes][-count:]]


def describe_segment(index: Artifact, segment: str, descriptions: Mapping[str, Json]) -> None:
    """Write size and SHA-256 of the files of a segment that no manifest describes, before a version names it.

    Args:
        index: The index.
        segment: The segment's folder.
        descriptions: Of files, by the process that wrote them; the others are read.
    """
    index.learn(descriptions)
    target = f"{segment}/{_DESCRIPTIONS}"  # a change that was stopped here may have left one, which does not count
    files = [name for name in index.names() if name.startswith(f"{segment}/") and name != target]
    index.write_json(target, {name: index.describe(name) for name in files})


def descriptions_of(index: Artifact, version: Version) -> dict[str, Json]:
    """Size and SHA-256 of the files of a version, its segments' and that of its deleted rows, by name."""
    manifest = index.manifest()
    described = dict(manifest.files) if manifest else {}
    for segment in version.segments:
        described |= index.find_json(f"{segment}/{_DESCRIPTIONS}") or {}
    descriptions = {name: one for name, one in described.items() if name.partition("/")[0] in version.segments}
    return descriptions | ({version.deleted: version.deleted_described} if version.deleted_described else {})


def _read(index: Artifact, name: str) -> Version:
    return _parse(index, name, index.read_bytes(name))


def _parse(index: Artifact, name: str, content: bytes) -> Version:
    return read_record(Version, content, f"{index.uri}/{name}", index.mend())
