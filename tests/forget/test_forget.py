"""Pairs leave every file of a workspace, and do not come back."""

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w

from jobs.forget import _print_search  # pyright: ignore[reportPrivateUsage]
from pipeline.data.blank import blank_rows
from pipeline.data.download import download_shard
from pipeline.data.make_pairs import PairsMaker
from pipeline.data.rows import make_uid
from pipeline.data.selection import embeddings_of, selection_of
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.shards import ShardPictures, find_rows, split_counts
from pipeline.data.sources import source_of
from pipeline.data.training_rows import ShardReader, ShardTable
from pipeline.data.urls import AddressRules
from pipeline.errors import DataError, StepError
from pipeline.forget.forget import finish, forget
from pipeline.forget.search import Search, names_of, search
from pipeline.recipe.plan import artifact_of, inputs_of, make_plan, manifest_of, plan_status
from pipeline.recipe.recipe import Recipe, to_dict
from pipeline.recipe.sections import DownloadConfig
from pipeline.retrieve import NeighbourIndex
from pipeline.retrieve.batch import NEIGHBOUR
from pipeline.retrieve.build import SegmentBuild, build_index
from pipeline.retrieve.changes import publish_segment, segment_of_all
from pipeline.retrieve.takedown import Takedown
from pipeline.runtime.context import StepContext
from pipeline.runtime.filter import run_filter
from pipeline.runtime.filter_embeddings import run_filter_embeddings
from pipeline.runtime.step_task import forget_if_inputs_changed
from pipeline.workspace import folder
from pipeline.workspace.forgotten import FORGOTTEN, PENDING, Forgotten, Pending
from pipeline.workspace.lock import in_use, locked_workspace
from pipeline.workspace.manifest import content_of
from pipeline.workspace.store import INPUTS, Artifact, Workspace
from tests.data.hostile import HostileServer
from tests.filter.planted import embed_by_eye, make_context, planted_pairs, tiny_recipe, without_ray
from tests.tiny.command import unclip_here, unclip_json
from tests.tiny.pairs import write_parts
from tests.tiny.token_states import add_states

_BY_URL, _BY_UID = "http://a/clean-5", "http://a/clean-9"
"""Two pairs to forget; the first is copied by others, which the filter leaves out as its copies."""
_SECTIONS: dict[str, Any] = {
    "filter": {"min_caption_words": 2, "duplicates": "near", "num_examples": 3},
    "filter_embeddings": {"min_clip_score": 0.0},
    "index": {"kind": "flat", "num_recall_queries": 4},
    "pairs": {"validation_prob": 0.0},
    "tracking": {"uri": "off"},
}


@dataclasses.dataclass
class Made:
    """A workspace whose data steps are finished, by their own code; its networks have manifests alone."""

    recipe: Recipe
    pictures: dict[str, bytes]
    uids: dict[str, str]

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.recipe.workspace)

    def artifact(self, name: str) -> Artifact:
        return artifact_of(self.workspace, next(step for step in make_plan(self.recipe) if step.name == name))

    def inputs(self, name: str) -> dict[str, Artifact]:
        return inputs_of(self.workspace, next(step for step in make_plan(self.recipe) if step.name == name))

    def compact(self, key: str) -> None:
        build = segment_of_all(SegmentBuild((), self.workspace.artifact("index", key), self.recipe.index, 0))
        build.prepare()
        for part in build.parts():
            build.output.commit_shard(build.add_part(part))
        publish_segment(build, build.finish(), replaces=True)

    def finish(self) -> Pending | None:
        return finish(self.workspace, self.compact, _unlocked)


def _unlocked() -> None:
    """The check of a caller who is alone."""


def _commit(context: StepContext, counts: dict[str, int] | None = None) -> None:
    manifests = {name: artifact.manifest() for name, artifact in context.inputs.items()}
    contents = {name: content_of(manifest) for name, manifest in manifests.items() if manifest}
    manifest = manifest_of(context.step, context.output, counts)
    context.output.commit(dataclasses.replace(manifest, input_contents=contents, node_s=3600.0))


