"""What the steps of a recipe ask of an object store, counted by a server, and by hand in docs/scaling.md; and its faults.

The steps run in this process, with the code of their workers and of their commits, but without Ray.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.context import StepContext
from tests.ports import free_port
from tests.s3_server import Request, S3Server, faulty
from tests.scaling_page import counted_by_hand
from tests.tiny.steps_here import COUNTED_STEPS, count_requests, counted_recipe, run_step, steps_here
from tests.workspace.conftest import use

pytestmark = pytest.mark.slow

_ROWS = 24
"""Rows of a shard: every shard holds a query of the index."""
_FEW, _MORE = 2, 4
"""Shards."""
_TIMED = (".done.json", "_stats.json", "metrics.jsonl", "segment.json", "index.json")
"""Ends of the names of files that hold times."""
_BESIDES_BYTES = 4000
"""What a training may fetch for a shard beside its files: 0.02 % of a shard of 20 MB."""
_PLAIN_STEPS = tuple(step for step in COUNTED_STEPS if step != "filter")


@pytest.fixture(scope="module", autouse=True)
def _without_ray() -> Generator[None]:
    with steps_here():
        yield


@pytest.fixture(scope="module")
def counted(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Generator[list[dict[str, list[Request]]]]:
    """The requests of recipes with few and with more shards, by step; the filter is in a recipe of its own."""
    cache = tmp_path_factory.mktemp("machine") / "cache"
    s3_server.make_bucket("counted")
    with pytest.MonkeyPatch.context() as patch:
        use(s3_server.environment | {"UNCLIP_CACHE": str(cache)}, patch)
        requests = list[dict[str, list[Request]]]()
        for number in (_FEW, _MORE):
            plain = counted_recipe(f"s3://counted/{number}", number, _ROWS)
            filtered = counted_recipe(f"s3://counted/{number}-filter", number, _ROWS, filter={"duplicates": "exact"})
            of_plain = count_requests(plain, s3_server, cache)
            of_filtered = count_requests(filtered, s3_server, cache, ("pairs", "download", "filter"))
            requests.append(of_plain | {"filter": of_filtered["filter"]})
        yield requests


def test_a_shard_costs_the_requests_that_the_page_counts_by_hand(counted: list[dict[str, list[Request]]]) -> None:
    page, (few, more) = counted_by_hand(), counted
    assert page.keys() == set(COUNTED_STEPS)
    for step in COUNTED_STEPS:
        kinds = [Counter(one.kind for one in requests[step]) for requests in (few, more)]
        assert kinds[1].keys() <= page[step].keys()
        slopes = {kind: (kinds[1][kind] - kinds[0][kind]) / (_MORE - _FEW) for kind in page[step]}
        assert slopes == {kind: of_shard for kind, (of_shard, _) in page[step].items()}, step
        assert all(kinds[0][kind] - of_shard * _FEW <= rest for kind, (of_shard, rest) in page[step].items()), step


def test_a_training_fetches_its_data_once(counted: list[dict[str, list[Request]]]) -> None:
    for step, files in {"clip": 2, "prior": 1, "decoder": 2}.items():
        of_data = [[one for one in requests[step] if one.name.endswith((".tar", ".parquet"))] for requests in counted]
        names = [one.name for one in of_data[1] if "GET" in one.kind]
        assert len(names) == len(set(names)) == files * _MORE, step
        # Besides come its records: what more shards add to all bytes, without what they add to the data.
        all_bytes, data_bytes = (
            [sum(one.num_bytes for one in requests) for requests in both]
            for both in ([requests[step] for requests in counted], of_data)
        )
        besides = (all_bytes[1] - all_bytes[0]) - (data_bytes[1] - data_bytes[0])
        assert 0 < besides / (_MORE - _FEW) <= _BESIDES_BYTES, step


def _checksums(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Of the files of each step, without those that hold times."""
    checksums: dict[str, dict[str, str]] = {}
    for step in make_plan(recipe):
        if step.name in _PLAIN_STEPS:
            context = StepContext(recipe, step, recipe.workspace)
            run_step(context)
            manifest = context.output.manifest()
            assert manifest is not None
            files = manifest.files.items()
            checksums[step.name] = {name: facts["sha256"] for name, facts in files if not name.endswith(_TIMED)}
    return checksums


def test_steps_on_a_store_that_fails_have_the_bytes_of_steps_here(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, cut_in = free_port(), ("download", "embed", "prior")
    s3_server.make_bucket("faulty")
    here = counted_recipe(str(tmp_path / "w"), _FEW, _ROWS)
    there = replace(here, workspace="s3://faulty/w")
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "UNCLIP_CACHE": str(tmp_path / "cache")}
    use(s3_server.environment | environment, monkeypatch)
    with faulty(s3_server, port, cut_in) as cuts:
        assert _checksums(there) == _checksums(here)
    assert sorted(cuts) == sorted(cut_in)
