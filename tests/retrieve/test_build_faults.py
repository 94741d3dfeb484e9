"""A build that is killed, or whose disk is full, ends in the bytes of one that was left alone."""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError, StepError
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex, parts
from pipeline.retrieve.build import build_index
from pipeline.retrieve.changes import delete
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.store import Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.tiny.shards import make_embeddings

_NUM_KILLS = 20
_CONFIG = IndexConfig(kind="ivf_rabitq", num_recall_queries=20)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """600 rows in 6 shards."""
    vectors = unit(np.random.default_rng(0).normal(size=(600, 8)))
    artifact = Workspace(str(tmp_path_factory.mktemp("embed"))).artifact("embed", "k")
    make_embeddings(artifact, vectors, vectors, rows_per_shard=100)
    return artifact


def _digests(index: Artifact) -> dict[str, str]:
    """Of every published file, without what a killed writer left; a run removes that before it starts."""
    return {name: hashlib.sha256(index.path(name).read_bytes()).hexdigest() for name in index.names()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part for every shard."""
    monkeypatch.setattr(parts, "_MIN_PART_ROWS", 100)


@pytest.mark.usefixtures("small_parts")
def test_an_index_of_several_parts_has_the_rows_of_all(embed: Artifact, tmp_path: Path) -> None:
    output = Workspace(str(tmp_path)).artifact("index", "k")
    summary = build_index(embed, output, _CONFIG, seed=0)
    assert summary.counts == {"in": 600, "ok": 600}
    vectors = unit(np.random.default_rng(0).normal(size=(600, 8)))
    index = NeighbourIndex.open(output)
    assert [row[0].caption for row in index.find(vectors[::37], 1)] == [f"caption {row}" for row in range(0, 600, 37)]


@pytest.mark.usefixtures("small_parts")
def test_a_build_killed_at_random_moments_ends_in_the_same_bytes(embed: Artifact, tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    whole = workspace.artifact("index", "whole")
    build_index(embed, whole, _CONFIG, seed=0)
    # One process imports everything, then forks builds and kills them: each gets a little further than the last. Of a
    # build that ends too early, another index is built.
    script = f"""
        import os, random, signal, sys, time
        from pipeline.recipe.sections import IndexConfig
        from pipeline.retrieve import build, parts
        from pipeline.workspace.store import Artifact, Workspace
        parts._MIN_PART_ROWS = 100
        config = IndexConfig(kind="ivf_rabitq", num_recall_queries=20)
        workspace, rng, kills, num_built, limit_s = Workspace({str(tmp_path)!r}), random.Random(0), 0, 0, 0.005
        while True:
            child = os.fork()
            if child == 0:
                build.build_index(Artifact({embed.uri!r}), workspace.artifact("index", str(num_built)), config, seed=0)
                os._exit(0)
            end = time.monotonic() + rng.uniform(0, limit_s) if kills < {_NUM_KILLS} else None
            while True:
                pid, status = os.waitpid(child, os.WNOHANG if end else 0)
                if pid:
                    break
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    kills, limit_s = kills + 1, limit_s * 1.35
                    break
                time.sleep(0.001)
            if pid:
                if status:
                    sys.exit(1)  # 256, the status of an error, would exit with 0
                num_built, limit_s = num_built + 1, 0.005
                if kills == {_NUM_KILLS}:
                    print(num_built)
                    break
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=Path.cwd())
    for name in range(int(output.stdout)):
        assert _digests(workspace.artifact("index", str(name))) == _digests(whole)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("num_removed", range(0, 60, 7))
