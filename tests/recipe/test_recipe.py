"""The recipe: layers, strictness, messages."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.diffusion import config as configs
from models.diffusion.schedules import fast27_timesteps, sampling_timesteps
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe, default_tables, json_schema, load_recipe, parse_recipe
from pipeline.recipe.tables import to_dict, without_resources


def test_load_recipe_layers_defaults_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("seed = 3\n[prior.train]\nnum_steps = 10\nbatch_size = 8\n")
    recipe = load_recipe(file, ["prior.train.num_steps=20", "name=mine", 'workspace="w"'])
    assert (recipe.seed, recipe.prior.train.num_steps, recipe.prior.train.batch_size) == (3, 20, 8)
    assert (recipe.name, recipe.workspace) == ("mine", "w")
    assert recipe.decoder == Recipe().decoder


def test_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes("\ufeffseed = 3\n".encode())
    assert load_recipe(file).seed == 3


def test_recipe_that_extends_another_names_only_what_it_changes(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('name = "base"\nseed = 3\n[prior.train]\nnum_steps = 10\nbatch_size = 8\n')
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "longer.toml").write_text('extends = "../base.toml"\n[prior.train]\nnum_steps = 99\n')
    last = tmp_path / "more" / "last.toml"
    last.write_text('extends = "longer.toml"\nname = "last"\n')
    recipe = load_recipe(last, ["prior.train.batch_size=4"])
    assert (recipe.name, recipe.seed) == ("last", 3)
    assert (recipe.prior.train.num_steps, recipe.prior.train.batch_size) == (99, 4)
    flat = load_recipe(None, ["name=last", "seed=3", "prior.train.num_steps=99", "prior.train.batch_size=4"])
    assert recipe == flat  # a recipe's keys do not depend on how its file is written


def test_a_table_of_the_other_recipe_is_left_out_where_it_is_false(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[filter]\nmin_image_px = 8\n[upsampler_1.model]\nimage_px = 128\n")
    (tmp_path / "r.toml").write_text('extends = "base.toml"\nfilter = false\n')
    assert load_recipe(tmp_path / "base.toml").filter is not None
    assert load_recipe(tmp_path / "r.toml", ["upsampler_1=false"]) == Recipe()
    with pytest.raises(ConfigError, match=r"prior: .*, got False"):
        load_recipe(None, ["prior=false"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "gone.toml"\n', r"gone\.toml: no such recipe"),
        ("extends = 3\n", r"r\.toml: extends = 3: name one recipe"),
        ('extends = "r.toml"\n', r"r\.toml: extends itself, by way of .*r\.toml"),
        ('extends = "bad.toml"\n', r"bad\.toml: not a valid recipe"),
    ],
)
def test_recipe_that_extends_what_it_cannot_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    (tmp_path / "bad.toml").write_text("a = \n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_parse_recipe_table_that_names_one_key_keeps_its_parents_choices() -> None:
    recipe = parse_recipe({"prior": {"model": {"diffusion": {"num_timesteps": 100}}}, "embed": {"resources": {}}})
    assert recipe.prior.model.diffusion.prediction == Recipe().prior.model.diffusion.prediction == "x0"
    assert recipe.prior.model.diffusion.num_timesteps == 100
    assert recipe.embed == Recipe().embed


def test_parse_recipe_kind_of_the_prior_chooses_its_fields_and_their_defaults() -> None:
    recipe = parse_recipe({"prior": {"model": {"kind": "autoregressive", "sampler": {"top_k": 5}}}, "prior_2": {}})
    assert recipe.prior.model == ArPriorConfig(sampler=TokenSamplerConfig(top_k=5))
    assert recipe.prior_2 == Recipe().prior
    assert Recipe().prior_2 is None
    assert list(recipe.trained()) == ["clip", "prior", "prior_2", "decoder"]
    assert parse_recipe(to_dict(recipe)) == recipe


def test_load_recipe_round_trips_through_resolved_json(tmp_path: Path) -> None:
    import json

    recipe = parse_recipe({"seed": 5, "upsampler_1": {"model": {"image_px": 128, "low_res_px": 64, "crop_px": 64}}})
    file = tmp_path / "resolved.json"
    file.write_text(json.dumps(to_dict(recipe)))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"prior": {"train": {"num_step": 3}}}, ["unknown key prior.train.num_step", "did you mean num_steps"]),
        ({"nonsense": 1}, ["unknown key nonsense"]),
        (
            {"download": {"min_success_prob": 0.1}},
            ["key download.min_success_prob; did you mean download.resources.min_success_prob?"],
        ),
        (
            {"prior": {"num_steps": 3}},
            ["did you mean prior.model.sampler.num_steps or prior.train.num_steps?"],
        ),
        ({"download": {"min_caption_words": 3}}, ["did you mean filter.min_caption_words?"]),
        ({"prior": {"train": {"num_steps": "many"}}}, ["prior.train.num_steps", "integer", "'many'"]),
        ({"prior": {"train": {"num_steps": 1.5}}}, ["prior.train.num_steps"]),
        ({"seed": True}, ["seed"]),
        ({"pairs": {"source": "list"}}, ["pairs", "path is required"]),
        ({"pairs": {"source": "folder", "path": "https://a/b"}}, ["pairs", "https://a/b", "s3://", "web servers"]),
        ({"pairs": {"source": "ftp"}}, ["pairs.source", "'list'"]),
        ({"download": {"image_px": 8}}, ["decoder.model.image_px", "download.image_px"]),
        (
            {"upsampler_1": {"model": {"image_px": 96, "low_res_px": 32, "crop_px": 48}}},
            ["upsampler_1.model.low_res_px"],
        ),
        (
            {"prior": {"train": {"batch_size": 1}, "resources": {"num_workers": 2}}},
            ["prior.train.batch_size", "2 workers"],
        ),
        ({"prior": {"resources": {"num_workers": 0}}}, ["prior.resources.num_workers", "greater than 0"]),
        ({"clip": {"resources": {"num_workers": [1, 2]}}}, ["clip: resources.num_workers is [1, 2]", "batch norms"]),
        (
            {"clip": {"resources": {"micro_batch_size": "auto"}}},
            ["clip: resources.micro_batch_size is auto", "undivided"],
        ),
        ({"clip": {"resources": {"micro_batch_size": 8}}}, ["clip: resources.micro_batch_size is 8", "undivided"]),
        ({"upsampler_2": {}}, ["upsampler_2"]),
        (
            {"prior": {"model": {"kind": "magic"}}},
            ["prior.model.kind: must be 'diffusion' or 'autoregressive'", "'magic'"],
        ),
        ({"prior": {"model": {"widht": 8}}}, ["prior.model.widht", "diffusion", "did you mean width?"]),
        (
            {"prior": {"model": {"kind": "autoregressive", "sampler": {"method": "ddim"}}}},
            ['unknown key prior.model.sampler.method (kind = "autoregressive")'],
        ),
        (
            {"prior_2": {"model": {"kind": "autoregressive", "num_bucket": 8}}},
            ["prior_2.model.num_bucket", "did you mean num_buckets?"],
        ),
        ({"prior_2": {"model": {"kind": "autoregressive", "num_heads": 3}}}, ["prior_2.model: width = 512"]),
        ({"prior_2": {"model": {"kind": "autoregressive", "width": "x"}}}, ["prior_2.model.width: ", "'x'"]),
        ({"prior_2": "autoregressive"}, ["prior_2: ", "'autoregressive'"]),
        ({"decoder": {"model": {"sampler": {"clip_guidance_scale": 1.0}}}}, ["clip_guidance_scale", "noisy_clip"]),
        ({"noisy_clip": {"model": {"image_px": 32}}}, ["noisy_clip.model has 32 px", "decoder.model has 64 px"]),
        ({"noisy_clip": {"model": {"tower": {"chanels": 32}}}}, ["noisy_clip.model.tower.chanels"]),
        (
            {"upsampler_1": {"model": {"diffusion": {"num_timesteps": 46}}}},
            ["upsampler_1.model: sampler.respacing = 'fast27'", "46 timesteps hold only 10, 9, 9, 9, 9"],
        ),
        ({"decoder": {"model": {"sampler": {"eta": 1.5}}}}, ["decoder.model.sampler: eta = 1.5"]),
        (
            {"decoder": {"model": {"unet": {"attention_resolutions": []}}}},
            ["decoder.model: unet.attention_resolutions", "never reads the caption"],
        ),
        ({"decoder": {"model": {"unet": {"channels": 0}}}}, ["decoder.model.unet: channels = 0"]),
        ({"decoder": {"model": {"text_transformer": {"width": 0}}}}, ["decoder.model.text_transformer: width = 0"]),
        ({"prior": {"model": {"width": 0}}}, ["prior.model: width = 0"]),
        ({"prior": {"model": {"num_heads": 7}}}, ["prior.model: width = 512", "num_heads = 7"]),
        ({"prior_2": {"model": {"kind": "autoregressive", "width": 0}}}, ["prior_2.model: width = 0"]),
        ({"clip": {"model": {"vision_width": 0}}}, ["clip.model: vision_width = 0"]),
        ({"clip": {"model": {"text_heads": 3}}}, ["clip.model: text_width = 128", "text_heads = 3"]),
        ({"clip": {"model": {"text_layers": 0}}}, ["clip.model: text_layers = 0"]),
        ({"clip": {"model": {"embed_dim": 0}}}, ["clip.model: embed_dim = 0"]),
    ],
)
def test_parse_recipe_refuses_and_names_the_key(tables: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(tables)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "clip", [{"model": {"vision": "vit"}}, {"source": "pretrained"}, {"resources": {"num_workers": [2, 2]}}]
)
def test_a_clip_that_trains_no_batch_norms_or_on_one_number_takes_a_range_of_workers(clip: dict[str, object]) -> None:
    parse_recipe({"clip": {"resources": {"num_workers": [1, 2]}} | clip})


@pytest.mark.parametrize("tables", [{"decoder": {"model": {"kind": "x"}}}, {"embed": {"seed": 1}}])
def test_a_word_that_other_sections_have_too_is_not_what_an_unknown_key_means(tables: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        parse_recipe(tables)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [("seed = ", "not a valid recipe"), ("when = 2020-01-01", "dates"), ("seed = 1\nseed = 2", "valid")],
)
def test_load_recipe_malformed_file_is_one_message(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        *("seed=-1", "pairs.drawn.num_pairs=0", "pairs.drawn.image_px=8", "pairs.drawn.port=70000"),
        *("pairs.drawn.num_faulty=-1", "pairs.max_pairs=-1", "pairs.validation_prob=1.0", "download.image_px=0"),
        *("download.retries=-1", "download.resources.min_success_prob=1.5", "download.encode_quality=101"),
        *("download.max_aspect_ratio=0.5", "download.deadline_s=0", "download.resources.max_per_host=-1"),
        *(
            "embed.batch_size=0",
            "embed.resources.max_retries=-1",
            "index.recall_target=2",
            "index.num_recall_queries=0",
        ),
        *("index.num_train_rows=-1", "prior.train.learning_rate=0", "prior.train.num_steps=-1", "prior.train.beta1=1"),
        *("decoder.train.ema_decay=1", "decoder.train.weight_decay=-1", "decoder.resources.save_every_steps=0"),
        *("decoder.resources.max_failures=-1", "evaluate.num_shown=0", "serve.port=0", "serve.port=65536"),
        *("serve.max_batch_size=0", "serve.max_queued_requests=0"),
    ],
)
def test_load_recipe_refuses_an_impossible_number_by_its_name(override: str) -> None:
    name, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: Input should be .*, got {re.escape(value)}"):
        load_recipe(None, [override])


def _floats(tables: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all numbers with a fraction."""
    names: list[str] = []
    for name, value in tables.items():
        if isinstance(value, dict):
            names += _floats(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            names.append(f"{prefix}{name}")
    return names


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_load_recipe_refuses_a_number_that_is_not_finite_in_every_field(value: str) -> None:
    names = _floats(default_tables({"upsampler_1": {}, "noisy_clip": {}, "prior_2": {}}))
    tokens = [f"prior_2.model.sampler.{name}" for name in ("temperature", "top_p")]
    assert len(names) > 60
    for name in [*names, *tokens]:
        kind = ["prior_2.model.kind=autoregressive"] if name in tokens else []
        with pytest.raises(ConfigError, match=rf"{re.escape(name)}.*: Input should be a finite number"):
            load_recipe(None, [*kind, f"{name}={value}"])


def test_respacing_takes_sections_that_just_fit_their_chain() -> None:
    model = {"diffusion": {"num_timesteps": 25}, "sampler": {"respacing": "13,12", "num_steps": 25}}
    config = parse_recipe({"decoder": {"model": model}}).decoder.model
    steps = sampling_timesteps(config.diffusion.num_timesteps, config.sampler.num_steps, config.sampler.respacing)
    assert steps == tuple(reversed(range(25)))
    shortest = {"diffusion": {"num_timesteps": 47}}
    assert parse_recipe({"upsampler_1": {"model": shortest}}).upsamplers()["upsampler_1"].diffusion.num_timesteps == 47
    assert len(fast27_timesteps(47)) == 27


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=", "name '' is part of a path"),
        ("name=../elsewhere", "name '../elsewhere' is part of a path"),
        ("workspace=", "workspace is empty"),
        ("download.encode_format=png", r"encode_quality must be 0\.\.9 for png, got 95"),
        ("prior.train.warmup_steps=1001", r"warmup_steps must be in 0\.\.num_steps, got 1001"),
        ("filter.max_nsfw=0.5", "max_nsfw reads the list's column punsafe or nsfw_score_opennsfw2; name the one that"),
        ("filter.nsfw_tags=['UNSURE']", r"nsfw_tags reads the list's column NSFW; .* in download\.extra_columns"),
        ("download.extra_columns=['NSFW', 'width', 'sha256']", "extra_columns: every shard has its own sha256, width;"),
        ("download.extra_columns=['uid', 'w']", r"every shard has its own uid; .* \(source_uid is the list's\)"),
    ],
)
def test_load_recipe_refuses_what_does_not_go_together(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(None, [override])


def test_a_column_to_compare_with_may_have_any_name_unless_the_shards_are_taken_in() -> None:
    assert load_recipe(None, ["download.hash_column=sha256"]).download.hash_column == "sha256"
    with pytest.raises(ConfigError, match=r"download\.hash_column: every shard has its own sha256"):
        load_recipe(None, ["download.hash_column=sha256", "pairs.source=shards", "pairs.path=shards"])


def test_a_filter_reads_any_of_the_names_of_its_column() -> None:
    overrides = ["filter.max_nsfw=0.5", "filter.min_caption_words=3", "download.extra_columns=['nsfw_score_opennsfw2']"]
    assert load_recipe(None, overrides).filter is not None


@pytest.mark.parametrize("text", ["[1, 2]", '"seed"', "null"])
def test_load_recipe_json_without_tables_is_one_message(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.json: not a valid recipe: it holds no tables"):
        load_recipe(file)


def test_load_recipe_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unclip init"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1"])
def test_load_recipe_malformed_override_shows_the_form(override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load_recipe(None, [override])


def test_load_recipe_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is a value"):
        load_recipe(None, ["seed=1", "seed.x=2"])


def test_without_resources_drops_only_resources_at_every_depth() -> None:
    tables = {"a": 1, "resources": {"b": 2}, "c": {"resources": {}, "d": 3}}
    assert without_resources(tables) == {"a": 1, "c": {"d": 3}}


def test_json_schema_describes_every_field() -> None:
    schema = json_schema()
    for name, definition in schema["$defs"].items():
        for field, description in definition["properties"].items():
            assert "description" in description or "$ref" in description, f"{name}.{field} has no docstring"


@pytest.mark.parametrize("cls", [value for value in vars(configs).values() if dataclasses.is_dataclass(value)])
def test_config_refuses_unknown_keys_and_converts_nothing(cls: type) -> None:
    adapter = TypeAdapter(cls)
    assert adapter.validate_json("{}") == cls()
    with pytest.raises(ValidationError, match="no_such_key"):
        adapter.validate_json('{"no_such_key": 1}')
    first_int = next(field.name for field in dataclasses.fields(cls) if isinstance(field.default, int))
    with pytest.raises(ValidationError, match=first_int):
        adapter.validate_json(f'{{"{first_int}": "1"}}')


def test_phases_of_a_training_are_tables_of_a_recipe() -> None:
    recipe = load_recipe(
        None, ["decoder.train.phases=[{from_step=500, learning_rate=1e-5}, {from_step=600, num_steps=2000}]"]
    )
    assert [phase.from_step for phase in recipe.decoder.train.phases] == [500, 600]
    assert recipe.decoder.train.at(700).learning_rate == 1e-5
    assert recipe.decoder.train.total_steps == 2000
    assert parse_recipe(to_dict(recipe)) == recipe
    with pytest.raises(ConfigError, match=r"unknown key decoder\.train\.phases\.0\.rate"):
        load_recipe(None, ["decoder.train.phases=[{from_step=500, rate=1e-5}]"])
    with pytest.raises(ConfigError, match=r"phases\[0\]\.from_step is 5000: after 0 and at most 1000"):
        load_recipe(None, ["decoder.train.phases=[{from_step=5000, num_steps=9000}]"])


def test_fewer_steps_than_a_phase_begins_at_say_what_to_set() -> None:
    path = "configs/ablations/one-way-heads.toml"
    first = load_recipe(path).decoder.train.phases[0].from_step
    said = rf"decoder\.train: phases\[0\]\.from_step is {first}: after 0 and at most 1000; lower it, or set phases=\[\]"
    with pytest.raises(ConfigError, match=said):
        load_recipe(path, ["decoder.train.num_steps=1000"])
    recipe = load_recipe(path, ["decoder.train.num_steps=1000", "decoder.train.phases=[]"])
    assert recipe.decoder.train.total_steps == 1000
