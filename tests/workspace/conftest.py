"""One local S3 server for all tests that need one; each has a bucket and a cache of its own."""

import itertools
from collections.abc import Generator
from pathlib import Path

import pytest

from pipeline.workspace import objects
from pipeline.workspace.manifest import Manifest
from tests.s3_server import S3Server, started

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Generator[S3Server]:
    """The server."""
    with started() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URI of an empty bucket, whose server this process knows how to reach."""
    use(s3_server.environment, monkeypatch)
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{next(_numbers)}"
    s3_server.make_bucket(name)
    s3_server.requests()
    return f"s3://{name}"


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process see object stores with other settings."""
    import s3fs

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(objects, "_answered", set[str]())


def make_manifest(**changes: object) -> Manifest:
    """A manifest of the step ``s`` and the key ``k``, as far as nothing else is said."""
    fields: dict[str, object] = {"step": "s", "key": "k", "step_version": 1, "section": {}, "inputs": {}}
    return Manifest(**(fields | changes))  # type: ignore[arg-type]
