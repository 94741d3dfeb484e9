"""The data steps on a real Ray."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.data.npy_folder import export_embeddings
from pipeline.data.rows import make_uid
from pipeline.data.shards import StoredPictures
from pipeline.errors import DataError, StepError
from pipeline.evaluate.evaluate import finish, make_runner, plan_work
from pipeline.evaluate.prompts import Watch
from pipeline.evaluate.work import Work
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.retrieve import NeighbourIndex
from pipeline.runtime import data
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.data import run_evaluate
from pipeline.runtime.download import run_download
from pipeline.runtime.index import run_index
from pipeline.runtime.pairs import run_pairs
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import Progress, read_progress
from pipeline.workspace.store import LIVE, Artifact, Workspace
from tests.ports import free_port
from tests.tiny.networks import make_clip
from tests.tiny.shards import drawn_sample, write_shard
from tests.tiny.workspace import evaluate_step

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def _context(folder: Path, name: str = "download", **sections: Any) -> StepContext:
    recipe = parse_recipe({"workspace": str(folder / "workspace")} | sections)
    step = next(step for step in make_plan(recipe) if step.name == name)
    return StepContext(recipe, step, recipe.workspace)


def _commit(context: StepContext, result: StepResult) -> Artifact:
    context.output.commit(manifest_of(context.step, context.output, result.counts))
    return context.output


@pytest.mark.timeout(600)
def test_data_steps_from_pairs_to_index(tmp_path: Path) -> None:
    resources = {"num_workers": 2, "cpus_per_worker": 0.5}
    sections: dict[str, Any] = {
        "pairs": {"drawn": {"num_pairs": 50, "image_px": 48, "port": free_port(), "num_faulty": 7}},
        "download": {
            "samples_per_shard": 20,
            "image_px": 32,
            "timeout_s": 3,
            "deadline_s": 5,
            # With more requests at once, a busy machine misses deadlines.
            "resources": {**resources, "num_connections": 8},
        },
        "embed": {"batch_size": 8, "resources": resources},
        "decoder": {"model": {"image_px": 32, "unet": {"attention_resolutions": [16, 8]}}},
    }
    steps = {name: _context(tmp_path, name, **sections) for name in ("pairs", "download", "clip", "embed", "index")}
    _commit(steps["pairs"], run_pairs(steps["pairs"]))
    result = run_download(steps["download"])
    assert result.counts == {"in": 57, "ok": 50, "failed_to_download": 5, "failed_to_resize": 2}
    assert result.metrics["failures"]["http-404"] == 1
    download = _commit(steps["download"], result)
    assert list(download.shard_records()) == ["00000", "00001", "00002"]

    for path in make_clip(tmp_path / "clip").iterdir():
        steps["clip"].output.write_bytes(path.name, path.read_bytes())
    result = data.run_embed(steps["embed"])
    assert result.counts == {"in": 50, "ok": 50, "corrupt": 0}
    embed = _commit(steps["embed"], result)
    whole = {name: embed.describe(name) for name in embed.names() if name.endswith(".parquet")}
    embed.remove("00001.parquet")
    embed.remove("00001.done.json")
    mtime_ns = embed.path("00000.parquet").stat().st_mtime_ns
    data.run_embed(steps["embed"])
    assert {name: embed.describe(name) for name in whole} == whole
    assert embed.path("00000.parquet").stat().st_mtime_ns == mtime_ns

    index = _commit(steps["index"], run_index(steps["index"]))
    neighbours = NeighbourIndex.open(index)
    rows = pq.read_table(embed.path("00001.parquet"))
    query = rows.column("z_image").combine_chunks().flatten().to_numpy().reshape(-1, 16)[:1].astype("float32")
    best = neighbours.find(query, 3)[0][0]
    assert best.similarity == pytest.approx(1, abs=1e-3)
    assert StoredPictures(download).read(best.shard, best.key, best.uid).startswith(b"\xff\xd8")


def test_run_embed_refuses_a_shard_that_changed(tmp_path: Path) -> None:
    sections = {"embed": {"batch_size": 8}}
    download, embed = _context(tmp_path, "download", **sections), _context(tmp_path, "embed", **sections)
    for path in make_clip(tmp_path / "clip").iterdir():
        embed.inputs["clip"].write_bytes(path.name, path.read_bytes())
    for name in ("00000.tar", "00000.parquet"):
        download.output.write_bytes(name, b"bytes")
    files = {name: download.output.describe(name) for name in ("00000.tar", "00000.parquet")}
    download.output.commit_shard(ShardRecord(shard="00000", counts={"in": 1, "ok": 1}, files=files))
    download.output.write_bytes("00000.tar", b"bites")
    with pytest.raises(DataError, match=r"embed: shard 00000: .*00000.tar does not match its checksum"):
        data.run_embed(embed)


def test_run_embed_names_its_corrupt_rows_and_takes_exported_embeddings_over(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"embed": {"batch_size": 4, "resources": {"cpus_per_worker": 0.5}}}
    download, embed = _context(tmp_path, "download", **sections), _context(tmp_path, "embed", **sections)
    for path in make_clip(tmp_path / "clip").iterdir():
        embed.inputs["clip"].write_bytes(path.name, path.read_bytes())
    for number in range(5):
        samples = [drawn_sample(number * 10 + row) for row in range(8)]
        if number == 3:
            samples[5] = replace(samples[5], picture=b"no picture")
        paths = write_shard(download.output, f"{number:05d}", samples, "png")
        files = {path.name: download.output.describe(path.name) for path in paths}
        download.output.commit_shard(ShardRecord(shard=f"{number:05d}", counts={"in": 8, "ok": 8}, files=files))
    result = data.run_embed(embed)
    assert result.counts == {"in": 40, "ok": 39, "corrupt": 1}
    assert result.metrics == {"arithmetic": "float32, TF32 off", "failures": {"not a picture": 1}}
    causes = [record.causes for record in embed.output.shard_records().values()]
    assert causes == [{}, {}, {}, {"not a picture": 1}, {}]  # so that the end of the step reads no file of a shard
    [line] = embed.output.path("00003_failures.jsonl").read_text().splitlines()
    url = "http://127.0.0.1/35.png"
    assert (json.loads(line)["url"], json.loads(line)["uid"]) == (url, make_uid(url, drawn_sample(35).caption))
    _commit(embed, result)

    assert export_embeddings(embed.output, tmp_path / "npy") == 39
    taken = _context(tmp_path, "embed", embed={"import_from": str(tmp_path / "npy")})
    assert taken.inputs == {}
    assert data.run_embed(taken).counts == {"in": 39, "ok": 39, "corrupt": 0}
    for name in embed.output.shard_records():
        assert taken.output.path(f"{name}.parquet").read_bytes() == embed.output.path(f"{name}.parquet").read_bytes()


def test_run_download_explains_a_dead_list_and_tries_again(tmp_path: Path) -> None:
    urls = [f"http://127.0.0.1:{free_port()}/{i}.jpg" for i in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(["url,caption", *(f"{url},a caption" for url in urls)]))
    sections = {
        "pairs": {"source": "list", "path": str(tmp_path / "list.csv")},
        "download": {
            "samples_per_shard": 4,
            "retries": 0,
            "allowed_networks": ["127.0.0.1/32"],
            "resources": {"num_workers": 1, "cpus_per_worker": 0.5},
        },
    }
    pairs, download = _context(tmp_path, "pairs", **sections), _context(tmp_path, "download", **sections)
    _commit(pairs, run_pairs(pairs))
    with pytest.raises(StepError, match=r"only 0 of 6 rows came through .*6 x connect \(the host does not"):
        run_download(download)
    assert set(download.output.shard_records()) == {"00000", "00001"}  # the next run makes them again
    assert artifact_of(Workspace(download.root), download.step).manifest() is None


def test_run_pairs_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,caption\n,no url\n")
    context = _context(tmp_path, "pairs", pairs={"source": "list", "path": str(tmp_path / "list.csv")})
    with pytest.raises(DataError, match="no usable row"):
        run_pairs(context)
    assert [name for name in context.output.names() if not name.startswith("live/")] == []


def test_an_evaluation_says_how_far_the_choice_of_its_rows_is(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = list[str]()

    def choose(_recipe: Recipe, _inputs: object, watch: Watch) -> Work:
        watch(3, 9)
        raise DataError("no rows")

    def note(_progress: Progress, _done: int, _total: int, unit: str, message: str, **_: object) -> None:
        messages.append(f"{unit}{message}")

    monkeypatch.setattr("pipeline.evaluate.evaluate.plan_work", choose)
    monkeypatch.setattr(Progress, "update", note)
    with pytest.raises(DataError, match="no rows"):
        run_evaluate(StepContext(tiny, evaluate_step(tiny), tiny.workspace))
    assert messages == ["choosing rows", "choosing rows: 3 of 9 shards"]


def test_run_evaluate_keeps_committed_parts_and_ends_in_the_bytes_of_one_process(tiny: Recipe, tmp_path: Path) -> None:
    context = StepContext(tiny, evaluate_step(tiny), tiny.workspace)
    work, output = plan_work(tiny, context.inputs), context.output
    alone = Artifact(str(tmp_path))
    runner = make_runner(tiny, context.inputs, alone, work)
    for part in work.parts:
        runner.run(part)
    finish(tiny, context.inputs, alone, work)

    first = work.parts[0]
    record = make_runner(tiny, context.inputs, output, work).run(first)
    result = ray.get(ray.remote(num_cpus=0)(run_evaluate).remote(context))
    assert output.shard_records()[first.name] == record
    assert result.counts == {"in": work.num_items, "ok": work.num_items}
    assert result.metrics["num_prompts"] == 10
    assert result.num_workers == 2
    progress = read_progress(output)
    assert progress is not None
    assert progress.done == progress.total == work.num_items

    def files(artifact: Artifact) -> dict[str, object]:
        skipped = (LIVE, ".done.json")
        return {
            name: artifact.describe(name)
            for name in artifact.names()
            if not name.startswith(skipped[0]) and not name.endswith(skipped[1])
        }

    assert files(output) == files(alone)
