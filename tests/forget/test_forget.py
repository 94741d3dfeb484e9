"""Pairs leave every file of a workspace, and do not come back."""

import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w

from jobs.forget import _print_removals, _print_search  # pyright: ignore[reportPrivateUsage]
from pipeline.data.blank import blank_rows
from pipeline.data.make_pairs import PairsMaker
from pipeline.data.rows import make_uid
from pipeline.data.selection import embeddings_of, selection_of
from pipeline.data.shard_tables import find_rows, split_counts
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.shards import ShardPictures
from pipeline.data.sources import source_of
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.data.urls import AddressRules
from pipeline.errors import DataError
from pipeline.forget.search import names_of, search
from pipeline.recipe.plan import make_plan
from pipeline.recipe.sections import DownloadConfig
from pipeline.recipe.status import plan_status
from pipeline.recipe.tables import to_dict
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.batch import NEIGHBOUR
from pipeline.retrieve.takedown import Takedown
from pipeline.workspace.forgotten import FORGOTTEN, PENDING, Forgotten, Pending
from pipeline.workspace.store import INPUTS, MANIFEST, Artifact, Workspace
from tests.data.hostile import HostileServer
from tests.forget.made import (
    BY_UID,
    BY_URL,
    Made,
    forget_names,
    texts_of,
    without_none,
)
from tests.tiny.command import unclip_here, unclip_json
from tests.tiny.shards import download_shard

Json = dict[str, Any]


def _uids(table: ShardTable) -> list[str]:
    return table.take("uid", np.arange(len(table))).to_pylist()


def test_a_search_counts_rows_and_names_the_networks_and_changes_nothing(made: Made) -> None:
    before = texts_of(made.workspace)
    result = search(made.workspace, [BY_URL, made.uids[BY_UID], "http://nowhere/"])
    assert result.unknown == ("http://nowhere/",)
    assert result.uids == {made.uids[BY_URL], made.uids[BY_UID]}
    assert result.rows == {"pairs": 2, "download": 2, "filter": 2, "embed": 2, "filter_embeddings": 2, "index": 2}
    trained = {network.step: network.pairs for network in result.networks}
    assert trained == dict.fromkeys(("clip", "decoder", "prior", "upsampler_1", "upsampler_2"), 2)
    assert {step for step, _ in result.dirty} == {*trained, "embed", "filter_embeddings", "index", "evaluate"}
    assert result.node_s == 9 * 3600.0
    assert result.roots == (("clip", made.artifact("clip").key),)
    assert texts_of(made.workspace) == before


def test_forgotten_pairs_are_in_no_file_and_everything_else_is(made: Made) -> None:
    urls = {BY_URL, BY_UID}
    contents = texts_of(made.workspace)
    assert all(made.uids[url] in contents and f"{url}'" in contents for url in urls)
    forget_names(made, BY_URL, made.uids[BY_UID])
    opened = NeighbourIndex.open(made.artifact("index"))
    assert opened.num_rows == 26  # at once
    made.finish()
    contents = texts_of(made.workspace)
    for url in urls:
        assert made.uids[url] not in contents
        assert f"{url}'" not in contents
        assert f"{url}\n" not in contents
    assert made.pictures[BY_UID].decode("latin-1") not in contents  # another URL has a copy of the first one's file
    for url in made.uids.keys() - urls:
        assert made.uids[url] in contents
        assert made.pictures[url].decode("latin-1") in contents
    assert not made.artifact("evaluate").names()
    assert made.workspace.artifact("", "").uri.rstrip("/") == made.workspace.root
    assert not (Path(made.workspace.root) / PENDING).exists()


