"""Two lists with weights through every step, from their pictures to a training that is stopped and continued."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from numpy.typing import NDArray

from pipeline.data.batch import Batch
from pipeline.data.samples import Samples
from pipeline.recipe.plan import artifact_of, inputs_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.train.assemble import TrainJob, samples_of
from pipeline.train.job import run_job
from pipeline.workspace.store import Artifact, Workspace
from tests.data.conftest import make_picture
from tests.tiny.command import unclip
from tests.tiny.recipe import merge, tiny_tables, training
from tests.tiny.training import KilledError, kill_at, no_watch

_BATCH, _NUM_STEPS = 4, 16
_NUMBERS = {"a": range(12), "b": range(100, 110)}
"""Pictures of each folder."""


def _write_recipe(folder: Path) -> Path:
    for name, numbers in _NUMBERS.items():
        (folder / name).mkdir()
        for number in numbers:
            (folder / f"{name}/{number}.jpg").write_bytes(make_picture(number))
            (folder / f"{name}/{number}.txt").write_text(f"picture {number}")
    one_worker = {"resources": {"num_workers": 1}}
    lists = [{"path": str(folder / "a"), "weight": 2.0}, {"path": str(folder / "b"), "weight": 0.5}]
    tables = tiny_tables(
        folder / "workspace",
        pairs={"source": "folder", "lists": lists, "validation_prob": 0.0},
        download={"samples_per_shard": 5, **one_worker},
        filter={"duplicates": "near", **one_worker},
        clip=training(2, batch_size=4),
        embed=one_worker,
        filter_embeddings={"clip_score_share": 0.9},
        prior=training(_NUM_STEPS, batch_size=_BATCH, save_every_steps=2),
    )
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(merge(tables, {"tracking": {"uri": "off"}})))
    return path


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_training_sees_the_rows_of_each_list_as_its_weight_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    path = _write_recipe(tmp_path)
    done = unclip("run", str(path), "--until", "prior")
    assert done.returncode == 0, done.stdout + done.stderr
    recipe, steps = load_recipe(path), {step.name: step for step in make_plan(load_recipe(path))}
    workspace = Workspace(recipe.workspace)
    lists = {
        name: [record.list_number for record in artifact_of(workspace, steps[name]).shard_records().values()]
        for name in ("download", "embed", "filter_embeddings")
    }
    assert list(lists.values()) == [[0, 0, 0, 1, 1]] * 3  # 5 + 5 + 2 rows, and 5 + 5
    pairs = artifact_of(workspace, steps["pairs"]).manifest()
    assert pairs is not None
    assert [rows["ok"] for rows in pairs.metrics["lists"]] == [12, 10]

    batches: list[tuple[str, ...]] = []
    batch_of = Samples.batch

    def note(samples: Samples, locations: NDArray[np.int64]) -> Batch:
        batch = batch_of(samples, locations)
        batches.append(batch.captions)
        return batch

    monkeypatch.setattr(Samples, "batch", note)
    job = TrainJob("prior", recipe, inputs_of(workspace, steps["prior"]), Artifact(str(tmp_path / "calm")),
                   steps["prior"].key, torch.device("cpu"))  # fmt: skip
    run_job(job, no_watch)
    calm = list(batches)
    captions = [caption for batch in calm for caption in batch]
    rows = {name: {f"picture {number}" for number in numbers} for name, numbers in _NUMBERS.items()}
    reader = samples_of(job, "train").reader
    num_a, num_b = (
        sum(count for count, number in zip(reader.shard_rows, reader.shard_lists, strict=True) if number == which)
        for which in range(2)
    )
    assert 2 <= num_a + num_b < sum(map(len, rows.values())), "the filter has left rows out"
    length, halves = 2 * num_a + num_b // 2, list[set[str]]()
    for epoch in (captions[:length], captions[length : length + 2 * num_a + num_b - num_b // 2]):
        counts = Counter(epoch)
        assert [counts[caption] for caption in counts if caption in rows["a"]] == [2] * num_a
        halves.append({caption for caption in counts if caption in rows["b"]})
    assert [len(half) for half in halves] == [num_b // 2, num_b - num_b // 2]
    assert not halves[0] & halves[1], "the second epoch has the other rows"
    wild = replace(job, output=Artifact(str(tmp_path / "wild")))
    batches.clear()
    with pytest.raises(KilledError):
        run_job(wild, kill_at(5))
    assert batches == calm[:5]
    batches.clear()
    run_job(wild, no_watch)
    assert batches == calm[4:]
