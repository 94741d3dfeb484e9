"""A full disk at each file that the filters, embed, another try of a download, changes of an index and a batch search
write: one message, and what runs next ends in the bytes of a calm run.

``test_full_disk.py`` fills a real disk; here the file leads to ``/dev/full``, so that no file of a step is left out.
``tests/retrieve/test_build_faults.py`` does this for the build of an index.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import torch

from pipeline.data.retries import ask_retry
from pipeline.data.rows import make_uid
from pipeline.errors import StepError
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.retrieve import parts, query_list
from pipeline.retrieve.search import SearchOptions
from pipeline.runtime import search
from pipeline.runtime.data import EmbedWorker
from pipeline.runtime.download import run_download
from pipeline.runtime.filter import run_filter
from pipeline.runtime.filter_embeddings import run_filter_embeddings
from pipeline.workspace.local_files import LocalFiles
from pipeline.workspace.store import MANIFEST, RECORD_SUFFIX, Artifact, Workspace
from tests.data.hostile import HostileServer
from tests.faults.test_kill_changes import CHANGES, Nobody, answer_here, change, make_index
from tests.faults.test_kill_embed import SHARDS, embed_context
from tests.filter.planted import embed_by_eye, make_context, planted_pairs, tiny_recipe, without_ray
from tests.tiny.pairs import write_parts
from tests.tiny.steps_here import steps_here
from tests.tiny.workspace import served_workspace

_TIMED = (RECORD_SUFFIX, "_stats.json", "metrics.json", "files.json", MANIFEST)
"""Ends of the names of files that hold times."""
_BY_THE_CLOCK = "progress"
"""Part of the names of files that are written every now and then."""


class _Disk:
    """Notes the files that are written below a folder, of which one may find the disk full.

    Args:
        folder: The folder.
        patch: Ends it.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.names = list[str]()
        self.full = ""
        """The file that finds the disk full, by its path in the folder; empty: none."""
        write = LocalFiles.write

        @contextlib.contextmanager
        def write_or_fail(files: LocalFiles, name: str, note: Any) -> Generator[Path]:
            path = Path(files._base) / name
            own = str(path.relative_to(folder)) if path.is_relative_to(folder) else ""
            if own:
                self.names.append(own)
            with write(files, name, note) as target:
                if own and own == self.full:
                    target.symlink_to("/dev/full")
                yield target

        patch.setattr(LocalFiles, "write", write_or_fail)


def _content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and "live" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if not path.name.endswith(_TIMED)}


def _fill_at_each_file(
    work: Callable[[], object], folder: Path, monkeypatch: pytest.MonkeyPatch, *, names: Sequence[str] = ()
) -> list[str]:
    """Do the work, each time with another file that finds the disk full, and at last calmly.

    Args:
        work: The work; what it has finished, it does not do again.
        folder: Where it writes; as it is before the work.
        monkeypatch: Puts the disk in its place.
        names: Ends of the names of some files that must be among those that found the disk full.

    Returns:
        The files, by their path in the folder, numbers in them replaced: of each kind the last.
    """
    before = folder.with_name(f"{folder.name}-before")
    shutil.copytree(folder, before)
    with monkeypatch.context() as patch:
        disk = _Disk(folder, patch)
        work()
        expected = _content(folder)
        last = {re.sub(r"\d+", "N", name): name for name in disk.names if _BY_THE_CLOCK not in name}
        order = sorted(last.values(), key=disk.names.index)
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        for disk.full in order:
            with pytest.raises(StepError, match="the disk is full"):
                work()
        disk.full = ""
        work()
    assert _content(folder) == expected
    for end in names:
        assert any(name.endswith(end) for name in last), (end, *last)
    return sorted(last)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["filter", "filter_embeddings"])
