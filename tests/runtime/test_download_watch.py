"""How the driver of a download looks at its shards; which are made again after a stop for too few good rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.sections import DownloadConfig
from pipeline.runtime import download, download_watch
from pipeline.runtime.context import StepContext
from pipeline.runtime.download_watch import TOO_FEW, DownloadWatch, progress_name, remove_bad_shards
from pipeline.runtime.download_workers import read_split
from pipeline.runtime.pairs import run_pairs
from pipeline.runtime.pool import ShardReading
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

_CONFIG = DownloadConfig()
_HALF = replace(_CONFIG, resources=replace(_CONFIG.resources, min_success_prob=0.5))


def _committed(output: Artifact, shares: dict[str, int]) -> None:
    """Shards of ten rows, with so many good ones."""
    for shard, num_ok in shares.items():
        output.write_bytes(f"{shard}.tar", b"tar")
        counts = {"in": 10, "ok": num_ok, "failed_to_download": 10 - num_ok}
        output.commit_shard(ShardRecord(shard=shard, counts=counts, files={f"{shard}.tar": {}}))
    output.write_json(TOO_FEW, 0.5)


def test_bad_shards_are_removed_though_a_kill_left_few_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, remove = Artifact(str(tmp_path)), Artifact.remove
    _committed(output, {"00000": 9, "00001": 0, "00002": 4, "00003": 0})
    removed = list[str]()

    def remove_one(artifact: Artifact, name: str) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(name)
        remove(artifact, name)

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "remove", remove_one)
        with pytest.raises(KeyboardInterrupt):
            remove_bad_shards(output, _HALF)
    output.remove("00003.done.json")  # as if the kill had come later: of what is left, enough came through
    remove_bad_shards(output, _HALF)
    assert output.names() == ["00000.done.json", "00000.tar"]


def test_all_shards_stay_if_enough_came_by_the_limit_of_now(tmp_path: Path) -> None:
    output = Artifact(str(tmp_path))
    _committed(output, {"00000": 9, "00001": 0})
    remove_bad_shards(output, replace(_CONFIG, resources=replace(_CONFIG.resources, min_success_prob=0.4)))
    assert [*output.shard_records()] == ["00000", "00001"]
    assert not output.exists(TOO_FEW)


def test_shards_are_looked_at_together_and_a_long_look_makes_a_long_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, looks, now, look_s = Artifact(str(tmp_path)), list[Sequence[str]](), 0.0, 0.1
    find = Artifact.find_jsons

    def find_jsons(artifact: Artifact, names: Sequence[str]) -> list[Any]:
        nonlocal now
        looks.append(names)
        now += look_s
        return find(artifact, names)

    monkeypatch.setattr(Artifact, "find_jsons", find_jsons)
    monkeypatch.setattr(download_watch, "time", SimpleNamespace(monotonic=lambda: now))
    output.write_json(progress_name("a"), {"rows": 3, "beat": 1, "causes": {"timeout": 2}})
    watch, shards = DownloadWatch(output), ["a", "b"]
    readings = {"a": ShardReading(3, 1), "b": ShardReading()}
    assert watch.read(shards) == readings
    assert watch.note() == "failed: 2 timeout"
    assert looks == [[*map(progress_name, shards)]]
    assert watch.read(shards) == {}
    now, look_s = now + 2.0, 30.0
    output.remove(progress_name("a"))
    assert watch.read(shards) == readings  # nothing new
    now += 119.0
    assert watch.read(shards) == {}
    now += 1.0
    assert watch.read(shards) == readings
    assert len(looks) == 3


def test_a_shard_that_took_workers_down_is_halved_by_its_own_rows(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"http://a.example/{row}.jpg\n" for row in range(13)))
    recipe = parse_recipe(
        {
            "workspace": str(tmp_path / "workspace"),
            "pairs": {"source": "list", "path": str(tmp_path / "list.txt")},
            "download": {"samples_per_shard": 10},
        }
    )
    contexts = {step.name: StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe, until="download")}
    run_pairs(contexts["pairs"])
    context = contexts["download"]
    for shard, num_rows in {"00000": 10, "00001": 3}.items():
        assert download._split(context, context.output, shard, 2)
        split = read_split(context.output, shard)
        assert split is not None
        assert split.begin() == (0, num_rows)
