"""What a recipe costs in money."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.data.npy_folder import export_embeddings
from pipeline.data.vectors import to_unit
from pipeline.networks.bill import REQUESTS, Bill, format_bill, recipe_bill, requests_of
from pipeline.networks.costs import recipe_costs
from pipeline.recipe.estimate import StepTime, save_times
from pipeline.recipe.pairs_sections import PairsList
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.timing.units import RowUnits, Units, step_times
from pipeline.train.memory import WorkerMemory, count_memory
from pipeline.workspace.store import Artifact
from tests.scaling_page import counted_by_hand, value
from tests.tiny.command import unclip_json
from tests.tiny.recipe import tiny_tables, write_recipe
from tests.tiny.shards import make_embeddings

_PRICES = {"gpu_hour": 2.0, "cpu_hour": 0.5, "storage_gb_month": 0.02, "storage_months": 3.0, "writes_1000": 5.0}
_GPU = {"resources": {"accelerator": "cuda"}}


def _recipe(workspace: Path, **changes: Any) -> Recipe:
    scenes = {"num_pairs": 20_000, "num_faulty": 0}
    tables = tiny_tables(workspace, prices=_PRICES, pairs={"drawn": scenes}, decoder=_GPU, embed=_GPU, **changes)
    return parse_recipe(tables)


def _bill(recipe: Recipe) -> Bill:
    bill = recipe_bill(recipe, recipe_costs(recipe))
    assert bill is not None
    return bill


def test_a_bill_is_hours_and_storage_at_the_prices_of_the_recipe(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path / "w", clip={"resources": {"num_workers": 3, "cpus_per_worker": 2.0}})
    save_times(recipe, {"download": StepTime(0.0, 7200.0), "clip": StepTime(3600.0)}, 1.0)
    bill, costs = _bill(recipe), {cost.name: cost for cost in recipe_costs(recipe)}
    gpu, cpu, storage = bill.entries
    embedding_s = 20_000 * costs["clip"].sampling_flops / (989e12 * 0.4)
    assert gpu.amounts == {
        "embed": pytest.approx(embedding_s / 3600),
        "decoder": pytest.approx(costs["decoder"].hours("h100")),
    }
    # A step's time is that of one worker; a training has all of its workers from beginning to end.
    assert cpu.amounts == {"download": 2.0 * recipe.download.resources.cpus_per_worker, "clip": 1.0 * 3 * 2.0}
    assert storage.amounts["download"] == pytest.approx(20_000 * 25e3 * (32 / 256) ** 2 / 1e9)
    assert storage.amounts["decoder"] == pytest.approx(costs["decoder"].weights_bytes / 1e9)
    assert storage.money == pytest.approx(0.02 * 3 * sum(storage.amounts.values()))
    assert bill.money == pytest.approx(2.0 * gpu.amount + 0.5 * cpu.amount + storage.money)
    [note] = bill.notes
    assert note.startswith("no time is known of pairs, index, prior, ")
    assert format_bill(bill).splitlines()[3].split() == ["together", f"{bill.money:,.2f}", "USD"]
    assert bill.to_dict()["entries"][1]["money"] == pytest.approx(0.5 * cpu.amount)


@pytest.mark.parametrize(("rows_of_a_shard", "num_workers"), [(1000, 8), (10_000, 2)])  # of 20 shards, and of 2
def test_every_worker_that_waits_for_a_limited_host_is_billed(
    tmp_path: Path, rows_of_a_shard: int, num_workers: int
) -> None:
    download = {"samples_per_shard": rows_of_a_shard, "resources": {"num_workers": 8, "cpus_per_worker": 0.5}}
    recipe = _recipe(tmp_path, download=download)
    units = Units(process_s=0.0, num_rows=20_000, rows={"download": RowUnits(row_s=0.9, unshared_row_s=1.8)})
    save_times(recipe, step_times(recipe, units), 1.0)
    cpu = next(entry for entry in _bill(recipe).entries if entry.what == "CPU")
    assert cpu.amounts == {"download": pytest.approx((5.0 + 10.0 * num_workers) * 0.5)}


def test_a_bill_up_to_a_step_has_nothing_of_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = _recipe(tmp_path)
    requests = dict.fromkeys(("pairs", "clip", "decoder"), 1.0)
    monkeypatch.setattr("pipeline.networks.bill.requests_of", lambda *_: (requests, requests))
    bill = recipe_bill(recipe, recipe_costs(recipe), until="embed")
    assert bill is not None
    amounts = {entry.what: set(entry.amounts) for entry in bill.entries}
    assert amounts == {
        "GPU": {"embed"},
        "storage": {"download", "clip", "embed"},
        "writing requests": {"pairs", "clip"},
    }


def test_the_cost_up_to_a_step_is_that_of_its_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []

    def count(name: str, *rest: Any) -> WorkerMemory:
        counted.append(name)
        return count_memory(name, *rest)

    monkeypatch.setattr("pipeline.train.fitting.count_memory", count)
    path = str(write_recipe(tmp_path, port=1))
    answer = unclip_json("plan", path, "--cost", "--until", "embed")
    assert [network["name"] for network in answer["networks"]] == ["clip"]
    assert answer["networks"][0]["worker_memory"]["samples"] > 0
    assert counted == ["clip"]  # the others are not counted to be thrown away


def test_token_states_are_in_the_storage_of_embed(tmp_path: Path) -> None:
    plain = _recipe(tmp_path)
    sizes = [
        next(entry for entry in _bill(recipe).entries if entry.what == "storage").amounts["embed"]
        for recipe in (plain, replace(plain, embed=replace(plain.embed, token_states=True)))
    ]
    assert sizes[1] - sizes[0] == pytest.approx(20_000 * (20 * (2 * 16 + 4) + 2 * 16) / 1e9)


def test_imported_embeddings_are_billed_by_their_own_rows_and_no_network(tmp_path: Path) -> None:
    embed = Artifact(str(tmp_path / "embed"))
    vectors = to_unit(np.random.default_rng(0).standard_normal((30, 16)).astype(np.float16))
    make_embeddings(embed, vectors, vectors, 20)
    export_embeddings(embed, tmp_path / "folder")
    recipe = _recipe(tmp_path / "w")
    bill = _bill(replace(recipe, embed=replace(recipe.embed, import_from=str(tmp_path / "folder"))))
    by_name = {entry.what: entry.amounts for entry in bill.entries}
    assert set(by_name["GPU"]) == {"decoder"}
    assert "embed" in bill.notes[0]  # no time is known of it
    assert by_name["storage"]["index"] == pytest.approx(30 * 2 * 2 * 16 / 1e9)


def test_files_of_a_finished_step_are_counted_as_they_are(tiny: Recipe) -> None:
    recipe = replace(tiny, prices=_recipe(Path("w")).prices)
    storage = next(entry for entry in _bill(recipe).entries if entry.what == "storage")
    sizes = [path.stat().st_size for path in Path(tiny.workspace).glob("decoder/*/*") if path.name != "manifest.json"]
    assert storage.amounts["decoder"] == pytest.approx(sum(sizes) / 1e9)


def test_a_recipe_without_prices_has_no_bill(tiny: Recipe) -> None:
    assert recipe_bill(tiny, recipe_costs(tiny)) is None


def test_requests_are_those_of_the_page_about_scaling() -> None:
    page = counted_by_hand()
    assert REQUESTS.keys() == page.keys()
    for step, counts in REQUESTS.items():
        for (of_shard, besides), kinds in zip(counts, [("GET", "ranged GET", "HEAD"), ("PUT", "LIST")], strict=True):
            for num_shards in (1, 2, 30):
                letters = {"N": num_shards, "Q": num_shards, "B": 1, "E": 0}
                by_hand = sum(value(page[step][kind], letters) for kind in kinds)
                assert of_shard * num_shards + besides == by_hand, step


def test_requests_are_counted_for_an_object_store_alone() -> None:
    recipe = _recipe(Path("w"))
    assert requests_of(recipe, 10_000_000) == ({}, {})
    reads, writes = requests_of(replace(recipe, workspace="s3://bucket/w"), 1000 * recipe.download.samples_per_shard)
    assert reads["download"] == pytest.approx(7.014)
    assert writes["download"] == pytest.approx(4.011)
    assert reads["upsampler_1"] == reads["clip"]  # both read pictures and captions alone
    assert "evaluate" not in reads


def test_the_cost_of_networks_needs_no_list(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=1)
    changes = ["pairs.source=list", f"pairs.path={tmp_path}/none.csv", "prices.gpu_hour=2"]
    words = [word for change in changes for word in ("--set", change)]
    result = CliRunner().invoke(app, ["plan", str(path), "--cost", *words])
    assert result.exit_code == 0, result.output
    assert "decoder" in result.stdout
    assert "the money is not counted: " in result.stderr


def test_tars_of_a_person_cost_the_list_requests_of_each_and_of_each_task_that_reads_them() -> None:
    recipe = replace(_recipe(Path("w")), workspace="s3://bucket/w")
    tars = replace(recipe, pairs=replace(recipe.pairs, source="shards", path="tars"))
    lists = (PairsList(path="tars"), PairsList(path="more"))
    several = replace(recipe, pairs=replace(recipe.pairs, source="shards", lists=lists))

    def requests(recipe: Recipe, num_tars: int, step: str = "pairs") -> list[float]:
        return [kinds[step] for kinds in requests_of(recipe, num_tars * recipe.download.samples_per_shard)]

    assert requests(recipe, 1000) == pytest.approx([0.043, 0.029])
    assert requests(tars, 1000) == pytest.approx([0.043 + 1000 * 0.015, 0.029 + 1000 * 0.007])
    assert requests(tars, 5000) == pytest.approx([0.043 + 30 + 1024 * 0.009, 0.029 + 20 + 1024 * 0.003])
    assert requests(several, 5000) == pytest.approx([0.043 + 30 + 2048 * 0.009, 0.029 + 20 + 2048 * 0.003])
    assert requests(recipe, 1000, "download") == requests(tars, 1000, "download")
