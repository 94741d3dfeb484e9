"""Keys and order."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.recipe.keys import recipe_key
from pipeline.recipe.plan import finished_artifacts, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Workspace
from tests.recipe.finished import commit_step
from tests.tiny.recipe import keys_of


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
        return keys_of(load_recipe(None, overrides))

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
    before, after = keys_of(load_recipe(None)), keys_of(load_recipe(None, [override]))
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_noise_that_an_upsampler_is_sampled_with_trains_nothing_again() -> None:
    trained = ["upsampler_1.model.noise_level_max=0.5"]
    before = keys_of(load_recipe(None, trained))
    after = keys_of(load_recipe(None, [*trained, "upsampler_1.model.noise_level=0.2"]))
    assert {name for name in before if before[name] != after[name]} == {"evaluate"}


def test_make_plan_trains_a_second_prior_where_the_recipe_has_one() -> None:
    before, after = keys_of(load_recipe(None)), keys_of(load_recipe(None, ["prior_2.model.kind=autoregressive"]))
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
    before, after = keys_of(load_recipe(None)), keys_of(load_recipe(None, ["seed=1"]))
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


def test_make_plan_pretrained_clip_does_not_wait_for_the_download() -> None:
    steps = {step.name: step for step in make_plan(load_recipe(None, ["clip.source=pretrained"]))}
    assert steps["clip"].inputs == {}


def test_finished_artifacts_are_those_that_the_recipe_has_and_all_finished(tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"workspace={tmp_path}"])
    steps = {step.name: step for step in make_plan(recipe)}
    commit_step(Workspace(str(tmp_path)), steps["pairs"])
    assert list(finished_artifacts(recipe, ("pairs", "upsampler_1"))) == ["pairs"]
    for names, first in (
        (("pairs", "embed"), "embed is not finished under this recipe; first: unclip run RECIPE --until embed"),
        (("prior", "clip"), "clip is not finished under this recipe; first: unclip run RECIPE --until prior"),
        (("prior", "decoder"), "decoder is not finished under this recipe; first: unclip run RECIPE"),
    ):
        with pytest.raises(ConfigError, match=f"^{first}$"):
            finished_artifacts(recipe, names)


@pytest.mark.parametrize("field", ["max_per_host=4", "min_success_prob=0.01"])
def test_what_spares_hosts_or_stops_a_download_changes_no_key(field: str) -> None:
    plain, other = (load_recipe("configs/demo.toml", changes) for changes in ([], [f"download.resources.{field}"]))
    assert plain.download != other.download
    assert keys_of(plain) == keys_of(other)
    assert recipe_key(plain) == recipe_key(other)


def test_filters_change_the_keys_of_the_steps_that_read_what_stays() -> None:
    overrides = ["upsampler_1.model.image_px=128", "upsampler_1.model.low_res_px=64"]
    plain = keys_of(load_recipe(None, overrides))
    cheap = keys_of(load_recipe(None, [*overrides, "filter.min_caption_words=3"]))
    assert set(cheap) - set(plain) == {"filter"}
    assert {name for name in plain if plain[name] == cheap[name]} == {"pairs", "download"}
    costly = keys_of(load_recipe(None, [*overrides, "filter_embeddings.min_clip_score=0.2"]))
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
    first = keys_of(load_recipe(None, overrides))["filter_embeddings"]
    head.write_bytes(b"two")
    assert keys_of(load_recipe(None, overrides))["filter_embeddings"] != first
