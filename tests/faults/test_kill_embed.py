"""``kill -9`` of a worker of embed at twenty random moments: in the end the bytes are those of one that nobody disturbed.

``test_kill.py`` kills drivers, workers and clusters of a real Ray in every step; here one worker is killed often and
anywhere, also between the files of a shard and its record.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.data import EmbedWorker
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact
from tests.tiny.networks import make_clip
from tests.tiny.shards import Sample, make_jpeg, write_shard

_NUM_KILLS = 20
SHARDS = [f"{number:05d}" for number in range(8)]


@pytest.fixture(name="context")
def _context(tmp_path: Path) -> StepContext:
    return embed_context(tmp_path)


def embed_context(tmp_path: Path) -> StepContext:
    """Embed, with a download of eight shards, each with one picture that is none."""
    recipe = parse_recipe({"workspace": str(tmp_path / "workspace"), "embed": {"batch_size": 16}})
    context = StepContext(recipe, next(step for step in make_plan(recipe) if step.name == "embed"), recipe.workspace)
    for path in make_clip(tmp_path / "clip").iterdir():
        context.inputs["clip"].write_bytes(path.name, path.read_bytes())
    download = context.inputs["download"]
    for shard in SHARDS:
        pictures = [b"no picture" if number == 4 else make_jpeg(number, (40, 36)) for number in range(40)]
        samples = [Sample(f"http://a/{shard}/{row}", f"caption {row}", data) for row, data in enumerate(pictures)]
        paths = write_shard(download, shard, samples, "jpg")
        files = {path.name: download.describe(path.name) for path in paths}
        download.commit_shard(ShardRecord(shard=shard, counts={"in": 40, "ok": 40}, files=files))
    return context


def _start(context: StepContext) -> int:
    """A process that makes the shards that are missing, as a worker does; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        worker = EmbedWorker(context)
        for shard in SHARDS:
            if shard not in context.output.shard_records():
                worker(shard)
        code = 0
    finally:
        os._exit(code)


def _finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _files(output: Artifact) -> dict[str, object]:
    return {name: output.describe(name) for name in output.names() if not name.endswith(".done.json")}


def test_a_worker_that_is_killed_at_random_moments_ends_in_the_same_bytes(context: StepContext) -> None:
    start = time.monotonic()
    assert _finish(_start(context)) == 0
    took_s, output, rng = time.monotonic() - start, context.output, random.Random(0)
    expected = _files(output)
    assert len(expected) == 2 * len(SHARDS)  # embeddings, and the row that has none

    num_killed = 0
    while num_killed < _NUM_KILLS:
        if len(output.shard_records()) == len(SHARDS):
            for shard in rng.sample(SHARDS, 5):
                output.remove(f"{shard}.done.json")
        process = _start(context)
        time.sleep(rng.uniform(0, took_s))
        os.kill(process, signal.SIGKILL)
        num_killed += _finish(process) == -signal.SIGKILL
        assert all(record.counts == {"in": 40, "ok": 39, "corrupt": 1} for record in output.shard_records().values())
    output.clear_temporaries()
    assert _finish(_start(context)) == 0
    assert _files(output) == expected
    assert sorted(output.shard_records()) == SHARDS
