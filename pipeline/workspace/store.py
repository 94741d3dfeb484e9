"""Artifacts in a workspace, which is a local folder or an object-store URI; only this module knows which.

An artifact is the folder ``workspace/<step>/<key>/``. Every file is written to a temporary name, synced and renamed (on
an object store: uploaded whole), so that a reader never sees half a file. ``manifest.json`` comes last and is the
commit. Files for a running step only (progress, checkpoints) are under ``live/``; the commit removes them.
Shards of a data step are committed one by one with a record, ``<shard>.done.json``, written after the shard's files.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import uuid
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pipeline.errors import DataError, StepError
from pipeline.workspace.cache import Cached, Version, cached_path, keep, lookup, sha256_of, temporary_file
from pipeline.workspace.disk import own_folder, translate_os_errors
from pipeline.workspace.manifest import Manifest, ShardRecord
from pipeline.workspace.objects import ObjectStore, RangedFile, file_system, stamp_of

Json = dict[str, Any]

MANIFEST = "manifest.json"
RECORD_SUFFIX = ".done.json"
ALL_RECORDS = f"all.shards{RECORD_SUFFIX}"  # no shard has a point in its name
"""The records of all shards in one file, which counts while the step is finished: a hundred thousand files take minutes
to read from an object store, by every worker that reads the step."""
LIVE = "live/"
INPUTS = f"{LIVE}inputs.json"
"""Content of each input of a step that is not finished, when it began."""
_TEMPORARY = ".tmp-"
_BLOCK_BYTES = 8 << 20
_SMALL_BYTES = 1 << 20  # fetched whole in the time of one request


class _DiffersError(DataError):
    """A file is not the one that a record describes."""


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
        folder = Path(self.root) / step
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

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
        root = Artifact(self.root)
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

    def restore(self, name: str) -> None:
        """Bring a file of the workspace to ``local_root``, if it has one: another machine may have published it."""
        root = Artifact(self.root)
        if not self.is_local and root.exists(name):
            shutil.copyfile(root.path(name), self.local_root / name)


class Artifact:
    """The files that one step writes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        files, base = file_system(uri)
        self._files: Any = files
        self._base: str = base
        self._is_local = "://" not in uri
        self._descriptions: dict[str, Json] = {}
        """Of files whose content this object has had in its hands, until `describe` takes them: at the commit of a
        hundred thousand shards, three requests for each record were hours."""

    @property
    def key(self) -> str:
        """The last part of the URI."""
        return self.uri.rpartition("/")[2]

    def __reduce__(self) -> tuple[type["Artifact"], tuple[str]]:
        return (Artifact, (self.uri,))

    @contextlib.contextmanager
    def write(self, name: str) -> Generator[Path]:
        """A local path to write a file to; leaving the block without an error publishes it under ``name`` at once.

        Raises:
            StepError: If the disk is full or the place cannot be written; nothing is left behind.
        """
        self._descriptions.pop(name, None)
        if not self._is_local:
            with temporary_file(Path(name).name) as temporary, translate_os_errors(f"{self.uri}/{name}"):
                yield temporary
                self._upload(temporary, name)
            return
        target = Path(self._base) / name
        with translate_os_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{target.name}")
        try:
            with translate_os_errors(f"{self.uri}/{name}"):
                yield temporary
                _publish(temporary, target)
        finally:
            _remove(temporary)

    def link(self, name: str, uri: str) -> None:
        """Publish a user's file under ``name``: by a link if both are on local disks, else by a copy.

        Raises:
            DataError: If the file cannot be read.
            StepError: If the place cannot be written.
        """
        if self._is_local and "://" not in uri:
            self.remove(name)
            target = Path(self._base) / name
            with translate_os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(Path(uri).resolve())
            return
        files, path = file_system(uri)
        with self.write(name) as copy:
            try:
                files.get_file(path, str(copy))
            except FileNotFoundError:
                raise DataError(f"{uri}: no such file") from None

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        if self._is_local:
            with self.write(name) as path:
                path.write_bytes(data)
        else:
            self._descriptions.pop(name, None)
            self._files.pipe_file(f"{self._base}/{name}", data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file whole, keys sorted."""
        self.write_bytes(name, _json_bytes(value))

    def path(self, name: str) -> Path:
        """A local path to read ``name`` from; an object store's file is fetched once for all processes of the machine.

        Raises:
            DataError: If the artifact has no such file, or it is not what its record says.
        """
        if not self._is_local:
            return self._cached(name, self._version(name))
        local = Path(self._base) / name
        if not local.exists():
            raise self._missing(name)
        return local

    def matching(self, name: str, described: Json) -> Path | None:
        """As ``path``, of a file that is compared with its size and SHA-256 in a record; None if it differs.

        Raises:
            DataError: If the artifact has no such file.
        """
        if self._is_local:
            return self.path(name) if self.describe(name) == described else None
        with contextlib.suppress(_DiffersError):
            return self._cached(name, self._version(name), described)
        return None

    def ranged(self, name: str) -> Path | RangedFile:
        """What pyarrow reads parts of ``name`` from: a local path, or a file of an object store, read by ranges.

        Raises:
            DataError: If the artifact has no such file.
        """
        if self._is_local:
            return self.path(name)
        version = self._version(name)
        if version.num_bytes <= _SMALL_BYTES or lookup(f"{self.uri}/{name}", version):
            return self._cached(name, version)
        return cast("RangedFile", self._files.open(f"{self._base}/{name}"))

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            DataError: If it is missing or malformed.
        """
        try:
            return self._parsed(name, self._files.cat_file(f"{self._base}/{name}"))
        except FileNotFoundError:
            raise self._missing(name) from None

    def read_jsons(self, names: Sequence[str]) -> list[Any]:
        """Read JSON files, many at a time from an object store.

        Raises:
            DataError: If one is missing or malformed.
        """
        if self._is_local:
            return [self.read_json(name) for name in names]
        try:
            contents = self._files.cat_files([f"{self._base}/{name}" for name in names])
        except FileNotFoundError:
            raise self._missing(min(set(names) - set(self.names()), default=", ".join(names))) from None
        return [self._parsed(name, content) for name, content in zip(names, contents, strict=True)]

    def find_json(self, name: str) -> Any:
        """Read a JSON file, or None if there is none.

        Raises:
            DataError: If it is malformed.
        """
        try:
            content = self._files.cat_file(f"{self._base}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._parsed(name, content)

    def _parsed(self, name: str, content: bytes) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}: not valid JSON ({error}); {self._mend()}") from None

    def exists(self, name: str) -> bool:
        """Whether the artifact has the file."""
        return bool(self._files.exists(f"{self._base}/{name}"))

    def names(self) -> list[str]:
        """Every published file, by its path inside the artifact, sorted."""
        paths = list(cast("Sequence[str]", self._files.find(self._base)))
        names = [path[len(self._base) :].lstrip("/") for path in paths]
        return sorted(name for name in names if _TEMPORARY not in name)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, also of those that are being written, by its path inside the artifact.

        A link to a user's file counts as nothing, because removing it frees nothing.
        """
        if not self._is_local:
            files = self._files.find(self._base)
            return {path[len(self._base) :].lstrip("/"): int(info["size"]) for path, info in files.items()}
        base = Path(self._base)
        files = [path for path in base.rglob("*") if path.is_symlink() or path.is_file()]
        return {str(path.relative_to(base)): 0 if path.is_symlink() else path.stat().st_size for path in files}

    def clear(self) -> None:
        """Remove every file, the commit first."""
        self.remove(MANIFEST)
        self.remove_all(self.names())

    def destroy(self) -> None:
        """Remove the artifact, the commit first, with what was never published."""
        self.remove(MANIFEST)
        self.remove_all(self.sizes())
        if self._is_local:
            shutil.rmtree(self._base, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove one file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._base}/{name}")

    def remove_all(self, names: Collection[str]) -> None:
        """Remove files, a thousand with one request where the store can."""
        if not names:
            return
        if self._is_local:
            for name in names:
                self.remove(name)
        else:
            self._files.rm_files([f"{self._base}/{name}" for name in names])
            for name in self.sizes().keys() & set(names):  # a store names no file of a batch that it did not remove
                self.remove(name)

    def move(self, name: str, target: "Artifact") -> None:
        """Move a file to another artifact of the same workspace, in the place of its file of this name."""
        if self._is_local:
            (Path(self._base) / name).replace(Path(target._base) / name)
        else:
            self._files.mv(f"{self._base}/{name}", f"{target._base}/{name}")

    def commit_shard(self, record: ShardRecord) -> None:
        """Publish a shard's record; its files must be published already."""
        self.write_json(f"{record.shard}{RECORD_SUFFIX}", record.to_dict())

    def shard_records(self, *, live: bool = True) -> dict[str, ShardRecord]:
        """The committed shards, by name, sorted; not those of an artifact of its own in ``live/``.

        Args:
            live: Whether shards of this artifact may be live files themselves; else nothing in ``live/`` is read.
        """
        if self.exists(MANIFEST):
            with contextlib.suppress(FileNotFoundError):
                return self._folded(self._files.cat_file(f"{self._base}/{ALL_RECORDS}"))
        records = {name: self._record(name, content) for name, content in self._record_files(live=live)}
        return {record.shard: record for name, record in records.items() if name == f"{record.shard}{RECORD_SUFFIX}"}

    def _record_files(self, *, live: bool) -> Iterator[tuple[str, bytes]]:
        names = [name for name in self.names() if name.endswith(RECORD_SUFFIX) and name != ALL_RECORDS]
        names = [name for name in names if live or not name.startswith(LIVE)]
        paths = [f"{self._base}/{name}" for name in names]
        contents = map(self._files.cat_file, paths) if self._is_local else self._files.cat_files(paths)
        return zip(names, contents, strict=True)

    def shard_record(self, shard: str) -> ShardRecord:
        """One committed shard."""
        name = f"{shard}{RECORD_SUFFIX}"
        return self._record(name, self._files.cat_file(f"{self._base}/{name}"))

    def fold_records(self) -> dict[str, ShardRecord]:
        """Write the records of all shards but the live ones into one file, before the step is committed; returns them.

        A finished index has no such file, because a change of it reads the records of its own, live parts.
        """
        records = dict[str, ShardRecord]()
        for name, content in self._record_files(live=False):
            record = self._record(name, content)
            if name == f"{record.shard}{RECORD_SUFFIX}":
                records[record.shard] = record
                self._descriptions[name] = _description(content)
        if records:
            lines = ",\n".join(json.dumps(record.to_dict(), sort_keys=True) for record in records.values())
            content = f"[{lines}]\n".encode()
            self.write_bytes(ALL_RECORDS, content)
            self._descriptions[ALL_RECORDS] = _description(content)
        return records

    def _folded(self, content: bytes) -> dict[str, ShardRecord]:
        try:
            return {record.shard: record for record in ShardRecord.list_from_json(content)}
        except DataError as error:
            raise DataError(f"{self.uri}/{ALL_RECORDS}: {error}; remove this file") from None

    def _record(self, name: str, content: bytes) -> ShardRecord:
        try:
            return ShardRecord.from_dict(json.loads(content))
        except (DataError, ValueError) as error:
            mend = self._mend() if self.exists(MANIFEST) else "remove this record: its shard alone is made again"
            raise DataError(f"{self.uri}/{name}: {error}; {mend}") from None

    def manifest(self) -> Manifest | None:
        """The manifest, or None if the step has not finished.

        Raises:
            DataError: If there is one that cannot be read; names the file and says what to do.
        """
        try:
            content = self._files.cat_file(f"{self._base}/{MANIFEST}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return Manifest.from_dict(json.loads(content))
        except ValueError as error:
            raise DataError(f"{self.uri}/{MANIFEST}: not valid JSON ({error}); {self._mend()}") from None
        except DataError as error:
            mend = "use its release" if "newer" in str(error) else self._mend()
            raise DataError(f"{self.uri}/{MANIFEST}: {error}; {mend}") from None

    def commit(self, manifest: Manifest) -> None:
        """Publish the manifest, and with it the artifact; then remove the live files.

        Raises:
            StepError: If another run has committed the artifact in an object store.
        """
        content = _json_bytes(manifest.to_dict())
        if self._is_local:
            self.write_bytes(MANIFEST, content)
        elif not self._files.create(f"{self._base}/{MANIFEST}", content):
            raise StepError(f"{self.uri}: another run has committed this step; run again to go on from there")
        self.remove_all([name for name in self.names() if name.startswith(LIVE)])

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

    def describe(self, name: str) -> Json:
        """Size in bytes and SHA-256 of one published file; of one that this object uploaded or folded, as it was."""
        description = self._descriptions.pop(name, None)
        return self._described(name) if description is None else description

    def _described(self, name: str) -> Json:
        if self._is_local:
            local = self.path(name)
            return {"bytes": local.stat().st_size, "sha256": sha256_of(local)}
        version = self._version(name)
        cached = lookup(f"{self.uri}/{name}", version)
        if cached is not None:
            return {"bytes": version.num_bytes, "sha256": cached.sha256}
        digest = hashlib.sha256()
        with self._files.open(f"{self._base}/{name}", _BLOCK_BYTES) as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return {"bytes": version.num_bytes, "sha256": digest.hexdigest()}

    def verify(self, name: str) -> None:
        """Check one file against the manifest.

        Raises:
            DataError: If its size or checksum differs; names the file.
        """
        manifest = self.manifest()
        expected = manifest.files.get(name) if manifest else None
        if expected is not None and self._described(name) != expected:
            raise DataError(f"{self.uri}/{name}: does not match its checksum; {self._mend()}")

    def _mend(self) -> str:
        """What to do about a damaged file of a finished step, without deleting what a person might need."""
        return f"bring it back from a copy, or move {self.uri} away and run the step again"

    def clear_temporaries(self) -> None:
        """Remove what a killed writer left behind; call only while no other writer is alive."""
        if not self._is_local:
            self._files.abort_uploads(self._base)
        elif Path(self._base).exists():
            for path in Path(self._base).rglob(f"{_TEMPORARY}*"):
                _remove(path)

    def _missing(self, name: str) -> DataError:
        return DataError(f"{self.uri}: no file {name}; {self._mend()}")

    def _version(self, name: str) -> Version:
        info = self._files.file_info(f"{self._base}/{name}")
        if info is None or info.get("type") == "directory":
            raise self._missing(name)
        return Version(stamp_of(info), int(info["size"]))

    def _upload(self, temporary: Path, name: str) -> None:
        """Upload a file; it moves into the cache, so that this machine neither fetches nor reads it again."""
        sha256, num_bytes = sha256_of(temporary), temporary.stat().st_size
        self._files.put_file(str(temporary), f"{self._base}/{name}")
        self._descriptions[name] = {"bytes": num_bytes, "sha256": sha256}
        version = self._version(name)
        if version.num_bytes == num_bytes:  # else somebody has replaced it already
            keep(f"{self.uri}/{name}", temporary, Cached(version, sha256))

    def _cached(self, name: str, version: Version, described: Json | None = None) -> Path:
        """Fetch a file, and compare it with ``described``, or with its record if that is not given."""

        def check(sha256: str) -> None:
            if described is not None:
                if described != {"bytes": version.num_bytes, "sha256": sha256}:
                    raise _DiffersError(f"{self.uri}/{name}")
                return
            record = f"{name.partition('.')[0]}{RECORD_SUFFIX}"
            with contextlib.suppress(FileNotFoundError):
                files = self._record(record, self._files.cat_file(f"{self._base}/{record}")).files
                if name in files and files[name]["sha256"] != sha256:
                    raise DataError(f"{self.uri}/{name}: does not match its checksum; {self._mend()}")

        def fetch(path: Path) -> None:
            try:
                self._files.get_file(f"{self._base}/{name}", str(path), version.num_bytes)
            except FileNotFoundError:
                raise self._missing(name) from None

        path, sha256 = cached_path(f"{self.uri}/{name}", version, fetch, check)
        if described is not None:  # it was here before, and compared with another record, or with none
            check(sha256)
        return path


def _description(content: bytes) -> Json:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _publish(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
        os.fchmod(stream.fileno(), 0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
    temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
