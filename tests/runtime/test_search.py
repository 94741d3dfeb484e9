"""The batch search on a real Ray: its answers, its refusals, and kill -9 of its workers and drivers."""

import contextlib
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch

from pipeline.errors import ConfigError, StepError
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.retrieve.changes import delete, restore
from pipeline.retrieve.query_list import num_parts
from pipeline.retrieve.search import STEPS, Query, Searcher, SearchOptions
from pipeline.runtime import search
from pipeline.runtime.context import StepContext
from pipeline.runtime.pool import total_counts
from pipeline.workspace.lock import used_artifacts
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact, Workspace
from tests.ray_head import RayHead, ray_head
from tests.tiny.command import ROOT, start_unclip, unclip, unclip_here
from tests.tiny.workspace import COLOURS, served_workspace

pytestmark = pytest.mark.ray

_NUM_QUERIES = 5000
_PARTS = ("00000", "00001", "00002")


class _Nobody:
    """An observer that counts the readings."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments: self.events.append(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    texts = (f"a {COLOURS[number % 10]} picture {number}" for number in range(_NUM_QUERIES))
    (folder / "queries.txt").write_text("\n".join(texts))
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    torch.set_num_threads(1)
    return served_workspace(folder, overrides=("embed.resources.cpus_per_worker=0.5",))


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with ray_head(num_cpus=2, environment={"PYTHONPATH": str(ROOT)}) as head:
            yield head


def _command(folder: Path, head: RayHead | None, *words: str) -> list[str]:
    address = ["--address", head.address] if head else []
    return ["search", str(folder / "tiny.toml"), "--queries", str(folder / "queries.txt"), *address, *words]


@pytest.fixture(scope="module")
def calm(folder: Path, recipe: Recipe, head: RayHead) -> Artifact:
    """The answers of a run that nobody disturbs."""
    done = unclip(*_command(folder, head, "-k", "3", "--modality", "text", "--out", str(folder / "calm")))
    assert done.returncode == 0, done.stdout
    assert f"{folder / 'calm'}: 5,000 in, 5,000 ok, 0 fewer, 0 failed" in done.stdout
    assert "search: done in" in done.stdout
    return Artifact(str(folder / "calm"))


def test_answers_are_those_of_single_searches(recipe: Recipe, calm: Artifact) -> None:
    tables = [pq.read_table(calm.path(f"{part}.parquet")) for part in _PARTS]
    assert [len(table) for table in tables] == [2048, 2048, 904]
    searcher = Searcher.open(recipe)
    for table, row in ((tables[0], 0), (tables[1], 77), (tables[2], 903)):
        answer = table.slice(row, 1).to_pylist()[0]
        [*expected] = searcher.search([Query("text", answer["text"])], SearchOptions(3, "text")).neighbours
        scores = [one["similarity"] for one in answer["neighbours"]]
        assert scores == pytest.approx([one.similarity for one in expected], abs=1e-5)
        assert {one["uid"] for one in answer["neighbours"]} == {one.uid for one in expected}
    assert tables[2].column("query")[903].as_py() == _NUM_QUERIES - 1
    manifest = calm.manifest()
    assert manifest is not None
    assert {f"{part}.parquet" for part in _PARTS} <= set(manifest.files)
    assert not any(name.startswith("live/") for name in calm.names())


def test_a_finished_search_is_not_made_again_and_another_one_is_refused(
    folder: Path, recipe: Recipe, calm: Artifact
) -> None:
    before = {name: calm.path(name).stat().st_mtime_ns for name in calm.names()}
    same = _command(folder, None, "-k", "3", "--modality", "text", "--out", calm.uri)
    assert unclip_here(*same).returncode == 0
    assert {name: calm.path(name).stat().st_mtime_ns for name in calm.names()} == before
    done = unclip_here(*_command(folder, None, "-k", "4", "--modality", "text", "--out", calm.uri))
    assert done.returncode == 2
    assert "holds the answers of another search (k: 3 -> 4); give another --out" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--where", "widht > 3"], 2, "no column 'widht'"),
        (["--html", "a.html"], 2, "--queries takes no text"),
        (["--queries", "none.txt"], 2, "--queries none.txt: no such file"),
        (["--queries", "s3://a/q.txt"], 2, "q.txt: no such file; the list must be on this machine: copy it from"),
    ],
)
def test_wrong_batch_searches_are_one_message(
    folder: Path, recipe: Recipe, tmp_path: Path, words: list[str], code: int, message: str
) -> None:
    done = unclip_here(*_command(folder, None, "--out", str(tmp_path / "out"), *words))
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_search_marks_what_it_reads(
    folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set[str]()

    def connect(_: str) -> None:
        used.update(name.partition("/")[0] for name in used_artifacts(Workspace(recipe.workspace)))
        raise StepError("no Ray")

    monkeypatch.setattr(search, "connect", connect)
    with pytest.raises(StepError, match="no Ray"):
        search.search_many(
            recipe, str(folder / "queries.txt"), SearchOptions(), cast("Any", _Nobody()), out=str(tmp_path / "out")
        )
    assert used == set(STEPS)


def _answer_here(context: StepContext, _: object) -> dict[str, int]:
    """Answer all parts in this process."""
    assert isinstance(context, search.SearchContext)
    worker = search.SearchWorker(context)
    return total_counts([worker(f"{number:05d}") for number in range(num_parts(context.output.path(search.QUERIES)))])


def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "connect", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}, "Labels": {}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})


def test_a_search_for_whose_workers_this_machine_is_too_small_is_refused(
    folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_ray(monkeypatch)
    monkeypatch.setattr(search, "_answer", lambda *_: {"in": 0, "ok": 0})  # where Ray would wait without end
    large = load_recipe(folder / "tiny.toml", ["embed.resources.cpus_per_worker=64"])
    assert large.workspace == recipe.workspace
    with pytest.raises(
        StepError, match=r"embed needs 1 x 64 CPU: .* Change embed\.resources\.cpus_per_worker, or run on"
    ):
        search.search_many(
            large, str(folder / "queries.txt"), SearchOptions(), cast("Any", _Nobody()), out=str(tmp_path / "out")
        )


def test_a_search_after_a_change_of_the_index_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, queries = served_workspace(tmp_path), tmp_path / "queries.txt"
    queries.write_text("a red picture")
    index = finished_artifacts(recipe, STEPS)["index"]
    _without_ray(monkeypatch)
    monkeypatch.setattr(search, "_answer", _answer_here)

    def urls(out: Path | str = "") -> tuple[set[str], str]:
        observer: Any = _Nobody()
        answers, _ = search.search_many(recipe, str(queries), SearchOptions(k=10), observer, out=str(out))
        [neighbours] = pq.read_table(answers.path("00000.parquet")).column("neighbours").to_pylist()
        return {one["url"] for one in neighbours}, answers.uri

    red = "http://127.0.0.1:1/red.jpg"
    everything, folder = urls()
    assert red in everything
    assert urls() == (everything, folder)
    delete(index, [red])
    later, later_folder = urls()
    assert (later, later_folder != folder) == (everything - {red}, True)

    def answer_after_a_change(context: StepContext, observer: object) -> dict[str, int]:
        assert restore(index, [red]).changed == 1
        return _answer_here(context, observer)

    monkeypatch.setattr(search, "_answer", answer_after_a_change)
    assert urls(tmp_path / "out")[0] == everything - {red}  # of the version with which it began
    with pytest.raises(ConfigError, match=r"holds the answers of another search \(index_version: 1 -> 2\)"):
        urls(tmp_path / "out")


def test_a_search_whose_version_of_the_index_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, queries = served_workspace(tmp_path), tmp_path / "queries.txt"
    queries.write_text("a red picture")
    index = finished_artifacts(recipe, STEPS)["index"]
    delete(index, ["http://127.0.0.1:1/red.jpg"])

    def answer_after_changes(context: StepContext, observer: object) -> dict[str, int]:
        for colour in ("blue", "green"):
            delete(index, [f"http://127.0.0.1:1/{colour}.jpg"])
        return _answer_here(context, observer)

    _without_ray(monkeypatch)
    monkeypatch.setattr(search, "_answer", answer_after_changes)
    with pytest.raises(StepError, match="version 1 is gone: the index has version 3 by now"):
        search.search_many(recipe, str(queries), SearchOptions(), cast("Any", _Nobody()))


def test_a_second_run_of_the_same_search_waits_its_turn(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    from pipeline.workspace.lock import locked

    out = tmp_path / "out"
    with locked(f"{out}/live/lock", "held", print):
        done = unclip_here(*_command(folder, None, "--out", str(out)))
    assert done.returncode == 4
    assert f"{out}: another run writes these answers (process " in done.stderr


@pytest.mark.slow
def test_kill_anywhere_ends_in_the_same_bytes(folder: Path, recipe: Recipe, calm: Artifact, head: RayHead) -> None:
    """Drivers and workers die at random moments, until a driver comes to its end."""
    wild, rng, kills = Artifact(str(folder / "wild")), random.Random(7), {"driver": 0, "workers": 0}
    command = _command(folder, head, "-k", "3", "--modality", "text", "--out", wild.uri)
    for number in range(8):
        kind = ("driver", "workers")[number % 2]
        with start_unclip(*command) as process:
            give_up = time.monotonic() + 60
            while process.poll() is None and not _has_begun(wild) and time.monotonic() < give_up:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.2))
            killed = False
            while not killed and process.poll() is None:
                if kind == "workers":
                    killed = _kill_workers(head)
                    time.sleep(0.02)
                else:
                    process.kill()
                    killed = True
            kills[kind] += killed
            output, _ = process.communicate(timeout=120)
        assert "Traceback" not in output
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    done = unclip(*command)
    assert done.returncode == 0, done.stdout
    assert sum(kills.values()) >= 2, kills
    for part in _PARTS:
        assert wild.describe(f"{part}.parquet") == calm.describe(f"{part}.parquet")
    assert not [path for path in Path(wild.uri).rglob("*") if path.name.startswith(".tmp-")]


def _has_begun(artifact: Artifact) -> bool:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        state = read_progress(artifact)
        return state is not None and state.has_begun and time.time() - state.updated < 2
    return False


def _kill_workers(head: RayHead) -> bool:
    """Whether there was one at work."""
    num_killed = 0
    for child in psutil.Process(head.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.startswith("ray::_Actor") for part in child.cmdline()):
                child.kill()
                num_killed += 1
    return num_killed > 0
