"""A disk of a few kilobytes that grows: what a full disk does to a file stands in no other place."""

import contextlib
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest


class SmallDisk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)], check=True)

    def grow(self, size_kb: int) -> None:
        """Give it another size."""
        subprocess.run(["mount", "-o", f"remount,size={size_kb}k", str(self.folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Generator[SmallDisk]:
    """A disk of 4 KB in a new folder; skips the test where this user can mount none."""
    try:
        disk = SmallDisk(folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user can mount no file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)