def test_pairs_count_of_the_trainings_that_weights_come_from(made: Made) -> None:
    """A network that was lengthened, or begun with another one, has read what these have read."""
    trained = forget_names(made, BY_URL).networks
    forgotten = Forgotten.read(made.workspace.root)
    [one] = [network for network in trained if network.step == "prior"]
    today = {one.source: "what is left"}
    prior = made.artifact("prior").manifest()
    assert prior is not None
    anew = dataclasses.replace(prior, input_contents=today)
    assert (forgotten.trained_on(prior), forgotten.trained_on(anew)) == (1, 0)

    def continued(key: str, contents: Json | None, **origin: Json) -> Json:
        return {
            "continued": {"key": key, "step": 3} | ({} if contents is None else {"input_contents": contents}) | origin
        }

    old = {one.source: one.content}
    for sources, count in (
        (continued(one.key, old), 1),
        (continued(one.key, today), 0),
        (continued(one.key, None), 1),  # of a release that did not write it
        (continued("other", today, **continued(one.key, old)), 1),
        ({"begun_with": {"name": "prior", "key": one.key, "input_contents": old}}, 1),
        ({"begun_with": {"name": "clip", "key": one.key, "input_contents": old}}, 0),
    ):
        assert forgotten.trained_on(dataclasses.replace(anew, key="another", metrics=sources)) == count
    both = dataclasses.replace(prior, metrics=continued(one.key, old))
    assert forgotten.trained_on(both) == 1  # the same pairs


def test_what_a_network_would_continue_again_is_to_be_moved_away(made: Made, tmp_path: Path) -> None:
    prior = made.artifact("prior")
    manifest = prior.manifest()
    assert manifest is not None
    earlier = made.workspace.artifact("prior", "earlier")
    earlier.commit(dataclasses.replace(manifest, key="earlier"))
    origin = {"key": "earlier", "step": 3, "input_contents": manifest.input_contents}
    prior.write_json(MANIFEST, dataclasses.replace(manifest, metrics={"continued": origin}).to_dict())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(without_none(to_dict(made.recipe))))
    done = unclip_here("forget", BY_URL, "--recipe", str(recipe), "--delete")
    assert f"before that, move {earlier.uri} away: the prior that is made anew would continue it\n" in done.stdout
    assert f"pairs that are forgotten; move {earlier.uri} away, which it would continue, then `unclip run" in (
        unclip_here("plan", str(recipe)).stdout
    )
    earlier.destroy()
    assert "move" not in unclip_here("plan", str(recipe)).stdout


def test_a_network_that_began_with_weights_of_one_that_was_trained_on_pairs_is_named(made: Made) -> None:
    """By init_from: its own rows have none of the pairs."""
    prior = made.artifact("prior")
    manifest = prior.manifest()
    assert manifest is not None
    source = {"name": "prior", "key": prior.key, "input_contents": manifest.input_contents}
    second, pictures, under_way = (
        made.workspace.artifact(step, key) for step, key in (("prior", "b"), ("evaluate", "p"), ("prior", "u"))
    )
    clean = {"inputs": {"embed": "of others"}, "input_contents": {"embed": "no such pair"}}
    second.commit(dataclasses.replace(manifest, key="b", metrics={"begun_with": source}, **clean))
    pictures.commit(dataclasses.replace(manifest, step="evaluate", key="p", inputs={"prior": "b"}))
    under_way.write_json(INPUTS, clean["input_contents"])
    under_way.write_json("live/begun_with.json", {"name": "prior", "key": "b", "begun_with": source})
    search_result = forget_names(made, BY_URL)
    assert search_result.begun_with == ((("prior", "b"), ("prior", prior.key)), (("prior", "u"), ("prior", "b")))
    assert not [one for one in search_result.networks if one.key in {"b", "u"}]
    assert {("prior", "b"), ("evaluate", "p")} <= {*search_result.dirty}
    assert search_result.roots == (
        ("clip", made.artifact("clip").key),
    )  # who makes the first one anew has other weights
    second_manifest = second.manifest()
    assert second_manifest is not None
    assert Forgotten.read(made.workspace.root).trained_on(second_manifest) == 1

    prior.destroy()  # nobody needs it any more
    search_result = forget_names(made, BY_UID)
    assert [(one.step, one.key) for one in search_result.earlier] == [("prior", prior.key)]
    assert ("prior", prior.key) not in {(one.step, one.key) for one in search_result.networks}
    assert ("prior", "b") in search_result.roots
    assert Forgotten.read(made.workspace.root).trained_on(second_manifest) == 2


