"""Artifacts in a workspace, which is a local folder or an object-store URI; only this module knows which.

An artifact is the folder ``workspace/<step>/<key>/``. Every file is written to a temporary name, synced and renamed (on
an object store: uploaded whole), so that a reader never sees half a file. ``manifest.json`` comes last and is the
commit. Files for a running step only (progress, checkpoints) are under ``live/``; the commit removes them.
Shards of a data step are committed one by one with a record, ``<shard>.done.json``, written after the shard's files.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import fsspec

from pipeline.errors import ConfigError, DataError, StepError, UnclipError
from pipeline.workspace.manifest import Manifest, ShardRecord

Json = dict[str, Any]

MANIFEST = "manifest.json"
RECORD_SUFFIX = ".done.json"
LIVE = "live/"
_TEMPORARY = ".tmp-"
_DISK_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, finished work is kept",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file is where a folder should be",
}


def file_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Raises:
        ConfigError: If no file system has this scheme, or its package is missing; names the package.
    """
    try:
        files, path = fsspec.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{uri}: {error}") from None
    return files, str(path)


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
        files, base = fsspec.url_to_fs(f"{self.root}/{step}")
        manifests: list[Manifest] = []
        damages: list[str] = []
        for name in sorted(files.ls(base, detail=False)) if files.exists(base) else []:
            try:
                manifest = self.artifact(step, Path(name).name).manifest()
            except DataError as error:
                damages.append(str(error))
                continue
            if manifest is not None:
                manifests.append(manifest)
        return sorted(manifests, key=lambda manifest: manifest.created, reverse=True), damages

    @property
    def local_root(self) -> Path:
        """The folder for what must be a local file (the default tracker's database, reports, locks)."""
        if self.is_local:
            return Path(self.root)
        return _own_folder("unclip") / hashlib.sha256(self.root.encode()).hexdigest()[:12]


