"""``kill -9`` of pairs, download and the filters at twenty random moments: in the end the bytes are those of a calm run.

``test_kill.py`` kills drivers, workers and clusters of a real Ray; here the work of a step runs in one process, which
is killed often and anywhere, also between the files of a shard and its record.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data import duplicates, sources
from pipeline.data.rows import make_uid
from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.download_workers import DownloadWorker
from pipeline.runtime.filter import run_filter
from pipeline.runtime.filter_embeddings import run_filter_embeddings
from pipeline.runtime.pairs import run_pairs
from pipeline.shapes.server import serve_pictures
from pipeline.workspace.store import RECORD_SUFFIX, Artifact
from tests.data.hostile import HostileServer
from tests.filter.planted import embed_by_eye, make_context, planted_pairs, tiny_recipe, without_ray
from tests.ports import free_port
from tests.tiny.pairs import write_parts

_SHARDS = [f"{number:05d}" for number in range(4)]
_ROWS = 6
_NUM_KILLS = pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])


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


def _files(output: Artifact) -> dict[str, object]:
    """What must not differ: all but times, and what only a running step reads."""
    names = [name for name in output.names() if not name.startswith("live/")]
    return {name: output.describe(name) for name in names if not name.endswith((RECORD_SUFFIX, "_stats.json"))}


def _kill_often(work: Callable[[], object], output: Artifact, *, num_kills: int, num_files: int) -> None:
    start = time.monotonic()
    assert _finish(_start(work)) == 0
    took_s, expected, rng = time.monotonic() - start, _files(output), random.Random(0)
    assert len(expected) == num_files
    output.clear()
    num_killed = 0
    while num_killed < num_kills:
        process = _start(work)
        time.sleep(rng.uniform(0, took_s))
        os.kill(process, signal.SIGKILL)
        if _finish(process) == 0:
            output.clear()
        else:
            num_killed += 1
    output.clear_temporaries()
    assert _finish(_start(work)) == 0
    assert _files(output) == expected


@_NUM_KILLS
def test_pairs_end_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)  # a piece for every file
    monkeypatch.setattr(duplicates, "RUN_ROWS", 70)
    (tmp_path / "list").mkdir()
    for part in range(8):
        numbers = [number - 100 * (number % 3 == 0) for number in range(part * 300, (part + 1) * 300)]
        columns = {"url": [f"http://a/{n // 2}" for n in numbers], "caption": [f"caption {n}" for n in numbers]}
        pq.write_table(pa.table(columns), tmp_path / "list" / f"{part}.parquet")
    pairs = {"source": "list", "path": str(tmp_path / "list"), "resources": {"num_workers": 1}}
    recipe = parse_recipe({"workspace": str(tmp_path), "pairs": pairs})
    context = StepContext(recipe, make_plan(recipe)[0], recipe.workspace)
    _kill_often(lambda: run_pairs(context), context.output, num_kills=num_kills, num_files=8 + 1)


@_NUM_KILLS
def test_download_ends_in_the_same_bytes(hostile: HostileServer, tmp_path: Path, num_kills: int) -> None:
    settings = {"samples_per_shard": _ROWS, "image_px": 64, "retries": 0, "allowed_networks": ["127.0.0.1/32"]}
    recipe = parse_recipe({"workspace": str(tmp_path), "download": settings})
    step = next(step for step in make_plan(recipe) if step.name == "download")
    context = StepContext(recipe, step, recipe.workspace)
    paths = ["missing" if row % 5 == 4 else f"ok?seed={row}" for row in range(_ROWS * len(_SHARDS))]
    urls = [f"{hostile.url}/{path}" for path in paths]
    columns = {"uid": [make_uid(url, "a caption") for url in urls], "url": urls, "caption": ["a caption"] * len(urls)}
    pairs = pa.table({**columns, "split": ["train"] * len(urls)})
    write_parts(Path(context.inputs["pairs"].uri), [pairs])

    def work() -> None:
        missing = [shard for shard in _SHARDS if shard not in context.output.shard_records()]
        worker = DownloadWorker(context) if missing else None
        for shard in missing:
            assert worker is not None
            assert worker(shard).counts["in"] == _ROWS

    _kill_often(work, context.output, num_kills=num_kills, num_files=2 * len(_SHARDS))


def test_a_shard_whose_picture_server_was_killed_with_its_run_is_made_again(tmp_path: Path) -> None:
    port = free_port()
    settings = {"samples_per_shard": 3, "image_px": 64, "retries": 0}
    recipe = parse_recipe({"workspace": str(tmp_path), "pairs": {"drawn": {"port": port}}, "download": settings})
    step = next(step for step in make_plan(recipe) if step.name == "download")
    context = StepContext(recipe, step, recipe.workspace)
    urls = [f"http://127.0.0.1:{port}/0/32/{index}.png" for index in range(2)]
    urls.append("http://127.0.0.1:1/faulty/refused/2.png")
    columns = {"uid": [make_uid(url, "a caption") for url in urls], "url": urls, "caption": ["a caption"] * len(urls)}
    write_parts(Path(context.inputs["pairs"].uri), [pa.table({**columns, "split": ["train"] * len(urls)})])
    message = rf"shard 00000: the server .*:{port}/, has ended; run again"
    with contextlib.closing(DownloadWorker(context)) as worker, pytest.raises(StepError, match=message):
        worker("00000")
    assert not context.output.exists("00000.tar")
    assert not context.output.shard_records()
    with serve_pictures(port), contextlib.closing(DownloadWorker(context)) as worker:
        record = worker("00000")
    assert (record.counts["ok"], dict(record.causes)) == (2, {"connect": 1})


@_NUM_KILLS
@pytest.mark.parametrize("name", ["filter", "filter_embeddings"])
def test_filters_end_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int, name: str
) -> None:
    without_ray(monkeypatch)
    rules: dict[str, dict[str, Any]] = {
        "filter": {"min_caption_words": 2, "duplicates": "near", "num_examples": 2},
        "filter_embeddings": {"clip_score_share": 0.8, "max_similarity": 0.99, "num_examples": 2},
    }
    recipe = tiny_recipe(tmp_path, **{name: rules[name]})
    context = make_context(tmp_path, name, recipe)
    planted_pairs().write(context.inputs["download"])
    num_shards = len(context.inputs["download"].shard_records())
    if name == "filter_embeddings":
        embed_by_eye(make_context(tmp_path, "embed", recipe))
    run = {"filter": run_filter, "filter_embeddings": run_filter_embeddings}[name]

    def work() -> None:
        torch.set_num_threads(1)  # a forked process does not have the threads of its parent
        run(context)

    assert _finish(_start(work)) == 0
    num_files = len(_files(context.output))
    assert num_files > num_shards
    context.output.clear()
    _kill_often(work, context.output, num_kills=num_kills, num_files=num_files)