def _make(folder: Path) -> Made:
    recipe = tiny_recipe(folder, **_SECTIONS)
    planted = planted_pairs(num_clean=24)
    for name, sample in planted.pairs.items():
        planted.pairs[name] = dataclasses.replace(sample, columns=dict(sample.columns) | {"error_message": ""})
    made = Made(
        recipe,
        {sample.url: sample.picture or b"" for sample in planted.pairs.values()},
        {sample.url: make_uid(sample.url, sample.caption) for sample in planted.pairs.values()},
    )
    rows = {"uid": list(made.uids.values()), "url": list(made.uids)}
    rows |= {"caption": [sample.caption for sample in planted.pairs.values()], "split": ["train"] * len(made.uids)}
    for step in make_plan(recipe):
        context = make_context(folder, step.name, recipe)
        counts: dict[str, int] | None = None
        if step.name == "pairs":
            write_parts(Path(context.output.uri), [pa.table(rows)])
        elif step.name == "download":
            planted.write(context.output)
            for name, record in context.output.shard_records().items():
                files = {file: context.output.describe(file) for file in (f"{name}.tar", f"{name}.parquet")}
                context.output.write_json(f"{name}_stats.json", {"status_dict": {}, "start_time": 1.0})
                splits = split_counts(context.output.path(f"{name}.parquet"))
                context.output.commit_shard(dataclasses.replace(record, files=files, splits=splits))
        elif step.name == "filter":
            counts = run_filter(context).counts
        elif step.name == "embed":
            embed_by_eye(context)
            add_states(context.output)
        elif step.name == "filter_embeddings":
            counts = run_filter_embeddings(context).counts
        elif step.name == "index":
            build_index(embeddings_of(context.inputs), context.output, recipe.index, seed=0)
        elif step.name == "evaluate":
            nearest = {"uid": made.uids[_BY_URL], "similarity": 1.0}
            context.output.write_bytes("samples.jsonl", json.dumps({"nearest": nearest}).encode())
        _commit(context, counts)
    made.workspace.artifact("recipes", recipe.name).write_json("resolved.json", to_dict(recipe))
    return made


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return _make(tmp_path_factory.mktemp("made") / "w")


@pytest.fixture
def made(first: Made, tmp_path: Path) -> Made:
    """A copy of it."""
    return _copy(first, tmp_path / "w")


def _copy(one: Made, folder: Path) -> Made:
    shutil.copytree(one.workspace.root, folder)
    return dataclasses.replace(one, recipe=dataclasses.replace(one.recipe, workspace=str(folder)))


def _texts(workspace: Workspace) -> str:
    """Everything that stands in the files of a workspace, after the name of each."""
    texts: list[str] = []
    for path in sorted(Path(workspace.root).rglob("*")):
        texts.append(str(path))
        if path.suffix == ".parquet":
            texts.append(repr(pq.read_table(path).to_pylist()))
        elif path.suffix == ".arrow":
            texts.append(repr(pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()))
        elif path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(texts)


def _forget(made: Made, *names: str) -> Search:
    result = search(made.workspace, names)
    forget(made.workspace, result, _unlocked)
    return result


def _uids(table: ShardTable) -> list[str]:
    return table.take("uid", np.arange(len(table))).to_pylist()


