"""What the steps of a recipe ask of an object store, counted by a server, and by hand in docs/scaling.md; and its faults.

The steps run in this process, with the code of their workers and of their commits, but without Ray.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.filter.gathered import plan_bundles
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.context import StepContext
from pipeline.workspace import objects
from tests.ports import free_port
from tests.s3_server import Request, S3Server, faulty, started
from tests.scaling_page import counted_by_hand, value
from tests.tiny.steps_here import COUNTED_STEPS, count_all_steps, counted_recipe, run_step, steps_here
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
            recipe = counted_recipe(f"s3://counted/{number}", number, _ROWS)
            requests.append(count_all_steps(recipe, s3_server, cache))
        yield requests


def test_the_steps_ask_what_the_page_counts_by_hand(counted: list[dict[str, list[Request]]]) -> None:
    page = counted_by_hand()
    assert page.keys() == set(COUNTED_STEPS)
    for number, requests in zip((_FEW, _MORE), counted, strict=True):
        letters = {"N": number, "B": 1, "E": 0, "Q": number}
        for step in COUNTED_STEPS:
            by_hand = {kind: value(cell, letters) for kind, cell in page[step].items()}
            assert Counter(one.kind for one in requests[step]) == Counter(by_hand), step


def test_pages_and_bundles_cost_what_the_page_counts_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules of the page for so many shards that a listing has several pages, and the filter several bundles."""
    num_shards, page_names, steps = 33, 60, ("download", "filter", "embed")
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", str(page_names))
    monkeypatch.setattr(objects, "_BATCH", page_names)
    with started() as server:
        server.make_bucket("paged")
        use(server.environment | {"UNCLIP_CACHE": str(tmp_path / "cache")}, monkeypatch)
        recipe = counted_recipe("s3://paged/w", num_shards, 2)
        counted = count_all_steps(recipe, server, tmp_path / "cache", steps)
    page, letters = counted_by_hand(), {"N": num_shards, "B": 2, "E": 0}
    assert len(plan_bundles(num_shards)) == 2
    for step in steps:
        by_hand = {kind: value(cell, letters, page_names) for kind, cell in page[step].items()}
        assert by_hand["LIST"] > value(page[step]["LIST"], letters)
        assert Counter(one.kind for one in counted[step]) == Counter(by_hand), step


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


def test_token_states_cost_what_the_page_says(
    counted: list[dict[str, list[Request]]], bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """A file more of each shard, and no weights of CLIP."""
    recipe = counted_recipe(f"{bucket}/w", _FEW, _ROWS)
    recipe = replace(recipe, embed=replace(recipe.embed, token_states=True))
    requests = count_all_steps(recipe, s3_server, tmp_path / "cache", ("embed", "prior"))
    more = {step: Counter(one.kind for one in requests[step]) for step in ("embed", "prior")}
    for step, kinds in more.items():
        kinds.subtract(Counter(one.kind for one in counted[0][step]))
    assert {kind: count for kind, count in more["embed"].items() if count} == {"PUT": _FEW, "HEAD": _FEW}
    fetched = [one.name for one in requests["prior"] if "GET" in one.kind and one.name.endswith((".arrow", ".parquet"))]
    assert len(fetched) == len(set(fetched)) == 2 * _FEW
    assert not [one.name for one in requests["prior"] if one.name.endswith("open_clip_model.safetensors")]


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