def test_the_passes_of_the_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without_ray(monkeypatch)
    rules: dict[str, dict[str, Any]] = {
        "filter": {"min_caption_words": 2, "duplicates": "near", "num_examples": 2},
        "filter_embeddings": {"clip_score_share": 0.8, "max_similarity": 0.99, "num_examples": 2},
    }
    recipe = tiny_recipe(tmp_path, **{name: rules[name]})
    context = make_context(tmp_path, name, recipe)
    planted_pairs().write(context.inputs["download"])
    if name == "filter_embeddings":
        embed_by_eye(make_context(tmp_path, "embed", recipe))
    run = {"filter": run_filter, "filter_embeddings": run_filter_embeddings}[name]
    folder = Path(context.output.uri)
    folder.mkdir(parents=True)
    tried = _fill_at_each_file(lambda: run(context), folder, monkeypatch, names=(".arrow", "examples.json"))
    assert len(tried) > 10


@pytest.mark.slow
def test_embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    context = embed_context(tmp_path)

    def work() -> None:
        records = context.output.shard_records()
        worker = EmbedWorker(context)
        for shard in SHARDS:
            if shard not in records:
                worker(shard)

    folder = Path(context.output.uri)
    folder.mkdir(parents=True)
    _fill_at_each_file(work, folder, monkeypatch, names=("N.parquet", "N.done.json"))


@pytest.mark.slow
def test_another_try_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {
        "samples_per_shard": 2,
        "image_px": 64,
        "retries": 0,
        "allowed_networks": ["127.0.0.1/32"],
    }
    settings["resources"] = {"min_success_prob": 0.0}
    with HostileServer() as server, steps_here():
        paths = ["ok?seed=1", "status?code=503&times=1", "ok?seed=2", "status?code=500&times=1", "missing", "ok?seed=3"]
        urls = [f"{server.url}/{path}" for path in paths]
        columns = {"uid": [make_uid(url, "a") for url in urls], "url": urls, "caption": ["a"] * len(urls)}
        context = make_context(tmp_path, "download", parse_recipe({"workspace": str(tmp_path), "download": settings}))
        write_parts(Path(context.inputs["pairs"].uri), [pa.table({**columns, "split": ["train"] * len(urls)})])
        context = replace(context, retry_failed="http")
        assert run_download(replace(context, retry_failed="")).counts["ok"] == 3
        ask_retry(context.output, "http")
        counts = list[dict[str, int]]()
        _fill_at_each_file(
            lambda: counts.append(run_download(context).counts),
            Path(context.output.uri),
            monkeypatch,
            names=("N.tar", "N.parquet", "N_stats.json", "N.done.json", "live/retries.json"),
        )
    assert {count["ok"] for count in counts} == {5}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_the_changes_of_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(parts, "_MIN_PART_ROWS", 12)
    workspace = Workspace(str(tmp_path / "w"))
    make_index(workspace, name)
    names = ("changes/N.json",) + (("segment_N/segment.json", "segment_N/rows.arrow") if name[0] in "ac" else ())
    _fill_at_each_file(lambda: change(workspace, name), Path(workspace.root), monkeypatch, names=names)


@pytest.mark.slow
def test_a_batch_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_list, "PART_ROWS", 20)
    recipe, queries = served_workspace(tmp_path), tmp_path / "queries.txt"
    queries.write_text("\n".join(f"a red picture {number}" for number in range(50)))
    answer = _search_here(monkeypatch, recipe, queries)
    folder = tmp_path / "out"
    folder.mkdir()
    ends = ("queries.parquet", "N.parquet", "N.done.json", "manifest.json")
    _fill_at_each_file(lambda: answer(Artifact(str(folder))), folder, monkeypatch, names=ends)


def _search_here(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, queries: Path) -> Callable[[Artifact], object]:
    """A batch search in this process."""
    monkeypatch.setattr(search, "connect", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(search, "require_room", lambda *_: None)
    monkeypatch.setattr(search, "_answer", answer_here)
    return lambda out: search.search_many(recipe, str(queries), SearchOptions(k=3), cast("Any", Nobody()), out=out.uri)
