"""Which shards are made again after a download that was stopped because too few rows came through."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.recipe.sections import DownloadConfig
from pipeline.runtime.download_watch import TOO_FEW, remove_bad_shards
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
