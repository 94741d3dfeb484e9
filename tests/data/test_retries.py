"""Other tries of failed rows: which classes wait, and how the shards that gained take the place of the old ones."""

import threading
from pathlib import Path

import pytest

from pipeline.data.retries import adopt, ask_retry, end_retry, give_up_retries, staged_in, waiting_retries
from pipeline.errors import StepError
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact

_AT_ONCE = 16


def _stage(output: Artifact, failed_class: str, shards: list[str]) -> None:
    """Shards as a try leaves them: old ones in their place, and new ones aside."""
    for target, content in ((output, b"old"), (staged_in(output, failed_class), b"new")):
        for shard in shards:
            target.write_bytes(f"{shard}.tar", content)
            files = {f"{shard}.tar": target.describe(f"{shard}.tar")}
            target.commit_shard(ShardRecord(shard=shard, counts={"in": 1, "ok": 1}, files=files))


def test_a_class_that_is_asked_for_takes_in_narrower_ones_that_wait(tmp_path: Path) -> None:
    output = Artifact(str(tmp_path))
    for failed_class in ("http-503", "timeout", "http", "http-404"):
        ask_retry(output, failed_class)
    assert waiting_retries(output) == ["timeout", "http"]
    end_retry(output, "timeout")
    assert waiting_retries(output) == ["http"]
    ask_retry(output, "all")
    assert waiting_retries(output) == ["all"]


def test_a_try_that_is_given_up_keeps_what_came(tmp_path: Path) -> None:
    output = Artifact(str(tmp_path))
    give_up_retries(output)
    assert output.names() == []
    ask_retry(output, "http")
    _stage(output, "http", ["00000"])
    adopt(output)
    assert output.read_bytes("00000.tar") == b"old"
    give_up_retries(output)
    adopt(output)
    assert output.read_bytes("00000.tar") == b"new"
    assert waiting_retries(output) == []


def test_shards_are_put_in_place_many_at_a_time_and_each_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, shards = Artifact(str(tmp_path)), [f"{number:05d}" for number in range(2 * _AT_ONCE)]
    _stage(output, "http", shards)
    move, together, counts = Artifact.move, threading.Barrier(_AT_ONCE, timeout=30), list[tuple[int, int]]()

    def move_together(source: Artifact, name: str, target: Artifact) -> None:
        together.wait()
        move(source, name, target)

    monkeypatch.setattr(Artifact, "move", move_together)
    adopt(output, lambda done, total: counts.append((done, total)))
    assert counts == [(number, len(shards)) for number in range(1, len(shards) + 1)]
    for shard, record in output.shard_records().items():
        assert output.read_bytes(f"{shard}.tar") == b"new"
        assert record.files == {f"{shard}.tar": output.describe(f"{shard}.tar")}
    assert [name for name in output.names() if name.startswith("live/")] == []


def test_whoever_counts_the_shards_may_stop_and_the_rest_is_done_later(tmp_path: Path) -> None:
    output, shards = Artifact(str(tmp_path)), [f"{number:05d}" for number in range(3)]
    _stage(output, "http", shards)

    def stop(_done: int, _total: int) -> None:
        raise StepError("the lock was lost")

    with pytest.raises(StepError, match="lock"):
        adopt(output, stop)
    adopt(output)
    assert [output.read_bytes(f"{shard}.tar") for shard in shards] == [b"new"] * 3
