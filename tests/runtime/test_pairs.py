"""The pairs step with several workers: its tasks, its pool, and shards that are taken in as they are."""

import io
import re
import tarfile
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import tomli_w

from pipeline.data import duplicates, sources
from pipeline.data.make_pairs import COMPARE, READ, PairsMaker
from pipeline.data.pairs import Pairs
from pipeline.data.shards import good_samples
from pipeline.errors import StepError
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.runtime import pool
from pipeline.runtime.context import StepContext
from pipeline.runtime.pairs import run_pairs
from pipeline.runtime.pool import ShardJob
from pipeline.workspace.manifest import ShardRecord, add_counts
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import Workspace
from tests.data.conftest import make_picture
from tests.s3_server import started
from tests.tiny.command import unclip
from tests.tiny.recipe import tiny_tables
from tests.workspace.conftest import use


class _PoolHere:
    """The pool's workers in this process, where a test sets how many rows are compared at once."""

    first_start_s = 0.0
    notice = ""
    num_rows_under_way = 0
    stops_behind: str = ""
    """Start of the name of the task behind which the run stops."""

    def __init__(self, context: StepContext, job: ShardJob, waiting: deque[str]) -> None:
        self._waiting = waiting
        self._worker = job.worker(context)
        self.hosts: dict[str, str] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting)

    def message(self) -> str:
        return ""

    def poll(self) -> list[ShardRecord]:
        record = self._worker(self._waiting.popleft())
        if self.stops_behind and record.shard.startswith(self.stops_behind):
            raise KeyboardInterrupt
        return [record]

    def close(self) -> None:
        pass


def _write_list(folder: Path) -> None:
    """A list of five parts: 200 rows, the same rows once more, and a part without rows."""
    folder.mkdir()
    for part in range(5):
        urls = [f"http://a/{part % 2}/{number}" for number in range(100 if part < 4 else 0)]
        columns = [pa.array(urls, pa.string())] * 2
        pq.write_table(pa.table(columns, names=["url", "caption"]), folder / f"{part}.parquet")


