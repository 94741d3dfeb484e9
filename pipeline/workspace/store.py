"""Artifacts in a workspace.

An artifact is the folder ``workspace/<step>/<key>/``. ``manifest.json`` comes last and is the commit. Files for a
running step only (progress, checkpoints) are under ``live/``; the commit removes them. Shards of a data step are
committed one by one with a record, ``<shard>.done.json``, written after the shard's files.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, StepError
from pipeline.workspace.disk import names_in, own_folder
from pipeline.workspace.folder import Folder, description_of, json_bytes
from pipeline.workspace.local_files import LocalFiles
from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.objects import ObjectStore

Json = dict[str, Any]

MANIFEST = "manifest.json"
RECORD_SUFFIX = ".done.json"
ALL_RECORDS = f"all.shards{RECORD_SUFFIX}"  # no shard has a point in its name
"""The records of all shards in one file, which counts while the step is finished: a hundred thousand files take minutes
to read from an object store, by every worker that reads the step."""
LIVE = "live/"
INPUTS = f"{LIVE}inputs.json"
"""Content of each input of a step that is not finished, when it began."""


class Workspace:
    """The root of all artifacts.

    Args:
        root: A local folder, or a URI that fsspec understands (``s3://bucket/prefix``, ``gs://...``).
    """

    def __init__(self, root: str) -> None:
        self.is_local = "://" not in root or root.startswith("file://")
        self.root = os.path.abspath(root.removeprefix("file://")) if self.is_local else root.rstrip("/")  # noqa: PTH100  (a string, as a URI is)

    def artifact(self, step: str, key: str) -> "Artifact":
        """The artifact of one step under one key, committed or not."""
        return Artifact(f"{self.root}/{step}/{key}")

    def manifests(self, step: str) -> tuple[list[Manifest], list[str]]:
        """The manifests of every committed artifact of a step, the newest first; and why the others cannot be read."""
        manifests: list[Manifest] = []
        damages: list[str] = []
        for key in self.keys(step):
            try:
                manifest = self.artifact(step, key).manifest()
            except DataError as error:
                damages.append(str(error))
                continue
            if manifest is not None:
                manifests.append(manifest)
        return sorted(manifests, key=lambda manifest: manifest.created, reverse=True), damages

    def keys(self, step: str) -> list[str]:
        """The keys under which a step has files, committed or not, sorted."""
        if not self.is_local:
            store = ObjectStore(f"{self.root}/{step}")
            return store.folders(store.path)
        return sorted(names_in(f"{self.root}/{step}"))

    def check(self) -> None:
        """Make sure that the place of the workspace answers.

        Raises:
            ConfigError: If it is an object store whose package, credentials, bucket or endpoint is missing.
        """
        if not self.is_local:
            ObjectStore(self.root).check()

    @property
    def local_root(self) -> Path:
        """The folder for what must be a local file (the default tracker's database, the report).

        Of a workspace in an object store it is a folder of this machine: ``publish`` brings its files there.
        """
        if self.is_local:
            return Path(self.root)
        folder = own_folder("unclip") / hashlib.sha256(self.root.encode()).hexdigest()[:12]
        folder.mkdir(exist_ok=True)
        return folder

    def publish(self, name: str) -> str:
        """Bring a file of ``local_root`` into the workspace, if it is there; returns where it is then.

        A database may be in use meanwhile: what is brought is whole.
        """
        local = self.local_root / name
        if self.is_local or not local.exists():
            return str(local)
        root = Folder(self.root)
        with root.write(name) as path:
            if name.endswith(".db"):
                with (
                    contextlib.closing(sqlite3.connect(local)) as source,
                    contextlib.closing(sqlite3.connect(path)) as copy,
                ):
                    source.backup(copy)
            else:
                shutil.copyfile(local, path)
        return f"{self.root}/{name}"

    def restore(self, name: str, folder: Path | None = None) -> None:
        """Bring a file of the workspace here, if it has one: another machine may have published it.

        Args:
            name: The file; nobody must have it open.
            folder: Where it is brought; None: to ``local_root``.
        """
        root = Folder(self.root)
        if not self.is_local and root.exists(name):
            shutil.copyfile(root.path(name), (folder or self.local_root) / name)


class Artifact(Folder):
    """The files that one step writes."""

    def clear(self) -> None:
        """Remove every file, the commit first."""
        self.remove(MANIFEST)
        self.remove_all(self.names())

    def destroy(self) -> None:
        """Remove the artifact, the commit first, with what was never published."""
        self.remove(MANIFEST)
        self.remove_all(self.sizes())
        if isinstance(self._files, LocalFiles):
            self._files.remove_folder()

    def commit_shard(self, record: ShardRecord) -> None:
        """Publish a shard's record; its files must be published already."""
        self.write_json(f"{record.shard}{RECORD_SUFFIX}", record.to_dict())

    def shard_records(self, *, live: bool = True) -> dict[str, ShardRecord]:
        """The committed shards, by name, sorted; not those of an artifact of its own in ``live/``.

        Args:
            live: Whether shards of this artifact may be live files themselves; else nothing in ``live/`` is read.
        """
        if self.exists(MANIFEST):
            content = self.find_bytes(ALL_RECORDS)
            if content is not None:
                return self._folded(content)
        records = {name: self._record(name, content) for name, content in self._record_files(live=live)}
        return {record.shard: record for name, record in records.items() if name == f"{record.shard}{RECORD_SUFFIX}"}

    def shard_record(self, shard: str) -> ShardRecord:
        """One committed shard."""
        name = f"{shard}{RECORD_SUFFIX}"
        return self._record(name, self.read_bytes(name))

    def fold_records(self) -> dict[str, ShardRecord]:
        """Write the records of all shards but the live ones into one file, before the step is committed; returns them.

        A finished index has no such file, because a change of it reads the records of its own, live parts.
        """
        records = dict[str, ShardRecord]()
        for name, content in self._record_files(live=False):
            record = self._record(name, content)
            if name == f"{record.shard}{RECORD_SUFFIX}":
                records[record.shard] = record
                self._descriptions[name] = description_of(content)
        if records:
            lines = ",\n".join(json.dumps(record.to_dict(), sort_keys=True) for record in records.values())
            content = f"[{lines}]\n".encode()
            self.write_bytes(ALL_RECORDS, content)
            self._descriptions[ALL_RECORDS] = description_of(content)
        return records

    def manifest(self) -> Manifest | None:
        """The manifest, or None if the step has not finished.

        Raises:
            DataError: If there is one that cannot be read; names the file and says what to do.
        """
        content = self.find_bytes(MANIFEST)
        if content is None:
            return None
        try:
            return Manifest.from_dict(json.loads(content))
        except ValueError as error:
            raise DataError(f"{self.uri}/{MANIFEST}: not valid JSON ({error}); {self.mend()}") from None
        except DataError as error:
            mend = "use its release" if "newer" in str(error) else self.mend()
            raise DataError(f"{self.uri}/{MANIFEST}: {error}; {mend}") from None

    def commit(self, manifest: Manifest) -> None:
        """Publish the manifest, and with it the artifact; then remove the live files, and what killed writers left.

        Raises:
            StepError: If another run has committed the artifact in an object store.
        """
        content = json_bytes(manifest.to_dict())
        if isinstance(self._files, LocalFiles):
            self.write_bytes(MANIFEST, content)
        elif not self._files.create(MANIFEST, content):
            raise StepError(f"{self.uri}: another run has committed this step; run again to go on from there")
        self.remove_all([name for name in self._files.all_names() if name.startswith(LIVE)])
        self.clear_temporaries()

    def describe_files(self, records: Mapping[str, ShardRecord] | None = None) -> dict[str, Json]:
        """Size and SHA-256 of every published file but the manifest and the live ones, for the manifest.

        Args:
            records: The records of all shards; None: they are read.
        """
        records = self.shard_records() if records is None else records
        shard_files = {name: info for record in records.values() for name, info in record.files.items()}
        described: dict[str, Json] = {}
        for name in self.names():
            if name == MANIFEST or name.startswith(LIVE):
                continue
            described[name] = shard_files[name] if name in shard_files else self.describe(name)
        return described

    def verify(self, name: str, description: Json | None = None) -> None:
        """Check one file against what is recorded of it.

        Args:
            name: The file.
            description: Its size and SHA-256; by default those of the manifest, if it has the file.

        Raises:
            DataError: If its size or checksum differs; names the file.
        """
        manifest = self.manifest() if description is None else None
        expected = manifest.files.get(name) if manifest else description
        if expected is not None and self._described(name) != expected:
            raise DataError(f"{self.uri}/{name}: does not match its checksum; {self.mend()}")

    def _recorded_sha256(self, name: str) -> str:
        record = f"{name.partition('.')[0]}{RECORD_SUFFIX}"
        content = self.find_bytes(record)
        files = {} if content is None else self._record(record, content).files
        return str(files[name]["sha256"]) if name in files else ""

    def _record_files(self, *, live: bool) -> Iterator[tuple[str, bytes]]:
        names = [name for name in self.names() if name.endswith(RECORD_SUFFIX) and name != ALL_RECORDS]
        names = [name for name in names if live or not name.startswith(LIVE)]
        return zip(names, self.read_many(names), strict=True)

    def _folded(self, content: bytes) -> dict[str, ShardRecord]:
        try:
            return {record.shard: record for record in ShardRecord.list_from_json(content)}
        except DataError as error:
            raise DataError(f"{self.uri}/{ALL_RECORDS}: {error}; remove this file") from None

    def _record(self, name: str, content: bytes) -> ShardRecord:
        try:
            return ShardRecord.from_dict(json.loads(content))
        except (DataError, ValueError) as error:
            mend = self.mend() if self.exists(MANIFEST) else "remove this record: its shard alone is made again"
            raise DataError(f"{self.uri}/{name}: {error}; {mend}") from None


class UserArtifact(Artifact):
    """A folder of a person's own that is laid out like an artifact, such as one of ``init_from``: no step makes it."""

    def mend(self) -> str:
        """See ``Folder``."""
        return f"bring {self.uri} back from where it came from, or name another folder in the recipe"