def test_weights_with_which_a_network_would_begin_again_are_named(made: Made, tmp_path: Path) -> None:
    prior = made.artifact("prior")
    manifest = prior.manifest()
    assert manifest is not None
    made.workspace.artifact("prior", "first").commit(dataclasses.replace(manifest, key="first"))
    source = {"name": "prior", "key": "first", "input_contents": manifest.input_contents}
    prior.write_json(MANIFEST, dataclasses.replace(manifest, metrics={"begun_with": source}).to_dict())
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(without_none(to_dict(made.recipe))))
    done = unclip_here("forget", BY_URL, "--recipe", str(recipe), "--delete").stdout
    assert f"{prior.key}  began with the weights of prior/first, which was trained on them\n" in done
    assert (
        "before that, let prior.init_from name other weights than those of prior/first: the prior that is made" in done
    )
    assert (
        "forgotten; let prior.init_from name other weights than those of prior/first, which was trained on them, "
        in (unclip_here("plan", str(recipe)).stdout)
    )
    answer = unclip_json("forget", BY_URL, "--recipe", str(recipe))
    weights = {"step": "prior", "key": "first"}
    assert answer["begun_with"] == [{"step": "prior", "key": prior.key, "weights": weights}]


def _answers(workspace: Workspace, key: str, row: dict[str, str]) -> Artifact:
    """A batch search that found one row."""
    output = workspace.artifact("search", key)
    near = [{name: row.get(name) for name in NEIGHBOUR.names}]
    with output.write("00000.parquet") as path:
        pq.write_table(pa.table({"text": ["a", "b"], "neighbours": pa.array([[], near], pa.list_(NEIGHBOUR))}), path)
    return output


def test_what_people_look_at_goes_too(made: Made) -> None:
    workspace = made.workspace
    rows = {row["url"]: row for row in pq.read_table(made.artifact("pairs").path("00000.parquet")).to_pylist()}
    row, other = rows[BY_UID], rows["http://a/clean-11"]
    ablations = [workspace.artifact("ablate", key) for key in ("shown", "other", "unfinished")]
    for artifact, caption in zip(ablations, (row["caption"], other["caption"]), strict=False):
        artifact.write_json("ablation.json", {"shown": [{"prompt": caption}]})
        artifact.write_bytes("manifest.json", b"{}")
    ablations[2].write_bytes("samples/z_image/00000.png", b"picture")
    searches = [_answers(workspace, "found", row), _answers(workspace, "other", other)]
    with workspace.artifact("search", "query").write("queries.parquet") as path:
        pq.write_table(pa.table({"uid": [None, row["uid"]], "embedding": [[1.0], None]}), path)
    decoder = made.artifact("decoder")
    for name in ("00000002.png", "00000002.json"):
        decoder.write_bytes(f"live/validation/{name}", b"{}")
    forget_names(made, row["uid"])
    made.finish()
    contents = texts_of(workspace)
    assert row["uid"] not in contents
    assert row["caption"] not in contents.replace(other["caption"], "")
    assert (workspace.keys("ablate"), workspace.keys("search")) == (["other"], ["other"])
    assert searches[1].names() == ["00000.parquet"]
    assert [name for name in decoder.names() if name.startswith("live/")] == ["live/validation/00000002.json"]


def test_a_search_that_alone_has_a_pair_goes(made: Made) -> None:
    _answers(made.workspace, "one", {"uid": "gone", "url": "http://gone/"})
    _answers(made.workspace, "two", {"uid": "gone, too", "url": "http://gone/"})
    forget_names(made, "http://gone/")
    made.finish()
    assert made.workspace.keys("search") == []


def test_a_search_that_found_another_pair_of_the_same_caption_stays(made: Made) -> None:
    rows = {row["url"]: row for row in pq.read_table(made.artifact("pairs").path("00000.parquet")).to_pylist()}
    _answers(made.workspace, "other", {"uid": "another", "url": "http://b/", "caption": rows[BY_UID]["caption"]})
    assert ("search", "other") not in forget_names(made, BY_UID).pending.removals