def test_a_search_counts_rows_and_names_the_networks_and_changes_nothing(made: Made) -> None:
    before = _texts(made.workspace)
    result = search(made.workspace, [_BY_URL, made.uids[_BY_UID], "http://nowhere/"])
    assert result.unknown == ("http://nowhere/",)
    assert result.uids == {made.uids[_BY_URL], made.uids[_BY_UID]}
    assert result.rows == {"pairs": 2, "download": 2, "filter": 2, "embed": 2, "filter_embeddings": 2, "index": 2}
    trained = {network.step: network.pairs for network in result.networks}
    assert trained == dict.fromkeys(("clip", "decoder", "prior", "upsampler_1", "upsampler_2"), 2)
    assert {step for step, _ in result.dirty} == {*trained, "embed", "filter_embeddings", "index", "evaluate"}
    assert result.node_s == 9 * 3600.0
    assert result.roots == (("clip", made.artifact("clip").key),)
    assert _texts(made.workspace) == before


def test_forgotten_pairs_are_in_no_file_and_everything_else_is(made: Made) -> None:
    urls = {_BY_URL, _BY_UID}
    contents = _texts(made.workspace)
    assert all(made.uids[url] in contents and f"{url}'" in contents for url in urls)
    _forget(made, _BY_URL, made.uids[_BY_UID])
    opened = NeighbourIndex.open(made.artifact("index"))
    assert opened.num_rows == 26  # at once
    made.finish()
    contents = _texts(made.workspace)
    for url in urls:
        assert made.uids[url] not in contents
        assert f"{url}'" not in contents
        assert f"{url}\n" not in contents
    assert made.pictures[_BY_UID].decode("latin-1") not in contents  # another URL has a copy of the first one's file
    for url in made.uids.keys() - urls:
        assert made.uids[url] in contents
        assert made.pictures[url].decode("latin-1") in contents
    assert not made.artifact("evaluate").names()
    assert made.workspace.artifact("", "").uri.rstrip("/") == made.workspace.root
    assert not (Path(made.workspace.root) / PENDING).exists()


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
    row, other = rows[_BY_UID], rows["http://a/clean-11"]
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
    _forget(made, row["uid"])
    made.finish()
    contents = _texts(workspace)
    assert row["uid"] not in contents
    assert row["caption"] not in contents.replace(other["caption"], "")
    assert (workspace.keys("ablate"), workspace.keys("search")) == (["other"], ["other"])
    assert searches[1].names() == ["00000.parquet"]
    assert [name for name in decoder.names() if name.startswith("live/")] == ["live/validation/00000002.json"]


def test_a_search_that_alone_has_a_pair_goes(made: Made) -> None:
    _answers(made.workspace, "one", {"uid": "gone", "url": "http://gone/"})
    _answers(made.workspace, "two", {"uid": "gone, too", "url": "http://gone/"})
    _forget(made, "http://gone/")
    made.finish()
    assert made.workspace.keys("search") == []


def test_what_is_left_is_whole(made: Made) -> None:
    _forget(made, _BY_URL, made.uids[_BY_UID])
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
    _forget(made, _BY_URL)
    (tmp_path / "list.csv").write_text(f"url,caption\n{_BY_URL},again\nhttp://a/new,new one\n")
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
    uid = made.uids[_BY_URL]
    Takedown().add([uid, "http://other/"]).write(made.workspace.root)
    _forget(made, _BY_URL)
    takedown = Takedown.read(made.workspace.root)
    assert takedown.names == ("http://other/",)
    rows = pa.table({"uid": [uid, "x", "y"], "url": ["z", _BY_URL, "http://other/"]})
    assert takedown.has(rows).tolist() == [True, True, True]
    assert Takedown(takedown.names).has(rows).tolist() == [False, False, True]


def test_the_record_has_when_and_how_many_and_no_name(made: Made) -> None:
    start = time.time()
    _forget(made, _BY_URL)
    _forget(made, _BY_URL)  # as after a kill: it counts once
    text = (Path(made.workspace.root) / FORGOTTEN).read_text()
    assert made.uids[_BY_URL] not in text
    assert "http" not in text
    [entry] = Forgotten.read(made.workspace.root).entries
    assert start <= entry.at <= time.time()
    assert entry.rows["download"] == 1