@pytest.mark.parametrize("stops_behind", ["", READ, COMPARE, "00"])
def test_several_workers_share_a_list_that_is_compared_in_groups(
    stops_behind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool counts the rows of each task, also of those that an earlier run has made."""
    monkeypatch.setattr(pool, "_Pool", _PoolHere)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    monkeypatch.setattr(duplicates, "GROUP_ROWS", 100)
    _write_list(tmp_path / "list")
    pairs = {"source": "list", "path": str(tmp_path / "list"), "resources": {"num_workers": 2}}
    recipe = parse_recipe(tiny_tables(tmp_path / "w", pairs=pairs))
    context = StepContext(recipe, make_plan(recipe)[0], recipe.workspace)
    if stops_behind:
        monkeypatch.setattr(_PoolHere, "stops_behind", stops_behind)
        with pytest.raises(KeyboardInterrupt):
            run_pairs(context)
        monkeypatch.setattr(_PoolHere, "stops_behind", "")
    shown = _note_progress(monkeypatch)
    assert run_pairs(context).counts == {"in": 400, "ok": 200, "duplicate": 200}
    records = context.output.shard_records()
    compared = [record.counts for name, record in records.items() if name.startswith(COMPARE)]
    assert len(compared) == 4
    assert add_counts(compared) == {"in": 400, "ok": 200, "duplicate": 200}
    assert max(shown) == 400


@pytest.mark.parametrize(("can_grow", "num_workers"), [(False, 2), (True, 2), (False, 1)])
def test_a_long_list_is_refused_where_its_workers_would_wait_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_grow: bool, num_workers: int
) -> None:
    has = {"CPU": 2.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": has, "Labels": {}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    monkeypatch.setattr(pool, "_Pool", _PoolHere)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    _write_list(tmp_path / "list")
    resources = {"num_workers": num_workers, "cpus_per_worker": 64.0}
    pairs = {"source": "list", "path": str(tmp_path / "list"), "resources": resources}
    recipe = parse_recipe(tiny_tables(tmp_path / "w", pairs=pairs))
    context = StepContext(recipe, make_plan(recipe)[0], recipe.workspace, can_grow=can_grow)
    if can_grow or num_workers == 1:
        assert run_pairs(context).counts["in"] == 400
        return
    with pytest.raises(StepError, match=re.escape("pairs needs 1 x 64 CPU: this machine has 2 CPU and 0 GPU")):
        run_pairs(context)


def test_the_progress_of_one_process_counts_the_pieces_before_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of an earlier run."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    _write_list(tmp_path / "list")
    pairs = {"source": "list", "path": str(tmp_path / "list"), "resources": {"num_workers": 1}}
    recipe = parse_recipe(tiny_tables(tmp_path / "w", pairs=pairs))
    context = StepContext(recipe, make_plan(recipe)[0], recipe.workspace)
    maker = PairsMaker(sources.source_of(recipe), context.output)
    for name in next(maker.phases())[:2]:
        maker.make(name)
    shown = _note_progress(monkeypatch)
    run_pairs(context)
    assert shown == [300, 400, 400]


def _note_progress(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that the progress shows as done from now on."""
    shown: list[int] = []
    update = Progress.update

    def noted(progress: Progress, done: int, *values: Any, **settings: Any) -> None:
        shown.append(done)
        update(progress, done, *values, **settings)

    monkeypatch.setattr(Progress, "update", noted)
    return shown


def _write_tar(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            for name, data in (
                (f"{number:04d}.jpg", make_picture(number)),
                (f"{number:04d}.txt", f"text {number}".encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.ray
def test_workers_share_the_tasks_and_shards_are_taken_in_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    for shard in range(4):
        _write_tar(tmp_path / f"shards/{shard}.tar", range(10 * shard, 10 * shard + 5))
    tables = tiny_tables(tmp_path / "workspace", pairs={"source": "shards", "path": str(tmp_path / "shards")})
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tables))
    done = unclip("run", str(tmp_path / "recipe.toml"), "--until", "download", "--set", "tracking.uri=off")
    assert done.returncode == 0, done.stdout
    recipe = load_recipe(tmp_path / "recipe.toml")
    pairs, download = (artifact_of(Workspace(recipe.workspace), step) for step in make_plan(recipe, until="download"))
    manifests = pairs.manifest(), download.manifest()
    assert [manifest.counts for manifest in manifests if manifest] == [{"in": 20, "ok": 20}] * 2
    assert manifests[0] is not None
    assert manifests[0].node_s == pytest.approx(2 * manifests[0].wall_s, abs=0.01)  # two workers
    assert [part.num_rows for part in Pairs(pairs).parts] == [5, 5, 5, 5]
    assert download.path("00002.tar").resolve() == tmp_path / "shards/2.tar"
    rows, pictures = good_samples(download.path("00002.tar"), download.path("00002.parquet"), "00002")
    assert rows.column("caption").to_pylist() == [f"text {number}" for number in range(20, 25)]
    assert all(pictures.read(row["key"], row["uid"]) for row in rows.to_pylist())
    plan = unclip("plan", str(tmp_path / "recipe.toml")).stdout
    assert "pairs: a change of 4 files, such as" in plan
    assert "is noticed only by its size" in plan


@pytest.mark.ray
def test_a_folder_in_a_store_goes_through_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and the files beside them are read by the run's process and by workers, which know the store by name."""
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    with started() as server:
        server.make_bucket("pictures")
        for number in range(12):
            name = f"pictures/mine/{number % 3}/{number:02d}"
            server.put(f"{name}.jpg", make_picture(number))
            server.put(f"{name}.txt", f"text {number}".encode())
        server.put("pictures/mine/2/99.jpg", b"no picture")
        changes = {
            "pairs": {"source": "folder", "path": "s3://pictures/mine"},
            "download": {"samples_per_shard": 5, "resources": {"num_workers": 2}},
        }
        (tmp_path / "recipe.toml").write_text(tomli_w.dumps(tiny_tables(tmp_path / "workspace", **changes)))
        done = unclip(
            *("run", str(tmp_path / "recipe.toml"), "--until", "download", "--set", "tracking.uri=off"),
            environment=server.environment | {"UNCLIP_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stdout
        read = [request.name for request in server.counted() if request.kind == "GET" and request.name.endswith(".jpg")]
        assert len(read) == len(set(read)) == 13
        use(server.environment, monkeypatch)
        recipe = load_recipe(tmp_path / "recipe.toml")
        steps = make_plan(recipe, until="download")
    output = artifact_of(Workspace(recipe.workspace), steps[1])
    tables = [pq.read_table(output.path(f"{shard:05d}.parquet")) for shard in range(3)]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["url"] for row in rows] == sorted(row["url"] for row in rows)
    failed = [row for row in rows if row["status"] != "success"]
    assert [(row["url"], row["error_message"]) for row in failed] == [("s3://pictures/mine/2/99.jpg", "not a picture")]
    assert {row["caption"] for row in rows if row not in failed} == {f"text {number}" for number in range(12)}
