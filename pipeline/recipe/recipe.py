"""The recipe: typed, frozen, checked before anything runs.

Layers: defaults < recipe file (TOML or resolved JSON) < ``--set a.b=c``. Relative paths are relative to the folder in
which the command runs.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from models.ar_prior.config import ArPriorConfig
from models.configclass import configclass, described_fields
from models.decoder.config import DecoderConfig
from models.prior.config import PriorConfig
from models.upsampler.config import UpsamplerConfig
from pipeline.errors import ConfigError
from pipeline.recipe.cache_section import CacheConfig
from pipeline.recipe.first_decoder import model_of_smaller_pictures, require_same_shape
from pipeline.recipe.job_sections import JobConfig
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.sections import (
    FILTER_COLUMNS,
    PAIRS_COLUMNS,
    SHARD_COLUMNS,
    DownloadConfig,
    DownloadResources,
    EmbedConfig,
    EvaluateConfig,
    FilterConfig,
    FilterEmbeddingsConfig,
    IndexConfig,
    PricesConfig,
    TaskResources,
    TrackingConfig,
)
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.recipe.steps import STEP_ROWS
from pipeline.recipe.tables import apply_override, flatten, merge, read_tables, to_dict
from pipeline.recipe.train_sections import ClipStepConfig, NetworkStepConfig, NoisyClipStepConfig
from pipeline.workspace.cache import use_cache

Json = dict[str, Any]
SAMPLING = ("sampler", "num_candidates", "noise_level")
"""Fields of a model's table that configure the sampling of the trained network."""
PriorModel = Annotated[PriorConfig | ArPriorConfig, Field(discriminator="kind")]
"""A prior of either kind; ``kind`` in its table says which."""
TrainedSection = ClipStepConfig | NoisyClipStepConfig | NetworkStepConfig[Any]