def test_a_kill_between_a_table_and_its_tar_leaves_no_picture(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    _forget(made, made.uids[_BY_UID])
    publish = folder._publish  # pyright: ignore[reportPrivateUsage]

    def stop_at_tar(temporary: Path, target: Path) -> None:
        if target.suffix == ".tar":
            raise StepError("killed")
        publish(temporary, target)

    monkeypatch.setattr(folder, "_publish", stop_at_tar)
    with pytest.raises(StepError, match="killed"):
        made.finish()
    monkeypatch.setattr(folder, "_publish", publish)
    assert made.pictures[_BY_UID].decode("latin-1") in _texts(made.workspace)
    made.finish()
    assert made.pictures[_BY_UID].decode("latin-1") not in _texts(made.workspace)


def test_what_was_removed_before_it_was_rewritten_stops_nothing(made: Made) -> None:
    unfinished = made.workspace.artifact("index", "unfinished")
    unfinished.write_bytes("live/segment_00000/rows", made.uids[_BY_URL].encode())
    _forget(made, _BY_URL)
    for name in ("pairs", "embed", "filter_embeddings", "index"):
        made.artifact(name).destroy()
    made.artifact("filter").remove("manifest.json")  # a removal that was killed
    assert made.finish() is not None
    assert Pending.read(made.workspace.root) is None
    assert (made.artifact("filter").names(), unfinished.names()) == ([], [])
    assert made.uids[_BY_URL] not in _texts(made.workspace)


def test_networks_that_are_not_made_from_each_other_are_each_named(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.artifact("clip").destroy()  # as with a CLIP of others
    prior = made.artifact("prior")
    manifest = prior.manifest()
    assert manifest is not None
    prior.clear()
    prior.write_json(INPUTS, manifest.input_contents)
    result = search(made.workspace, [_BY_URL])
    assert {step for step, _ in result.roots} == {"decoder", "upsampler_1", "upsampler_2"}
    _print_search(result, "my.toml", is_forgotten=True)
    text = capsys.readouterr().out
    assert f"{prior.key}  is being trained on 1 of these pairs" in text
    assert "unclip run my.toml --from decoder --force; and unclip run my.toml --from upsampler_1 --force; and" in text
    for step in ("decoder", "upsampler_1", "upsampler_2"):
        made.artifact(step).clear()
    _print_search(search(made.workspace, [_BY_URL]), "my.toml", is_forgotten=True)
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


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_anywhere_it_is_done_again_with_the_same_bytes(
    first: Made, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int
) -> None:
    other = _copy(made, tmp_path / "calm")
    names = [_BY_URL, made.uids[_BY_UID]]
    monkeypatch.setattr("pipeline.workspace.forgotten.secrets.token_hex", lambda _: "salt")

    def work(one: Made) -> None:
        if Pending.read(one.workspace.root) is None:
            _forget(one, *names)
        one.finish()

    start = time.monotonic()
    work(other)
    took_s, rng, num_killed = time.monotonic() - start, random.Random(0), 0
    while num_killed < num_kills:
        process = os.fork()
        if not process:
            try:
                work(made)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, took_s))
        os.kill(process, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:  # it was done before: from the beginning
            shutil.rmtree(made.workspace.root)
            made = _copy(first, Path(made.workspace.root))
            continue
        num_killed += 1
        pending = Pending.read(made.workspace.root)
        if pending is not None and pending.has_begun and pending.indexes:
            with pytest.raises(StepError, match="finish with: unclip forget --compact"):
                NeighbourIndex.open(made.artifact("index"))
    for name in made.inputs("evaluate"):
        made.artifact(name).clear_temporaries()
    work(made)
    for name in ("pairs", "download", "filter", "embed", "filter_embeddings"):
        assert _files(made, name) == _files(other, name)
    assert NeighbourIndex.open(made.artifact("index")).num_rows == 26


def _files(made: Made, step: str) -> dict[str, object]:
    artifact = made.artifact(step)
    names = [name for name in artifact.names() if not name.endswith(("_stats.json", "done.json", "manifest.json"))]
    return {name: artifact.describe(name) for name in names}


def test_a_second_user_waits_and_both_are_forgotten(made: Made, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(_without_none(to_dict(made.recipe))))
    with locked_workspace(made.workspace, print):
        done = unclip_here("forget", _BY_URL, "--recipe", str(recipe), "--delete")
    assert (done.returncode, done.stdout) == (4, "")
    assert "another run is using this workspace" in done.stderr
    assert not (Path(made.workspace.root) / FORGOTTEN).exists()
    for name in (_BY_URL, made.uids[_BY_UID]):
        assert unclip_here("forget", name, "--recipe", str(recipe), "--delete").returncode == 0
    assert len(Forgotten.read(made.workspace.root).entries) == 2
    made.finish()
    contents = _texts(made.workspace)
    assert made.uids[_BY_URL] not in contents
    assert made.uids[_BY_UID] not in contents


def _without_none(tables: Any) -> Any:
    if isinstance(tables, dict):
        return {name: _without_none(value) for name, value in tables.items() if value is not None}
    return tables


def test_what_is_read_is_not_rewritten(made: Made) -> None:
    _forget(made, _BY_URL)
    with in_use(made.workspace, [f"index/{made.artifact('index').key}"]), pytest.raises(StepError, match="in use by"):
        made.finish()
    assert made.uids[_BY_URL] in _texts(made.workspace)
    assert made.finish() is not None


def test_a_training_under_way_goes_on_and_says_so_when_it_is_done(made: Made) -> None:
    [step] = [step for step in make_plan(made.recipe) if step.name == "prior"]
    context = make_context(Path(made.recipe.workspace), "prior", made.recipe)
    output = context.output
    output.clear()
    forget_if_inputs_changed(context)
    output.write_bytes("live/checkpoint", b"weights")
    _forget(made, _BY_URL)
    made.finish()
    forget_if_inputs_changed(context)
    assert output.exists("live/checkpoint")
    output.commit(dataclasses.replace(manifest_of(step, output), input_contents=output.read_json(INPUTS)))
    manifest = output.manifest()
    assert manifest is not None
    assert Forgotten.read(made.workspace.root).trained_on(manifest) == 1
    _commit(context)  # made anew
    manifest = output.manifest()
    assert manifest is not None
    assert Forgotten.read(made.workspace.root).trained_on(manifest) == 0


def test_the_command_counts_first_then_forgets_and_plan_names_the_networks(made: Made, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(tomli_w.dumps(_without_none(to_dict(made.recipe))))
    (tmp_path / "names.txt").write_text(f"{_BY_URL}\n\nhttp://nowhere/\n")
    words = ("forget", str(tmp_path / "names.txt"), "--recipe", str(recipe))
    assert names_of([str(tmp_path / "names.txt")]) == [_BY_URL, "http://nowhere/"]
    answer = unclip_json(*words)
    assert (answer["forgotten"], answer["pairs"], answer["unknown"]) == (False, 1, ["http://nowhere/"])
    assert not (Path(made.workspace.root) / FORGOTTEN).exists()
    done = unclip_here(*words, "--delete")
    assert "1 pairs of 2 names: forgotten" in done.stdout
    assert f"unclip run {recipe} --from clip --force" in done.stdout
    assert "not in the workspace: http://nowhere/; it will not be taken" in done.stderr
    plan = unclip_here("plan", str(recipe)).stdout
    assert "prior: was trained on 1 pairs that are forgotten" in plan
    assert "unclip forget --compact" in plan
    rows = {row["step"]: row["forgotten_pairs"] for row in unclip_json("plan", str(recipe))}
    assert (rows["clip"], rows["embed"]) == (1, 0)
    assert unclip_here("forget", "--recipe", str(recipe)).returncode == 2
    assert unclip_here("forget", _BY_URL).returncode == 2