class Artifact:
    """The files that one step writes."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        files, base = fsspec.url_to_fs(uri)
        self._files: Any = files
        self._base: str = base
        self._is_local = "://" not in uri

    def __reduce__(self) -> tuple[type["Artifact"], tuple[str]]:
        return (Artifact, (self.uri,))

    @contextlib.contextmanager
    def write(self, name: str) -> Generator[Path]:
        """A local path to write a file to; leaving the block without an error publishes it under ``name`` at once.

        Raises:
            StepError: If the disk is full or the place cannot be written; nothing is left behind.
        """
        if self._is_local:
            target = Path(self._base) / name
            with translate_os_errors(str(target)):
                target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{target.name}")
        else:
            folder = Path(tempfile.mkdtemp(prefix="unclip-"))
            temporary = folder / Path(name).name
        try:
            with translate_os_errors(f"{self.uri}/{name}"):
                yield temporary
                self._publish(temporary, name)
        finally:
            _remove(temporary if self._is_local else temporary.parent)

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
        with self.write(name) as path:
            path.write_bytes(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file whole, keys sorted."""
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def path(self, name: str) -> Path:
        """A local path to read ``name`` from; an object store's file is fetched once into a cache.

        Raises:
            DataError: If the artifact has no such file.
        """
        if self._is_local:
            local = Path(self._base) / name
        else:
            local = _own_folder("unclip-cache") / hashlib.sha256(self.uri.encode()).hexdigest()[:16] / name
            if not local.exists() and self.exists(name):
                local.parent.mkdir(parents=True, exist_ok=True)
                partial = local.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
                self._files.get_file(f"{self._base}/{name}", str(partial))
                partial.replace(local)
        if not local.exists():
            raise DataError(f"{self.uri}: no file {name}; {self._mend()}")
        return local

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            DataError: If it is missing or malformed.
        """
        try:
            return json.loads(self._files.cat_file(f"{self._base}/{name}"))
        except FileNotFoundError:
            raise DataError(f"{self.uri}: no file {name}; {self._mend()}") from None
        except ValueError as error:
            raise DataError(f"{self.uri}/{name}: not valid JSON ({error}); {self._mend()}") from None

    def exists(self, name: str) -> bool:
        """Whether the artifact has the file."""
        return bool(self._files.exists(f"{self._base}/{name}"))

    def names(self) -> list[str]:
        """Every published file, by its path inside the artifact, sorted."""
        if not self._files.exists(self._base):
            return []
        self._files.invalidate_cache()
        paths = cast("list[str]", self._files.find(self._base))
        names = [path[len(self._base) :].lstrip("/") for path in paths]
        return sorted(name for name in names if _TEMPORARY not in name)

    def clear(self) -> None:
        """Remove every file, the commit first."""
        self.remove(MANIFEST)
        for name in self.names():
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove one file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._base}/{name}")

    def move(self, name: str, target: "Artifact") -> None:
        """Move a file to another artifact of the same workspace, in the place of its file of this name."""
        if self._is_local:
            (Path(self._base) / name).replace(Path(target._base) / name)
        else:
            self._files.mv(f"{self._base}/{name}", f"{target._base}/{name}")

    def commit_shard(self, record: ShardRecord) -> None:
        """Publish a shard's record; its files must be published already."""
        self.write_json(f"{record.shard}{RECORD_SUFFIX}", record.to_dict())

    def shard_records(self) -> dict[str, ShardRecord]:
        """The committed shards, by name, sorted; not those of an artifact of its own in ``live/``."""
        records = {name: self._record(name) for name in self.names() if name.endswith(RECORD_SUFFIX)}
        return {record.shard: record for name, record in records.items() if name == f"{record.shard}{RECORD_SUFFIX}"}

    def shard_record(self, shard: str) -> ShardRecord:
        """One committed shard."""
        return self._record(f"{shard}{RECORD_SUFFIX}")

    def _record(self, name: str) -> ShardRecord:
        try:
            return ShardRecord.from_dict(json.loads(self._files.cat_file(f"{self._base}/{name}")))
        except (DataError, ValueError) as error:
            mend = self._mend() if self.exists(MANIFEST) else "remove this record: its shard alone is made again"
            raise DataError(f"{self.uri}/{name}: {error}; {mend}") from None

    def manifest(self) -> Manifest | None:
        """The manifest, or None if the step has not finished.

        Raises:
            DataError: If there is one that cannot be read; names the file and says what to do.
        """
        if not self.exists(MANIFEST):
            return None
        data = self.read_json(MANIFEST)
        try:
            return Manifest.from_dict(data)
        except DataError as error:
            mend = "use its release" if "newer" in str(error) else self._mend()
            raise DataError(f"{self.uri}/{MANIFEST}: {error}; {mend}") from None

    def commit(self, manifest: Manifest) -> None:
        """Publish the manifest, and with it the artifact; then remove the live files."""
        self.write_json(MANIFEST, manifest.to_dict())
        for name in self.names():
            if name.startswith(LIVE):
                self.remove(name)

    def describe_files(self) -> dict[str, Json]:
        """Size and SHA-256 of every published file but the manifest and the live ones, for the manifest."""
        shard_files = {name: info for record in self.shard_records().values() for name, info in record.files.items()}
        described: dict[str, Json] = {}
        for name in self.names():
            if name == MANIFEST or name.startswith(LIVE):
                continue
            described[name] = shard_files[name] if name in shard_files else self.describe(name)
        return described

    def describe(self, name: str) -> Json:
        """Size in bytes and SHA-256 of one published file."""
        digest, size = hashlib.sha256(), 0
        with self._files.open(f"{self._base}/{name}", "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def verify(self, name: str) -> None:
        """Check one file against the manifest.

        Raises:
            DataError: If its size or checksum differs; names the file.
        """
        manifest = self.manifest()
        expected = manifest.files.get(name) if manifest else None
        if expected is not None and self.describe(name) != expected:
            raise DataError(f"{self.uri}/{name}: does not match its checksum; {self._mend()}")

    def _mend(self) -> str:
        """What to do about a damaged file of a finished step, without deleting what a person might need."""
        return f"bring it back from a copy, or move {self.uri} away and run the step again"

    def clear_temporaries(self) -> None:
        """Remove what a killed writer left behind; call only while no other writer is alive."""
        if self._is_local and Path(self._base).exists():
            for path in Path(self._base).rglob(f"{_TEMPORARY}*"):
                _remove(path)

    def _publish(self, temporary: Path, name: str) -> None:
        if not self._is_local:
            self._files.put_file(str(temporary), f"{self._base}/{name}")
            return
        target = Path(self._base) / name
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
            os.fchmod(stream.fileno(), 0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def translate_os_errors(where: str) -> Generator[None]:
    """Turn a full or forbidden disk into a message.

    Raises:
        StepError: For a full disk or quota, a read-only disk, a missing permission, or a file in the place of a folder:
            from an OSError, or a library's error that quotes one (safetensors: SafetensorError, FAISS: RuntimeError).
    """
    try:
        yield
    except UnclipError:
        raise
    except OSError as error:
        if error.errno not in _DISK_REASONS:
            raise
        raise StepError(f"{where}: {_DISK_REASONS[error.errno]}") from error
    except Exception as error:  # each library has its own class; one that quotes no OSError passes unchanged
        reasons = [reason for code, reason in _DISK_REASONS.items() if os.strerror(code) in str(error)]
        if not reasons:
            raise
        raise StepError(f"{where}: {reasons[0]}") from error


def _own_folder(name: str) -> Path:
    """A folder for temporary files that this user alone can read and write, whoever else uses this machine.

    Raises:
        StepError: If another user has made it.
    """
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with translate_os_errors(str(folder)):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StepError(f"{folder} belongs to another user; remove it, or set TMPDIR to a folder of your own")
    return folder


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