@configclass
class Recipe:
    """Everything that one run needs; sections are steps, in the order of docs/architecture.md."""

    name: str = "unclip"
    """Name of the recipe: of its experiment, its jobs and its report."""
    workspace: str = "workspace"
    """Folder or object-store URI that holds every artifact."""
    seed: NonNegativeInt = 0
    """Seed of everything random."""
    pairs: PairsConfig = PairsConfig()
    """Where the pairs come from."""
    download: DownloadConfig = DownloadConfig()
    """Pairs to shards."""
    filter: FilterConfig | None = None
    """Rows to leave out by captions, sizes, languages, columns and duplicates; without the table all rows stay."""
    clip: ClipStepConfig = ClipStepConfig()
    """The frozen CLIP."""
    embed: EmbedConfig = EmbedConfig()
    """Shards to embeddings."""
    filter_embeddings: FilterEmbeddingsConfig | None = None
    """Rows to leave out by their embeddings; without the table all rows stay."""
    index: IndexConfig = IndexConfig()
    """Embeddings to the neighbour index."""
    prior: NetworkStepConfig[PriorModel] = NetworkStepConfig(model=PriorConfig())
    """Caption to z_image; ``kind`` of its model chooses a diffusion or an autoregressive prior."""
    prior_2: NetworkStepConfig[PriorModel] | None = None
    """A second prior to compare: the evaluation measures both, and the cascade samples with ``prior``."""
    first_decoder: NetworkStepConfig[DecoderConfig] | None = None
    """The decoder on smaller pictures, whose weights ``decoder`` begins with: there it learns sooner what stands where,
    and a sample takes about half of the time (docs/lab.md; cf. arXiv:2405.16759, which freezes what it has trained
    without down-sampling and adds layers, where here all weights are trained on). What its tables leave out is as in
    ``decoder``, num_steps and batch_size too, at half the side, without phases and init_from."""
    decoder: NetworkStepConfig[DecoderConfig] = NetworkStepConfig(model=DecoderConfig())
    """z_image and caption to a small picture."""
    noisy_clip: NoisyClipStepConfig | None = None
    """A CLIP for noised pictures, which guides the decoder (decoder.model.sampler.clip_guidance_scale)."""
    upsampler_1: NetworkStepConfig[UpsamplerConfig] | None = None
    """The small picture to a larger one; without the table the cascade ends at the decoder."""
    upsampler_2: NetworkStepConfig[UpsamplerConfig] | None = None
    """The larger picture to the final one; without the table the cascade ends at upsampler_1."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Pictures and numbers."""
    serve: ServeConfig = ServeConfig()
    """The server."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    prices: PricesConfig = PricesConfig()
    """Prices, for `plan --cost`."""
    job: JobConfig = JobConfig()
    """The environment of a submitted job."""
    cache: CacheConfig = CacheConfig()
    """Where machines keep files of an object store."""

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or "/" in self.name:
            raise ValueError(f"name {self.name!r} is part of a path: not empty, no slash, no dot in front")
        if not self.workspace:
            raise ValueError("workspace is empty; name a folder or a URI")
        low_res = ("decoder.model.image_px", self.decoder.model.image_px)
        for name, model in self.upsamplers().items():
            if model.low_res_px != low_res[1]:
                raise ValueError(
                    f"{name}.model.low_res_px is {model.low_res_px} px but {low_res[0]} is {low_res[1]} px: "
                    "the cascade does not fit together"
                )
            low_res = (f"{name}.model.image_px", model.image_px)
        if self.upsampler_2 is not None and self.upsampler_1 is None:
            raise ValueError("upsampler_2 is set without upsampler_1")
        if low_res[1] > self.download.image_px and self.download.resize_mode != "no":
            raise ValueError(
                f"{low_res[0]} is {low_res[1]} px but download.image_px stores only {self.download.image_px} px"
            )
        for name, trained in self.trained().items():
            workers, batch = trained.resources.most_workers, trained.train.batch_size
            if batch < workers:
                raise ValueError(f"{name}.train.batch_size is {batch}: too few samples for {workers} workers")
            if trained.train.clip_precision != "float32" and "clip" not in STEP_ROWS[name].inputs:
                raise ValueError(f"{name}.train.clip_precision: this training reads no frozen CLIP")
        if self.embed.token_states and self.prior.train.clip_precision != "float32":
            raise ValueError(
                "prior.train.clip_precision: with embed.token_states a prior runs no frozen CLIP; remove it"
            )
        if self.pairs.weights and self.embed.import_from:
            raise ValueError("pairs.lists have weights, but the rows of embed.import_from are of no list")
        self._require_other_columns()
        self._require_filter_columns()
        self._require_noisy_clip()
        self._require_same_shape()

    def _require_other_columns(self) -> None:
        """Check that no column of the list has the name of one that the shards have: none could hold both."""
        download = self.download
        columns = {"extra_columns": download.extra_columns}
        if self.pairs.source == "shards":  # all that is read of them is kept
            columns |= {"blur_column": (download.blur_column,), "hash_column": (download.hash_column,)}
        for name, chosen in columns.items():
            if conflicts := sorted((SHARD_COLUMNS | PAIRS_COLUMNS) & {*chosen}):
                theirs = [f"source_{one}" for one in conflicts if one in PAIRS_COLUMNS]
                raise ValueError(
                    f"download.{name}: every shard has its own {', '.join(conflicts)}; rename or leave out"
                    + (f" ({', '.join(theirs)} is the list's)" if theirs else "")
                )

    def _require_filter_columns(self) -> None:
        """Check that the columns that the filter reads reach the shards: it would notice after the whole download."""
        for name, columns in FILTER_COLUMNS.items():
            is_on = self.filter is not None and getattr(self.filter, name) != getattr(FilterConfig(), name)
            if is_on and not {*columns} & {*self.download.extra_columns}:
                raise ValueError(
                    f"filter.{name} reads the list's column {' or '.join(columns)}; "
                    "name the one that it has in download.extra_columns"
                )

    def _require_noisy_clip(self) -> None:
        """Check that the noisy CLIP has the decoder's picture size, timesteps and noise schedule."""
        decoder = self.decoder.model
        if self.noisy_clip is None:
            if decoder.sampler.clip_guidance_scale > 0:
                raise ValueError("decoder.model.sampler.clip_guidance_scale is above 0 without a [noisy_clip] table")
            return
        tower = self.noisy_clip.model
        actual = (tower.image_px, tower.diffusion.num_timesteps, tower.diffusion.schedule)
        expected = (decoder.image_px, decoder.diffusion.num_timesteps, decoder.diffusion.schedule)
        if actual != expected:
            raise ValueError(
                f"noisy_clip.model has {actual[0]} px, {actual[1]} steps, {actual[2]}, "
                f"but decoder.model has {expected[0]} px, {expected[1]} steps, {expected[2]}"
            )

    def _require_same_shape(self) -> None:
        """Check that the decoder can begin with the first one's weights: it would notice after that whole training."""
        if self.first_decoder is None:
            return
        if self.decoder.init_from:
            raise ValueError(
                "decoder.init_from: the decoder begins with the weights of first_decoder; leave that one out with "
                "first_decoder = false, or let it begin with these: first_decoder.init_from"
            )
        require_same_shape(*(flatten(to_dict(section.model)) for section in (self.first_decoder, self.decoder)))

    def trained(self) -> dict[str, TrainedSection]:
        """The sections that train a network, by step name, in the order of the recipe's fields."""
        rows = [STEP_ROWS[field.name] for field in dataclasses.fields(self) if field.name in STEP_ROWS]
        sections = {row.name: getattr(self, row.name) for row in rows if row.trains}
        return {name: section for name, section in sections.items() if section is not None}

    def upsamplers(self) -> dict[str, UpsamplerConfig]:
        """The upsamplers, by step name, from the smallest picture to the largest."""
        sections = {name: getattr(self, name) for name, row in STEP_ROWS.items() if row.trains == "upsampler"}
        return {name: section.model for name, section in sections.items() if section is not None}


