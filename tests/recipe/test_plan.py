"""Keys, order, reasons."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import ConfigError
from pipeline.recipe.plan import (
    Step,
    artifact_of,
    finished_artifacts,
    make_plan,
    manifest_of,
    passing_inputs,
    plan_status,
    recipe_key,
)
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.train.checkpoint import Snapshot
from pipeline.workspace.manifest import Manifest, content_of
from pipeline.workspace.store import MANIFEST, Artifact, Workspace
from tests.recipe.finished import commit_index


def _commit(workspace: Workspace, step: Step) -> None:
    artifact = artifact_of(workspace, step)
    artifact.commit(manifest_of(step, artifact))


def _keys(recipe: Recipe) -> dict[str, str]:
    return {step.name: step.key for step in make_plan(recipe)}


def test_make_plan_puts_every_step_after_its_inputs() -> None:
    names: set[str] = set()
    for step in make_plan(load_recipe("configs/demo.toml")):
        assert set(step.inputs) <= names
        names.add(step.name)
    assert {"pairs", "upsampler_2", "evaluate"} <= names


def test_fields_that_came_later_are_in_the_keys_of_those_alone_that_set_them() -> None:
    def fields(*overrides: str) -> set[str]:
        plan = make_plan(load_recipe(None, overrides))
        diffusion = next(step.section["model"]["diffusion"] for step in plan if step.name == "decoder")
        return {"loss", "timestep_draws", "schedule"} & diffusion.keys()

    def keys(*overrides: str) -> dict[str, str]:
        return _keys(load_recipe(None, overrides))

    assert keys() == keys("prior.train.clip_precision=float32")
    changed = keys("prior.train.clip_precision=bfloat16")
    assert {name for name, key in keys().items() if changed[name] != key} == {"prior", "evaluate"}
    with pytest.raises(ConfigError, match=r"with embed\.token_states a prior runs no frozen CLIP"):
        keys("prior.train.clip_precision=bfloat16", "embed.token_states=true")
    with pytest.raises(ConfigError, match=r"upsampler_1\.train\.clip_precision: this training reads no frozen CLIP"):
        load_recipe(None, ["upsampler_1.train.clip_precision=bfloat16"])
    assert fields() == fields("decoder.model.diffusion.loss=simple") == {"schedule"}
    assert fields("decoder.model.diffusion.loss=vlb") == {"loss", "schedule"}


def test_a_recipe_has_one_key_wherever_it_runs_and_another_for_other_pictures() -> None:
    def key(*overrides: str) -> str:
        return recipe_key(load_recipe("configs/demo.toml", overrides))

    places = ("workspace=/elsewhere", "name=other", "serve.port=9", "decoder.resources.num_workers=[1, 1]")
    assert {key(place) for place in places} == {key()}
    changes = (
        "seed=9",
        "decoder.model.sampler.guidance_scale=9.0",
        "prior.train.num_steps=999",
        "pairs.drawn.num_pairs=9",
    )
    assert len({key(), *map(key, changes)}) == 5


def test_initial_weights_count_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    def key(folder: str) -> str:
        return _keys(load_recipe("configs/demo-hour.toml", [f"decoder.init_from={tmp_path / folder}"]))["decoder"]

    for folder, content in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text(content)
    assert key("one") == key("same") != key("other")
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        key("nowhere")


def test_a_checkpoint_that_will_be_removed_is_said_and_its_copy_continues_the_same_training(tmp_path: Path) -> None:
    def recipe(file: Path | str) -> Recipe:
        return load_recipe("configs/demo-hour.toml", [f"decoder.init_from={file}", f"workspace={tmp_path}/workspace"])

    checkpoint, copy = tmp_path / "live/checkpoints/00000004.safetensors", tmp_path / "kept.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("a")
    (note,) = passing_inputs(recipe(checkpoint))
    assert note.startswith(f"decoder: init_from {checkpoint} is removed when its training is beyond it")
    key = _keys(recipe(checkpoint))["decoder"]
    copy.write_text("a")
    checkpoint.unlink()
    with pytest.raises(
        ConfigError, match=r"decoder: .*00000004\.safetensors does not exist; .* name a copy \(the same"
    ):
        make_plan(recipe(checkpoint))
    assert _keys(recipe(copy))["decoder"] == key
    assert not passing_inputs(recipe(copy))
    assert not passing_inputs(recipe(""))
    with pytest.raises(ConfigError, match=r"nowhere does not exist; relative paths .* unclip$"):
        make_plan(recipe("nowhere"))


def test_a_copy_of_a_part_of_a_divided_checkpoint_is_refused_until_its_training_has_begun(tmp_path: Path) -> None:
    def recipe(folder: Path) -> Recipe:
        path = folder / "00000004.safetensors"
        return load_recipe("configs/demo-hour.toml", [f"decoder.init_from={path}", f"workspace={tmp_path}/workspace"])

    original, copy = tmp_path / "live/checkpoints", tmp_path / "copy"
    for number in (2, 1, 0):
        part = Snapshot(4, {}, {"ema.a": torch.ones(1)}, {"ema.a": [3]}, number, 3)
        part.publish(Artifact(str(original)), "00000004.safetensors", "key", "attempt")
    assert _keys(recipe(original))["decoder"]
    (note,) = passing_inputs(recipe(original))
    assert ": copy its 3 files (00000004.*) under their names elsewhere and name the copy" in note
    copy.mkdir()
    for name in ("00000004.safetensors", "00000004.2-of-3.safetensors"):
        shutil.copy(original / name, copy)
    with pytest.raises(
        ConfigError, match=r"decoder: .* is the first of 3 files .* 00000004\.3-of-3\.safetensors is not"
    ):
        make_plan(recipe(copy))
    shutil.copy(original / "00000004.3-of-3.safetensors", copy)
    key = _keys(recipe(copy))["decoder"]
    (copy / "00000004.2-of-3.safetensors").unlink()
    output = Workspace(f"{tmp_path}/workspace").artifact("decoder", key)
    output.write_bytes("live/progress.json", b"{}")  # it has waited for machines, and not begun
    with pytest.raises(ConfigError, match=r"00000004\.2-of-3\.safetensors is not beside it: copy all of 00000004\.\*"):
        make_plan(recipe(copy))
    output.write_bytes("live/checkpoints/00000002.safetensors", b"")
    assert _keys(recipe(copy))["decoder"] == key


def test_plan_says_which_checkpoint_will_be_removed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "live/checkpoints/00000004.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("a")
    words = ["--set", f"decoder.init_from={checkpoint}", "--set", f"workspace={tmp_path}/workspace"]
    assert (
        "copy it elsewhere and name the copy"
        in CliRunner().invoke(app, ["plan", "configs/demo-hour.toml", *words]).stdout
    )


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("prior.train.num_steps=7", {"prior", "evaluate"}),
        ("prior.model.kind=autoregressive", {"prior", "evaluate"}),
        ("evaluate.num_shown=3", {"evaluate"}),
        ("index.kind=hnsw", {"index", "evaluate"}),
        ("embed.batch_size=3", {"embed", "index", "prior", "decoder", "evaluate"}),
        ("prior.model.depth=3", {"prior", "evaluate"}),
        ("decoder.model.sampler.num_steps=7", {"evaluate"}),
        ("prior.model.num_candidates=3", {"evaluate"}),
        ("decoder.model.diffusion.loss=vlb", {"decoder", "evaluate"}),
        ("prior.model.diffusion.timestep_draws=loss_aware", {"prior", "evaluate"}),
        ("prior.model.sampler.method=analytic", {"prior", "evaluate"}),  # its variance is measured in training
        ("prior.resources.num_workers=2", set()),
        ("serve.port=1", set()),
        ("name=other", set()),
    ],
)
def test_make_plan_changed_field_changes_only_what_depends_on_it(override: str, changed: set[str]) -> None:
    before, after = _keys(load_recipe(None)), _keys(load_recipe(None, [override]))
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_noise_that_an_upsampler_is_sampled_with_trains_nothing_again() -> None:
    trained = ["upsampler_1.model.noise_level_max=0.5"]
    before = _keys(load_recipe(None, trained))
    after = _keys(load_recipe(None, [*trained, "upsampler_1.model.noise_level=0.2"]))
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}


def test_make_plan_trains_a_second_prior_where_the_recipe_has_one() -> None:
    before, after = _keys(load_recipe(None)), _keys(load_recipe(None, ["prior_2.model.kind=autoregressive"]))
    assert set(after) - set(before) == {"prior_2"}
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}
    assert [step.name for step in make_plan(load_recipe(None, ["prior_2.train.num_steps=3"]), until="prior_2")] == [
        "pairs",
        "download",
        "clip",
        "embed",
        "prior_2",
    ]


def test_make_plan_seed_changes_everything_downstream() -> None:
    before, after = _keys(load_recipe(None)), _keys(load_recipe(None, ["seed=1"]))
    assert all(before[name] != after[name] for name in before)


def test_make_plan_until_keeps_only_what_is_needed() -> None:
    assert [step.name for step in make_plan(load_recipe(None), until="index")] == [
        "pairs",
        "download",
        "clip",
        "embed",
        "index",
    ]
    with pytest.raises(ConfigError, match="upsampler_1"):
        make_plan(load_recipe(None), until="upsampler_1")


def test_make_plan_content_of_the_list_is_part_of_the_key(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    recipe = load_recipe(None, ["pairs.source=list", f"pairs.path={pairs}"])
    with pytest.raises(ConfigError, match="does not exist"):
        make_plan(recipe)
    pairs.write_text("url,caption\nu,c\n")
    first = _keys(recipe)
    pairs.write_text("url,caption\nu,d\n")
    changed = _keys(recipe)["pairs"]
    assert changed != first["pairs"]
    moved = pairs.rename(tmp_path / "moved.csv")
    assert _keys(load_recipe(None, ["pairs.source=list", f"pairs.path={moved}"]))["pairs"] == changed


def test_a_changed_sidecar_and_a_named_column_are_part_of_the_key_of_pairs(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"picture")
    (tmp_path / "1.txt").write_text("a red cat")
    overrides = ["pairs.source=folder", f"pairs.path={tmp_path}"]
    before = _keys(load_recipe(None, overrides))["pairs"]
    (tmp_path / "1.txt").write_text("a red dog")
    changed = _keys(load_recipe(None, overrides))["pairs"]
    assert changed != before
    wider = _keys(load_recipe(None, [*overrides, "download.extra_columns=['punsafe']"]))
    assert wider["pairs"] != changed  # the list has to be read again for its column
    (tmp_path / "1.txt").write_text("a red cat")
    assert _keys(load_recipe(None, overrides))["pairs"] == before


def test_make_plan_pretrained_clip_does_not_wait_for_the_download() -> None:
    steps = {step.name: step for step in make_plan(load_recipe(None, ["clip.source=pretrained"]))}
    assert steps["clip"].inputs == {}


def test_a_local_clip_counts_by_its_content(tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return _keys(load_recipe(None, ["clip.source=pretrained", *overrides]))["clip"]

    for folder, content in (("one", "a"), ("same", "a"), ("other", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "open_clip_config.json").write_text("{}")
        (tmp_path / folder / "open_clip_model.safetensors").write_text(content)
        (tmp_path / folder / "manifest.json").write_text(folder)
    one, same, other = (key(f"clip.name={tmp_path / folder}") for folder in ("one", "same", "other"))
    assert one == same != other
    checkpoint = tmp_path / "weights.pt"
    checkpoint.write_text("a")
    before = key(f"clip.tag={checkpoint}")
    checkpoint.write_text("b")
    assert key(f"clip.tag={checkpoint}") != before
    assert key("clip.name=hf-hub:owner/one") != key("clip.name=hf-hub:owner/two")
    with pytest.raises(ConfigError, match="clip: no/folder does not exist"):
        key("clip.name=no/folder")


def test_plan_status_names_the_field_and_the_input_that_changed(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    for step in make_plan(load_recipe(None)):
        _commit(workspace, step)
    assert {status.state for status in plan_status(workspace, make_plan(load_recipe(None)))} == {"done"}
    changed = make_plan(load_recipe(None, ["prior.train.num_steps=7"]))
    statuses = {status.step.name: status for status in plan_status(workspace, changed)}
    assert statuses["prior"].reasons == ("prior.train.num_steps: 1000 -> 7",)
    assert statuses["evaluate"].reasons == ("prior changed",)
    assert statuses["decoder"].state == "done"
    later = make_plan(load_recipe(None, ["decoder.model.text_adapter.depth=2", "clip.model.hard_negatives=true"]))
    statuses = {status.step.name: status for status in plan_status(workspace, later)}
    assert statuses["decoder"].reasons == ("clip changed", "embed changed", "decoder.model.text_adapter.depth: 0 -> 2")
    assert statuses["clip"].reasons == ("clip.model.hard_negatives: False -> True",)


def test_plan_status_sees_that_an_input_was_made_anew_with_other_bytes(tmp_path: Path) -> None:
    workspace, steps = Workspace(str(tmp_path)), make_plan(load_recipe(None), until="download")
    pairs, download = (artifact_of(workspace, step) for step in steps)

    def make_pairs(data: bytes, time_of_run: bytes) -> Manifest:
        pairs.write_bytes("00000.parquet", data)
        pairs.write_bytes("00000_stats.json", time_of_run)
        pairs.commit(manifest_of(steps[0], pairs))
        return pairs.manifest() or manifest_of(steps[0], pairs)

    content = content_of(make_pairs(b"one", b"1"))
    download.commit(replace(manifest_of(steps[1], download), input_contents={"pairs": content}))
    for data, states in ((b"one", ["done", "done"]), (b"two", ["done", "todo"]), (b"one", ["done", "done"])):
        make_pairs(data, b"later")
        assert [status.state for status in plan_status(workspace, steps)] == states
    make_pairs(b"two", b"3")
    assert plan_status(workspace, steps)[1].reasons == ("pairs was made anew, with other content",)
    clip, embed = (step for step in make_plan(load_recipe(None), until="embed") if step.name in {"clip", "embed"})
    for step, made_of in ((clip, download), (embed, download)):
        manifest = made_of.manifest()
        assert manifest is not None
        later = artifact_of(workspace, step)
        later.commit(replace(manifest_of(step, later), input_contents={"download": content_of(manifest)}))
    statuses = plan_status(workspace, [*steps, clip, embed])
    assert [status.state for status in statuses] == ["done", "todo", "done", "done"]
    assert statuses[2].reasons == ("runs again if download, which is out of date, comes out different",)
    assert statuses[3].reasons[-1] == "runs again if clip, which is out of date, comes out different"
    pairs.clear()
    assert [status.state for status in plan_status(workspace, steps)] == ["todo", "done"]  # nothing to compare with


def test_plan_status_says_what_is_to_be_done_about_appended_embeddings(tmp_path: Path) -> None:
    words = ["configs/demo.toml", "--set", f"workspace={tmp_path}"]
    workspace, steps = Workspace(str(tmp_path)), make_plan(load_recipe(words[0], words[2:]), until="index")
    for step in steps:
        _commit(workspace, step)
    index, embed = (artifact_of(workspace, step) for step in (steps[-1], steps[-2]))
    manifest, base = index.manifest(), embed.manifest()
    more = workspace.artifact("embed", "more")
    assert manifest is not None
    assert base is not None

    def make_more(data: bytes) -> str:
        more.clear()
        more.write_bytes("00000.parquet", data)
        more.commit(replace(base, files=more.describe_files()))
        return content_of(replace(base, files=more.describe_files()))

    own = f"embed/{embed.key}"
    commit_index(index, [own], [own, "embed/more"], contents={own: content_of(base), "embed/more": make_more(b"one")})
    index.write_json(MANIFEST, replace(manifest, input_contents={"embed": content_of(base)}).to_dict())

    def status() -> tuple[str, tuple[str, ...]]:
        status = plan_status(workspace, steps)[-1]
        return status.state, status.reasons

    assert status() == ("done", ())
    make_more(b"two")
    assert status() == ("done", (f"{more.uri} was made anew since it was appended: unclip compact RECIPE",))
    assert (
        f"since it was appended: unclip compact {' '.join(words)}" in CliRunner().invoke(app, ["plan", *words]).stdout
    )
    more.clear()
    is_away = f"{more.uri}, which was appended, is not finished or is gone: run its recipe first"
    assert status() == ("done", (is_away,))
    embed.write_bytes("00000.parquet", b"other")
    embed.write_json(MANIFEST, replace(base, files=embed.describe_files()).to_dict())
    come_back = f"bring them back afterwards: unclip append RECIPE {more.uri}"
    anew = "embed was made anew, with other content"
    assert status() == ("todo", (anew, f"without the rows that were appended; {come_back}"))
    index.remove("segment_00001/segment.json")
    assert status()[1][1].startswith(f"{index.uri}: no file segment_00001/segment.json")


def test_plan_status_shows_a_manifest_that_cannot_be_read_and_goes_on(tmp_path: Path) -> None:
    workspace, steps = Workspace(str(tmp_path)), make_plan(load_recipe(None))
    for step in steps:
        _commit(workspace, step)
    damaged = artifact_of(workspace, steps[1])
    damaged.write_bytes("manifest.json", b"")
    statuses = plan_status(workspace, steps)
    assert [status.state for status in statuses] == ["done", "unreadable", *["done"] * (len(steps) - 2)]
    assert f"{damaged.uri}/manifest.json: not valid JSON" in statuses[1].reasons[0]
    other = plan_status(workspace, make_plan(load_recipe(None, ["download.retries=7"])))
    assert other[1].state == "todo"
    assert other[1].reasons[0] == "never run"
    assert f"{damaged.uri}/manifest.json: not valid JSON" in other[1].reasons[1]


def test_finished_artifacts_are_those_that_the_recipe_has_and_all_finished(tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"workspace={tmp_path}"])
    steps = {step.name: step for step in make_plan(recipe)}
    _commit(Workspace(str(tmp_path)), steps["pairs"])
    assert list(finished_artifacts(recipe, ("pairs", "upsampler_1"))) == ["pairs"]
    for names, first in (
        (("pairs", "embed"), "embed is not finished under this recipe; first: unclip run RECIPE --until embed"),
        (("prior", "clip"), "clip is not finished under this recipe; first: unclip run RECIPE --until prior"),
        (("prior", "decoder"), "decoder is not finished under this recipe; first: unclip run RECIPE"),
    ):
        with pytest.raises(ConfigError, match=f"^{first}$"):
            finished_artifacts(recipe, names)


def test_plan_status_tells_todo_from_partial(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    steps = make_plan(load_recipe(None))
    artifact_of(workspace, steps[1]).write_json("live/progress.json", {})
    states = [status.state for status in plan_status(workspace, steps)]
    assert states[:3] == ["todo", "partial", "todo"]
    assert plan_status(workspace, steps)[0].reasons == ("never run",)


@pytest.mark.parametrize("field", ["max_per_host=4", "min_success_prob=0.01"])
def test_what_spares_hosts_or_stops_a_download_changes_no_key(field: str) -> None:
    plain, other = (load_recipe("configs/demo.toml", changes) for changes in ([], [f"download.resources.{field}"]))
    assert plain.download != other.download
    assert _keys(plain) == _keys(other)
    assert recipe_key(plain) == recipe_key(other)


def test_filters_change_the_keys_of_the_steps_that_read_what_stays() -> None:
    overrides = ["upsampler_1.model.image_px=128", "upsampler_1.model.low_res_px=64"]
    plain = _keys(load_recipe(None, overrides))
    cheap = _keys(load_recipe(None, [*overrides, "filter.min_caption_words=3"]))
    assert set(cheap) - set(plain) == {"filter"}
    assert {name for name in plain if plain[name] == cheap[name]} == {"pairs", "download"}
    costly = _keys(load_recipe(None, [*overrides, "filter_embeddings.min_clip_score=0.2"]))
    assert set(costly) - set(plain) == {"filter_embeddings"}
    assert {name for name in plain if plain[name] == costly[name]} == {"pairs", "download", "clip", "embed"}


@pytest.mark.parametrize(
    ("idle", "needs"),
    [
        ("filter.min_language_prob=0.2", "filter.languages=['en']"),
        ("filter.max_hash_distance=3", "filter.duplicates='near'"),
        ("filter.same_caption_only=true", "filter.duplicates='exact'"),
        ("filter_embeddings.same_caption_only=true", "filter_embeddings.max_similarity=0.9"),
    ],
)
def test_a_field_of_a_filter_that_does_nothing_is_refused(idle: str, needs: str) -> None:
    names = [override.partition("=")[0].partition(".")[2] for override in (idle, needs)]
    with pytest.raises(ConfigError, match=" needs ".join(names)):
        load_recipe(None, [idle])
    load_recipe(None, [idle, needs])


def test_a_limit_of_a_head_needs_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_aesthetic needs aesthetic_weights"):
        load_recipe(None, ["filter_embeddings.min_aesthetic=5.0"])
    head = tmp_path / "head.pth"
    head.write_bytes(b"one")
    overrides = ["filter_embeddings.min_aesthetic=5.0", f"filter_embeddings.aesthetic_weights={head}"]
    first = _keys(load_recipe(None, overrides))["filter_embeddings"]
    head.write_bytes(b"two")
    assert _keys(load_recipe(None, overrides))["filter_embeddings"] != first