def test_a_build_killed_while_it_removes_its_scratch_files_is_made_again(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_removed: int
) -> None:
    whole, killed = (Workspace(str(tmp_path)).artifact("index", name) for name in ("whole", "killed"))
    build_index(embed, whole, _CONFIG, seed=0)
    remove, removed = Artifact.remove, list[str]()

    def stop_after_some(self: Artifact, name: str) -> None:
        if self.exists(name) and name.startswith("live/"):
            if len(removed) == num_removed:
                raise KeyboardInterrupt
            removed.append(name)
        remove(self, name)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Artifact, "remove", stop_after_some)
        build_index(embed, killed, _CONFIG, seed=0)
    build_index(embed, killed, _CONFIG, seed=0)
    assert _digests(killed) == _digests(whole)


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_one_message_at_every_write_and_the_next_build_ends_in_the_same_bytes(
    embed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tried = (Workspace(str(tmp_path)).artifact("index", name) for name in ("whole", "tried"))
    write, names = Artifact.write, list[str]()

    @contextlib.contextmanager
    def counting(self: Artifact, name: str) -> Generator[Path]:
        names.append(name)
        with write(self, name) as path:
            yield path

    monkeypatch.setattr(Artifact, "write", counting)
    build_index(embed, whole, _CONFIG, seed=0)
    last = {re.sub(r"part-\d+", "part", name): name for name in names}  # each file, of the parts those of the last
    assert len(last) > 20
    for full in sorted(last.values(), key=names.index):

        @contextlib.contextmanager
        def write_or_fail(self: Artifact, name: str, full: str = full) -> Generator[Path]:
            if name == full:
                link = tmp_path / "full"  # a library that removes what it could not write removes this link
                link.unlink(missing_ok=True)
                link.symlink_to("/dev/full")
                with translate_os_errors(name):
                    yield link
            else:
                with write(self, name) as path:
                    yield path

        monkeypatch.setattr(Artifact, "write", write_or_fail)
        with pytest.raises(StepError, match="the disk is full"):
            build_index(embed, tried, _CONFIG, seed=0)
        assert not tried.exists("index.json")
    monkeypatch.setattr(Artifact, "write", write)
    build_index(embed, tried, _CONFIG, seed=0)
    assert _digests(tried) == _digests(whole)


@pytest.mark.parametrize("shard", [0, 3])
def test_a_truncated_table_of_embeddings_is_named(shard: int, tmp_path: Path) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(400, 8)))
    embed = Workspace(str(tmp_path)).artifact("embed", "k")
    make_embeddings(embed, vectors, vectors, rows_per_shard=100)
    table = embed.path(f"{sorted(embed.shard_records())[shard]}.parquet")
    table.write_bytes(table.read_bytes()[:500])
    with pytest.raises(DataError, match=rf"{table.name}: damaged .* bring it back from a copy"):
        build_index(embed, Workspace(str(tmp_path)).artifact("index", "k"), _CONFIG, seed=0)


def test_a_version_stays_readable_while_others_are_written(embed: Artifact, tmp_path: Path) -> None:
    output = Workspace(str(tmp_path)).artifact("index", "k")
    build_index(embed, output, _CONFIG, seed=0)
    vectors = unit(np.random.default_rng(0).normal(size=(600, 8)))
    opened = NeighbourIndex.open(output)
    before = opened.search(vectors[:5], 600)
    script = "import sys; from pipeline.retrieve.changes import delete; from pipeline.workspace.store import Artifact\n"
    script += "for row in range(40): delete(Artifact(sys.argv[1]), [f'http://a/{row}'])"
    writer = subprocess.Popen([sys.executable, "-c", script, output.uri], cwd=Path.cwd())
    sizes = list[int]()
    while writer.poll() is None:
        index = NeighbourIndex.open(output)
        _, ids = index.search(vectors[:1], 600)
        assert int((ids >= 0).sum()) == index.num_rows == 600 - index.version  # one version whole, whichever it is
        sizes.append(index.num_rows)
    assert writer.returncode == 0
    assert sizes == sorted(sizes, reverse=True)
    assert NeighbourIndex.open(output).num_rows == 560
    for old, new in zip(before, opened.search(vectors[:5], 600), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_killed_change_leaves_the_version_before(embed: Artifact, tmp_path: Path, monkeypatch: Any) -> None:
    output = Workspace(str(tmp_path)).artifact("index", "k")
    build_index(embed, output, _CONFIG, seed=0)
    monkeypatch.setattr(Artifact, "write_json", lambda *_args: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(InterruptedError):
        _interrupted(lambda: delete(output, ["http://a/1"]))
    monkeypatch.undo()
    assert NeighbourIndex.open(output).num_rows == 600
    assert delete(output, ["http://a/1"]).version == 1
    assert NeighbourIndex.open(output).num_rows == 599


def _interrupted(change: Any) -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError

    handler = signal.signal(signal.SIGUSR1, stop)
    try:
        change()
    finally:
        signal.signal(signal.SIGUSR1, handler)