_PLACES_NAMED = 3
"""Most fields of other sections that the message on an unknown key names."""


@functools.cache
def _recipe_type() -> TypeAdapter[Recipe]:
    """Built lazily: workers receive a parsed recipe and never need it."""
    return TypeAdapter(Recipe)


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and check it.

    Args:
        path: A ``.toml`` recipe, or a resolved ``.json`` one, or a folder of networks; None: the defaults alone. With
            ``extends = "other.toml"`` (from the file's own folder) a recipe names only what it changes in another one;
            ``filter = false`` leaves out the other's table, as with every step that a recipe may lack.
        overrides: ``a.b=value`` strings; the value is TOML, a bare word is a string.

    Raises:
        ConfigError: If the file is missing or malformed, a key is unknown or a value is of the wrong type or
            impossible; names the dotted key.
    """
    data = read_tables(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(data, override)
    recipe = parse_recipe(data, where=str(path or "defaults"))
    use_cache(recipe.cache.folder, recipe.cache.gb, shared=recipe.cache.shared)
    return recipe


def parse_recipe(data: Json, *, where: str = "recipe") -> Recipe:
    """Check nested tables against the recipe's types.

    Raises:
        ConfigError: As ``load_recipe``.
    """
    data = {name: value for name, value in data.items() if value is not False or name not in _optional_tables()}
    try:
        # JSON mode is strict about types yet takes a list for a tuple and an integer for a float, as TOML writes them.
        return _recipe_type().validate_json(json.dumps(merge(default_tables(data), data)))
    except ValidationError as error:
        items = error.errors(include_url=False)
        places = {item["loc"] for item in items}
        # What the first decoder has of the decoder's tables is said of these.
        own = (item for item in items if ("decoder", *item["loc"][1:]) not in places or item["loc"][0] == "decoder")
        lines = [_explain(item, data) for item in own]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None
    except TypeError as error:
        raise ConfigError(f"{where}: dates and times have no place in a recipe ({error})") from None


def json_schema() -> Json:
    """JSON schema of the recipe, with every field's description and default."""
    with described_fields():
        schema = TypeAdapter(Recipe).json_schema()
    # pydantic reads only the docstrings of fields that the class itself declares.
    tables = schema["$defs"]
    inherited = tables[TaskResources.__name__]["properties"]
    for name, field in tables[DownloadResources.__name__]["properties"].items():
        if name in inherited:
            field["description"] = inherited[name]["description"]
    return schema


@functools.cache
def _optional_tables() -> frozenset[str]:
    """Names of the tables that a recipe may lack."""
    return frozenset(name for name, table in to_dict(Recipe()).items() if table is None)


def default_tables(data: Json) -> Json:
    """Defaults to merge ``data`` onto: a partial table keeps the defaults of its other keys.

    The defaults depend on ``data`` for an optional table (the upsamplers) and for a table with a ``kind``.
    """
    tables = to_dict(Recipe())
    for name, section in _section_types().items():
        present, models = data.get(name), _model_types(section)
        if not isinstance(present, dict):
            continue
        if tables[name] is None:
            tables[name] = to_dict(NetworkStepConfig(model=models[0]()) if models else section())
        kinds = {model.kind: model for model in models} if len(models) > 1 else {}
        model = present.get("model")
        if isinstance(model, dict) and model.get("kind") in kinds:
            tables[name]["model"] = to_dict(kinds[model["kind"]]())
    if isinstance(data.get("first_decoder"), dict):
        tables["first_decoder"] = _first_decoder(data, tables["decoder"])
    return tables


def _first_decoder(data: Json, defaults: Json) -> Json:
    """The tables of ``first_decoder`` where ``data`` says nothing of it: the decoder's, at half the side."""
    decoder = data.get("decoder")
    tables = merge(defaults, cast("Json", decoder)) if isinstance(decoder, dict) else defaults
    model = model_of_smaller_pictures(tables["model"], data["first_decoder"].get("model"))
    return merge(tables, {"model": model, "init_from": "", "train": {"phases": []}})


@functools.cache
def _section_types() -> dict[str, Any]:
    """The type of every field of the recipe, without the None of an optional section."""
    hints = get_type_hints(Recipe)
    return {name: get_args(hint)[0] if type(None) in get_args(hint) else hint for name, hint in hints.items()}


def _model_types(section: Any) -> tuple[Any, ...]:
    """The configurations that the model of a ``NetworkStepConfig[...]`` may have, the default first."""
    arguments = get_args(section)
    return get_args(arguments[0]) or arguments if arguments else ()


def _explain(item: Any, data: Json) -> str:
    location = [str(part) for part in item["loc"]]
    of_kind = ""
    if location[1:2] == ["model"] and len(location) > 2 and len(_model_types(_section_types()[location[0]])) > 1:
        of_kind = f' (kind = "{location.pop(2)}")'  # pydantic puts the kind among the keys
    name = ".".join(location)
    kind: str = item["type"]
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        meant = _meant(location, data)
        return f"unknown key {name}{of_kind}" + (f"; did you mean {' or '.join(meant)}?" if meant else "")
    if kind == "union_tag_invalid":
        kinds = str(item["ctx"]["expected_tags"]).replace(", ", " or ")
        return f"{name}.kind: must be {kinds}, got {item['ctx']['tag']!r}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name}: {message}, got {_value_at(data, location)!r}"


def _meant(location: list[str], data: Json) -> list[str]:
    """What an unknown key is likely to mean.

    Its name elsewhere in its section; else one like it beside it; else its name elsewhere in the recipe, unless it is a
    single word, many fields have it, or it stands there in the same table of another section.
    """
    tables = default_tables({name: {} for name in _optional_tables()} | data)
    section, *inside = location
    same = [name for name in flatten(tables) if name.rpartition(".")[2] == location[-1]]
    lacking = _optional_tables() - data.keys()
    same = [name for name in same if name.partition(".")[0] not in lacking] or same
    own = [name for name in same if name.startswith(f"{section}.")]
    table = _value_at(tables, location[:-1])
    close = difflib.get_close_matches(location[-1], list(table) if isinstance(table, dict) else [], n=1)
    others = [name for name in same if len(inside) < 2 or name.split(".")[1:] != inside]
    # One word (kind, seed) means something else in each section.
    return own or close or (others if "_" in location[-1] and len(others) <= _PLACES_NAMED else [])


def _value_at(data: Any, location: list[str]) -> Any:
    for part in location:
        if isinstance(data, dict) and part in data:
            data = cast("Json", data)[part]
        elif isinstance(data, list) and part.isdigit() and int(part) < len(cast("list[Any]", data)):
            data = cast("list[Any]", data)[int(part)]
    return data