def test_what_is_left_is_whole(made: Made) -> None:
    forget_names(made, BY_URL, made.uids[BY_UID])
    made.finish()
    inputs = made.inputs("evaluate")
    download = inputs["download"]
    for name, artifact in inputs.items():
        manifest = artifact.manifest()
        assert manifest is not None
        for file in manifest.files if name != "index" else ():
            artifact.verify(file)
        assert len(manifest.former_contents) == (name in {"pairs", "download", "filter", "embed", "filter_embeddings"})
    records = download.shard_records().values()
    assert sum(record.counts["ok"] for record in records) == len(made.uids) - 2
    assert sum(record.causes.get("forgotten", 0) for record in records) == 2
    for record in records:
        table = pq.read_table(download.path(f"{record.shard}.parquet"))
        assert table.num_rows == record.counts["in"]
        assert record.splits == split_counts(download.path(f"{record.shard}.parquet"))
        pictures = ShardPictures(download.path(f"{record.shard}.tar"), record.shard)
        for row in table.to_pylist():
            if row["uid"]:
                assert pictures.read(row["key"], row["uid"]) == made.pictures[row["url"]]
    reader = ShardReader(download, None, "train", selection_of(inputs))
    left = {uid for shard in reader.shards for uid in _uids(reader.table(shard))}
    index = NeighbourIndex.open(made.artifact("index"))
    assert index.num_rows == len(left) == 26
    vectors = ShardReader(None, embeddings_of(inputs), "train", states=inputs["embed"])
    for shard in vectors.shards:
        table = vectors.table(shard)
        images = table.z_image(np.arange(len(table))).astype(np.float32)
        for uid, z_image in zip(_uids(table), images, strict=True):
            assert [row.uid for row in index.find(z_image[None], 1)[0]] == [uid]
    states = {status.step.name: status.state for status in plan_status(made.workspace, make_plan(made.recipe))}
    assert states.pop("evaluate") == "todo"
    assert set(states.values()) == {"done"}


def test_a_list_does_not_bring_them_back(made: Made, tmp_path: Path) -> None:
    forget_names(made, BY_URL)
    (tmp_path / "list.csv").write_text(f"url,caption\n{BY_URL},again\nhttp://a/new,new one\n")
    recipe = dataclasses.replace(
        made.recipe, pairs=dataclasses.replace(made.recipe.pairs, source="list", path=str(tmp_path / "list.csv"))
    )
    output = made.workspace.artifact("pairs", "other")
    maker = PairsMaker(source_of(recipe), output, Forgotten.read(made.workspace.root))
    for names in maker.phases():
        for name in names:
            maker.make(name)
    summary = maker.finish()
    assert (summary.counts["ok"], summary.metrics["forgotten"]) == (2, 1)
    rows = pq.read_table(output.path("00000.parquet")).to_pylist()
    assert [row["url"] for row in rows] == ["", "http://a/new"]


def test_a_forgotten_row_is_not_fetched_and_is_counted(tmp_path: Path) -> None:
    config = DownloadConfig(image_px=32, samples_per_shard=10, retries=0)
    with HostileServer() as server:
        urls = [f"{server.url}/ok?seed={number}" for number in range(3)]
        rows = {"uid": [make_uid(url, "c") for url in urls], "split": ["train"] * 3, "caption": ["c"] * 3, "url": urls}
        forgotten = Forgotten("salt").add([urls[1]], 0.0, {}, [])
        files = ShardFiles(*(tmp_path / name for name in ("0.tar", "0.parquet", "0.json")))
        rules = AddressRules(["127.0.0.1/32"], [])
        counts = download_shard(blank_rows(pa.table(rows), forgotten), "00000", config, files, rules)
        assert not [target for target in server.requests if "seed=1" in target]
        assert len(server.requests) >= 2
    assert (counts["ok"], counts["failed_to_download"]) == (2, 1)
    assert json.loads(files.stats.read_text())["status_dict"]["forgotten"] == 1


def test_an_append_leaves_them_out_and_the_list_of_takedowns_loses_their_names(made: Made) -> None:
    uid = made.uids[BY_URL]
    Takedown().add([uid, "http://other/"]).write(made.workspace.root)
    forget_names(made, BY_URL)
    takedown = Takedown.read(made.workspace.root)
    assert takedown.names == ("http://other/",)
    rows = pa.table({"uid": [uid, "x", "y"], "url": ["z", BY_URL, "http://other/"]})
    assert takedown.has(rows).tolist() == [True, True, True]
    assert Takedown(takedown.names).has(rows).tolist() == [False, False, True]


def test_the_record_has_when_and_how_many_and_no_name(made: Made) -> None:
    start = time.time()
    forget_names(made, BY_URL)
    forget_names(made, BY_URL)  # as after a kill: it counts once
    text = (Path(made.workspace.root) / FORGOTTEN).read_text()
    assert made.uids[BY_URL] not in text
    assert "http" not in text
    [entry] = Forgotten.read(made.workspace.root).entries
    assert start <= entry.at <= time.time()
    assert entry.rows["download"] == 1


