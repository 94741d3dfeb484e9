"""What a list of pairs from tars asks of an object store: so much of each tar, whatever their rows are; and of tars in one."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.data import duplicates, make_pairs
from pipeline.data.tars import count_samples
from pipeline.networks.bill import TAR_REQUESTS, TASK_REQUESTS
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.workspace.objects import ObjectStore
from tests.s3_server import S3Server
from tests.scaling_page import by_the_clock
from tests.tiny.recipe import tiny_tables
from tests.tiny.shards import write_tar
from tests.tiny.steps_here import run_step, steps_here

_ROWS = 3


def _count(server: S3Server, workspace: str, folder: Path, num_tars: int) -> Counter[str]:
    """Requests of the pairs step, by kind."""
    folder.mkdir()
    for tar in range(num_tars):
        names = [f"{tar}-{row}" for row in range(_ROWS)]
        members = [(f"{name}.{suffix}", name.encode()) for name in names for suffix in ("jpg", "txt")]
        write_tar(folder / f"{tar}.tar", members)
    pairs = {"source": "shards", "path": str(folder), "resources": {"num_workers": 1}}
    recipe = parse_recipe(tiny_tables(Path("replaced"), pairs=pairs) | {"workspace": workspace})
    context = StepContext(recipe, make_plan(recipe)[0], recipe.workspace)
    server.counted()
    with steps_here():
        run_step(context)
    return Counter(one.kind for one in server.counted() if not by_the_clock(one))


def test_a_tar_costs_a_list_so_much_whatever_rows_are_compared(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = _count(s3_server, f"{bucket}/alone", tmp_path / "alone", 4)
    monkeypatch.setattr(make_pairs, "MOST_READS", 2)
    few.subtract(_count(s3_server, f"{bucket}/together", tmp_path / "together", 4))
    of_task = {kind: count / 2 for kind, count in few.items() if count}
    assert of_task == {"GET": 7, "HEAD": 2, "PUT": 3}
    assert (of_task["GET"] + of_task["HEAD"], of_task["PUT"]) == TASK_REQUESTS
    few, more = (_count(s3_server, f"{bucket}/{n}", tmp_path / str(n), n) for n in (4, 8))
    of_tar = {kind: (count - few[kind]) / 4 for kind, count in more.items() if count != few[kind]}
    assert of_tar == {"GET": 3, "HEAD": 3, "PUT": 4}
    assert (of_tar["GET"] + of_tar["HEAD"], of_tar["PUT"]) == TAR_REQUESTS
    monkeypatch.setattr(duplicates, "GROUP_ROWS", 6)
    in_groups = _count(s3_server, f"{bucket}/groups", tmp_path / "groups", 8)
    in_groups.subtract(more)
    of_groups = {kind: count / 3 for kind, count in in_groups.items() if count}  # there are three more
    assert of_groups == {"GET": 3, "HEAD": 2, "PUT": 2}


def test_the_rows_of_tars_in_a_store_are_estimated_from_the_beginning_of_the_first(
    s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    picture, names = bytes(1 << 20), [f"{number:02d}" for number in range(40)]
    write_tar(tmp_path / "0.tar", [(f"{name}.jpg", picture) for name in names])
    store = ObjectStore(f"{bucket}/tars")
    for number in range(3):
        store.put_file(str(tmp_path / "0.tar"), f"{store.path}/{number}.tar")
    s3_server.counted()
    assert abs(count_samples(f"{bucket}/tars") - 120) <= 1
    assert sum(one.num_bytes for one in s3_server.counted()) < 18 << 20
