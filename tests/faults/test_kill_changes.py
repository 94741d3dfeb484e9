"""``kill -9`` of the changes of an index, and of a batch search, at twenty random moments: the bytes of a calm one.

A killed change leaves the version before, or the next one whole. The work runs in one process that is forked from one
which has loaded what it needs; of the latter neither FAISS nor torch has used a thread, which a fork would not have.
``test_kill_drivers.py`` kills the drivers of steps, ``tests/runtime/test_search.py`` those of a batch search.
"""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.sections import IndexConfig
from pipeline.retrieve import NeighbourIndex, parts, query_list
from pipeline.retrieve.build import build_index
from pipeline.retrieve.changes import delete_everywhere, restore_everywhere
from pipeline.retrieve.query_list import num_parts
from pipeline.retrieve.search import SearchOptions
from pipeline.retrieve.takedown import TAKEDOWN
from pipeline.retrieve.versions import Version, read_version
from pipeline.runtime import search
from pipeline.runtime.context import StepContext
from pipeline.runtime.pool import total_counts
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.store import MANIFEST, RECORD_SUFFIX, Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.retrieve.segments import DIM, SHARD_ROWS, append, commit_embed, compact, rows_of, uid_of
from tests.tiny.workspace import served_workspace

_NUM_KILLS = pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
_CONFIG = IndexConfig(kind="ivf_rabitq", num_recall_queries=6)
_NUM_ROWS = 60
CHANGES = ("append", "compact", "delete", "restore")
_TIMED = ("metrics.json", "files.json")
"""Ends of the names of files that hold times, or a checksum of such a one."""


def _start(work: Callable[[], object]) -> int:
    """Do the work in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def _finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _kill(work: Callable[[], object], after_s: float) -> None:
    process = _start(work)
    time.sleep(after_s)
    os.kill(process, signal.SIGKILL)
    assert _finish(process) in {0, -signal.SIGKILL}


def _run_alone(work: Callable[..., None], *arguments: Any) -> None:
    """Do the work in a process that begins anew, with one thread."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(name, "1")
        process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        process.start()
        process.join()
    assert process.exitcode == 0


def _vectors() -> Any:
    return unit(np.random.default_rng(0).normal(size=(_NUM_ROWS, DIM)))


def make_index(workspace: Workspace, name: str) -> None:
    """An index as the change ``name`` finds it: of 36 rows, and to be compacted also of the other 24."""
    vectors, index = _vectors(), workspace.artifact("index", "i")
    embed = commit_embed(workspace, "base", vectors[:36])
    more = commit_embed(workspace, "more", vectors[36:], first=36)
    build_index(embed, index, _CONFIG, seed=0)
    index.commit(Manifest(step="index", key="i", step_version=1, section={}, inputs={"embed": "base"}))
    if name == "compact":
        append(index, more, _CONFIG)
    if name != "delete":
        delete_everywhere(workspace, [uid_of(2), "http://a/3", uid_of(40)])


def change(workspace: Workspace, name: str) -> None:
    """Change that index by ``append``, ``compact``, ``delete`` or ``restore``."""
    index = workspace.artifact("index", "i")
    if name == "append":
        append(index, workspace.artifact("embed", "more"), _CONFIG)
    elif name == "compact":
        compact(index, _CONFIG)
    elif name == "delete":
        delete_everywhere(workspace, [uid_of(1), "http://a/5"])
    else:
        restore_everywhere(workspace, [uid_of(2), "http://a/3"])


def _content(workspace: Workspace, version: Version | None = None) -> dict[str, object]:
    """What must not differ, of all files or of those of a version."""
    index = workspace.artifact("index", "i")
    names = [name for name in index.names() if not name.endswith(_TIMED)]
    if version is not None:
        own = {*version.segments, version.file, version.deleted}
        names = [name for name in names if name in own or name.partition("/")[0] in own]
    listed = Path(workspace.root) / TAKEDOWN
    content: dict[str, object] = {name: index.describe(name) for name in names}
    return content | {TAKEDOWN: listed.exists() and listed.read_text()}


def _rows(workspace: Workspace) -> set[int]:
    return rows_of(NeighbourIndex.open(workspace.artifact("index", "i")), _vectors())