def test_networks_that_are_not_made_from_each_other_are_each_named(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.artifact("clip").destroy()  # as with a CLIP of others
    prior = made.artifact("prior")
    manifest = prior.manifest()
    assert manifest is not None
    prior.clear()
    prior.write_json(INPUTS, manifest.input_contents)
    result = search(made.workspace, [BY_URL])
    assert {step for step, _ in result.roots} == {"decoder", "upsampler_1", "upsampler_2"}
    _print_search(result, "my.toml", "w", is_forgotten=True)
    text = capsys.readouterr().out
    assert f"{prior.key}  is being trained on 1 of these pairs" in text
    assert "unclip run my.toml --from decoder --force; and unclip run my.toml --from upsampler_1 --force; and" in text
    for step in ("decoder", "upsampler_1", "upsampler_2"):
        made.artifact(step).clear()
    _print_search(search(made.workspace, [BY_URL]), "my.toml", "w", is_forgotten=True)
    assert "--from" not in capsys.readouterr().out


def test_rows_are_found_in_the_row_groups_that_have_them(tmp_path: Path) -> None:
    path, numbers = tmp_path / "part.parquet", range(10)
    columns = {"uid": [f"u{n}" for n in numbers], "same_as": [None, *(f"u{n - 5}" for n in numbers[1:])]}
    pq.write_table(pa.table(columns | {"row": list(numbers)}), path, row_group_size=3)
    values = pa.array(["u4", "nobody"])
    rows = list(find_rows(path, ["uid", "same_as"], values, ["uid", "row"]))
    assert rows == [{"uid": "u4", "row": 4}, {"uid": "u9", "row": 9}]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"part\.parquet: damaged"):
        list(find_rows(path, ["uid"], values, ["uid"]))


def test_the_command_says_what_no_run_makes_anew(capsys: pytest.CaptureFixture[str]) -> None:
    work = Pending(removals=(("filter", "f"), ("index", "i"), ("search", "one")))
    _print_removals(work, "is removed")
    assert capsys.readouterr().out.splitlines() == [
        "filter            f  is removed: a run makes it anew",
        "index             i  is removed: a run makes it anew, without what was appended to it",
        "search            one  is removed: shows such a pair; `unclip search` makes it anew",
    ]


def test_the_command_counts_first_then_forgets_and_plan_names_the_networks(made: Made, tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.toml"
    recipe.write_text(tomli_w.dumps(without_none(to_dict(made.recipe))))
    (tmp_path / "names.txt").write_text(f"{BY_URL}\n\nhttp://nowhere/\n")
    _answers(made.workspace, "one", {"uid": made.uids[BY_URL]})
    words = ("forget", str(tmp_path / "names.txt"), "--recipe", str(recipe))
    assert names_of([str(tmp_path / "names.txt")]) == [BY_URL, "http://nowhere/"]
    answer = unclip_json(*words)
    assert (answer["forgotten"], answer["pairs"], answer["unknown"]) == (False, 1, ["http://nowhere/"])
    evaluation = {"step": "evaluate", "key": made.artifact("evaluate").key}
    assert answer["to_remove"] == [evaluation, {"step": "search", "key": "one"}]
    assert not (Path(made.workspace.root) / FORGOTTEN).exists()
    done = unclip_here(*words, "--delete")
    assert "search            one  is removed with --compact, or by the next run: shows such a pair" in done.stdout
    assert "1 pairs of 2 names: forgotten" in done.stdout
    assert f"unclip run '{recipe}' --from clip --force" in done.stdout
    assert "not in the workspace: http://nowhere/; it will not be taken" in done.stderr
    plan = unclip_here("plan", str(recipe)).stdout
    assert f"prior: was trained on 1 pairs that are forgotten; `unclip run '{recipe}' --from prior --force`" in plan
    assert f"or with: unclip forget --compact --workspace {shlex.quote(made.workspace.root)}\n" in plan
    rows = {row["step"]: row["forgotten_pairs"] for row in unclip_json("plan", str(recipe))}
    assert (rows["clip"], rows["embed"]) == (1, 0)
    assert unclip_here("forget", "--recipe", str(recipe)).returncode == 2
    assert unclip_here("forget", BY_URL).returncode == 2
