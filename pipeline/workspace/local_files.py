"""The files of a folder on a disk of this machine, or on what is mounted like one.

Each is written to a temporary name, synced and renamed, so that a reader never sees half a file.
"""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.workspace.disk import content_of, facts_of, files_below, is_there, patiently, translate_os_errors
from pipeline.workspace.hashing import checksum_of_writing, sha256_of

Json = dict[str, Any]

TEMPORARY = ".tmp-"
"""What the names of files begin with that are being written."""


class LocalFiles:
    """The files of a local folder, by their path in it; ``Folder`` says what each method does.

    Args:
        base: The folder.
    """

    def __init__(self, base: str) -> None:
        self._base = base

    @contextlib.contextmanager
    def write(self, name: str, note: Callable[[Json], None]) -> Generator[Path]:
        """A path to write a file to, which is published at the end of the block; ``note`` gets what it is, if known."""
        target = Path(self._base) / name
        with translate_os_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")
        try:
            with translate_os_errors(str(target)), checksum_of_writing(temporary) as checksum:
                yield temporary
                num_bytes = _publish(temporary, target)
                if sha256 := checksum(num_bytes):
                    note({"bytes": num_bytes, "sha256": sha256})
        finally:
            with contextlib.suppress(OSError):  # what is left of it is removed by `clear_temporaries`
                _remove(temporary)

    def link(self, name: str, source: Path) -> None:
        """Publish a link to a file."""
        self.remove(name)
        target = Path(self._base) / name
        with translate_os_errors(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)

    def is_link(self, name: str) -> bool:
        """Whether a file is a link."""
        return (Path(self._base) / name).is_symlink()

    def path(self, name: str) -> Path | None:
        """The path of a file; None if there is none."""
        return Path(self._base) / name if self.exists(name) else None

    def content(self, name: str) -> bytes | None:
        """The content of a small file; None if there is none."""
        return content_of(f"{self._base}/{name}")

    def contents(self, names: Sequence[str]) -> Iterable[bytes | None]:
        """As ``content`` of each."""
        return map(self.content, names)

    def exists(self, name: str) -> bool:
        """Whether there is a file."""
        return is_there(f"{self._base}/{name}")

    def all_names(self) -> Iterator[str]:
        """Every file, also those that are being written."""
        return (name for name, _ in files_below(self._base))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file; nothing of a link, because removing it frees nothing."""
        sizes: dict[str, int] = {}
        for name, entry in files_below(self._base):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode):
                    sizes[name] = 0 if stat.S_ISLNK(facts.st_mode) else facts.st_size
        return sizes

    def stamps(self, folder: str) -> dict[str, str]:
        """Time and size of each published file below a folder in this one."""
        below = f"{self._base}/{folder}".rstrip("/")
        facts = {name: facts_of(f"{below}/{name}") for name, _ in files_below(below) if TEMPORARY not in name}
        return {f"{folder}{name}": f"{one.st_mtime_ns} {one.st_size}" for name, one in facts.items() if one}

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        path = f"{self._base}/{name}"
        with contextlib.suppress(FileNotFoundError):
            patiently(lambda: os.unlink(path), path, "removed")  # noqa: PTH108  (a string, as a URI is)

    def move(self, name: str, target: "LocalFiles") -> None:
        """Move a file to another folder."""
        (Path(self._base) / name).replace(Path(target._base) / name)

    def describe(self, path: Path) -> Json:
        """Size and SHA-256 of one of the files, which is read."""
        return patiently(lambda: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}, str(path))

    def clear_temporaries(self, start: str) -> None:
        """Remove what killed writers left, where the name begins with ``start``."""
        for name in [one for one in self.all_names() if TEMPORARY in one and one.startswith(start)]:
            place, temporary, rest = f"/{name}".partition(f"/{TEMPORARY}")
            if temporary:
                path = Path(f"{self._base}{place}{temporary}{rest.partition('/')[0]}")
                patiently(lambda path=path: _remove(path), str(path), "removed")

    def remove_folder(self) -> None:
        """Remove the folder itself, with all that is in it."""
        shutil.rmtree(self._base, ignore_errors=True)


def _publish(temporary: Path, target: Path) -> int:
    """Give a file its name; returns its size in bytes."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
        num_bytes = os.fstat(stream.fileno()).st_size
        os.fchmod(stream.fileno(), 0o666 & ~_UMASK)  # safetensors makes files that only their owner may read
    temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return num_bytes


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