def _kill_changes(folder: Path, name: str, num_kills: int) -> None:
    parts._MIN_PART_ROWS = SHARD_ROWS  # a part for every shard
    start, calm, wild = (Workspace(str(folder / one)) for one in ("start", "calm", "wild"))
    make_index(start, name)
    for workspace in (calm, wild):
        shutil.copytree(start.root, workspace.root)
    before, begin = read_version(calm.artifact("index", "i")), time.monotonic()
    assert _finish(_start(lambda: change(calm, name))) == 0
    took_s, after = time.monotonic() - begin, read_version(calm.artifact("index", "i"))
    assert after.number == before.number + 1
    expected, rows = _content(calm, after), {before.number: _rows(start), after.number: _rows(calm)}
    num_killed, num_late, rng = 0, 0, random.Random(0)
    while num_killed < num_kills:
        _kill(lambda: change(wild, name), rng.uniform(0, took_s))
        version = read_version(wild.artifact("index", "i"))
        assert _rows(wild) == rows[version.number]
        if version == before:
            num_killed += 1
            continue
        num_late += 1
        if name in {
            "delete",
            "restore",
        }:  # the list and the index change one after the other; to do it again is harmless
            assert _finish(_start(lambda: change(wild, name))) == 0
        assert _content(wild, version) == expected
        shutil.rmtree(wild.root)
        shutil.copytree(start.root, wild.root)
    assert _finish(_start(lambda: change(wild, name))) == 0
    assert _content(wild) == _content(calm)
    assert not [path for path in Path(wild.artifact("index", "i").uri).rglob("*") if path.name.startswith(".tmp-")]
    print(f"{name}: {took_s:.2f} s; killed {num_killed} times, {num_late} times too late")


def _kill_all_changes(folder: Path, num_kills: int) -> None:
    for name in CHANGES:
        _kill_changes(folder / name, name, num_kills)


@_NUM_KILLS
def test_a_killed_change_of_an_index_ends_in_the_same_bytes(tmp_path: Path, num_kills: int) -> None:
    _run_alone(_kill_all_changes, tmp_path, num_kills)


class Nobody:
    """An observer that listens to nothing."""

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments: None


def answer_here(context: StepContext, _observer: object) -> dict[str, int]:
    """Answer the parts that have no answers in this process, as one worker does."""
    assert isinstance(context, search.SearchContext)
    output = context.output
    names = [f"{number:05d}" for number in range(num_parts(output.path(search.QUERIES)))]
    missing = [name for name in names if name not in output.shard_records()]
    worker = search.SearchWorker(context) if missing else None
    for name in missing:
        assert worker is not None
        worker(name)
    records = output.shard_records()
    return total_counts([records[name] for name in names])


def _kill_searches(folder: Path, num_kills: int) -> None:
    query_list.PART_ROWS = 20
    served_workspace(folder)
    queries = folder / "queries.txt"
    queries.write_text("\n".join(f"a red picture {number}" for number in range(100)))
    recipe = load_recipe(folder / "tiny.toml")
    patched = {"connect": lambda _: contextlib.nullcontext(), "_answer": answer_here, "require_room": lambda *_: None}
    for name, value in patched.items():
        setattr(search, name, value)

    def answer(out: Artifact) -> None:
        search.search_many(recipe, str(queries), SearchOptions(k=3), cast("Any", Nobody()), out=out.uri)

    def content(out: Artifact) -> dict[str, object]:
        kept = [name for name in out.names() if not name.endswith((RECORD_SUFFIX, MANIFEST))]
        return {name: out.describe(name) for name in kept}

    calm, wild = (Artifact(str(folder / name)) for name in ("calm", "wild"))
    begin = time.monotonic()
    assert _finish(_start(lambda: answer(calm))) == 0
    took_s, num_killed, num_late, rng = time.monotonic() - begin, 0, 0, random.Random(0)
    assert len(calm.shard_records()) == 5
    while num_killed < num_kills:
        _kill(lambda: answer(wild), rng.uniform(0, took_s))
        if wild.exists(MANIFEST):
            wild.destroy()
            num_late += 1
        else:
            num_killed += 1
    assert _finish(_start(lambda: answer(wild))) == 0
    assert content(wild) == content(calm)
    assert not [path for path in Path(wild.uri).rglob("*") if path.name.startswith(".tmp-")]
    print(f"search: {took_s:.2f} s; killed {num_killed} times, {num_late} times too late")


@_NUM_KILLS
def test_a_killed_batch_search_ends_in_the_same_bytes(tmp_path: Path, num_kills: int) -> None:
    _run_alone(_kill_searches, tmp_path, num_kills)
