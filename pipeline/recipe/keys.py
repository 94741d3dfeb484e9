"""What of a recipe is part of the keys of its steps: the fields that can change an artifact or a picture."""

import hashlib
import json
from typing import Any

from pipeline.recipe.recipe import SAMPLING, Recipe
from pipeline.recipe.sections import StepSection
from pipeline.recipe.steps import STEPS
from pipeline.recipe.tables import to_dict, without_resources

Json = dict[str, Any]

ADDED_LATER = {
    "model.diffusion.min_snr_floor": 0.0,
    "model.hard_negatives": False,
    "model.pooled_drop_prob": 0.0,
    "model.sketch_px": 0,
    "model.text_adapter": {"depth": 0, "head_width": 32, "mlp_ratio": 4, "code_width": 0, "one_way_heads": False},
    "model.text_adapter.code_width": 0,
    "model.text_adapter.one_way_heads": False,
    "model.diffusion.loss": "simple",
    "model.diffusion.timestep_draws": "uniform",
    "model.image_norm": 1.0,
    "precision": "float32",
    "compiled": False,
    "token_states": False,
    "import_from": "",
    "import_validation_prob": 0.02,
    "train.phases": [],
    "train.shuffle_rows": 200_000,
    "train.num_streams": 1,
    "train.clip_precision": "float32",
    "lists": [],
}
"""Fields added later, by their dotted name in a section, with their old default. A field at its old default is left out
of the key, so that existing trainings stay valid."""

_IN_TRAINING = {"noise_level": 0.0}
"""Sampling fields that were once part of a training's key. The key always holds this default, so that existing
trainings stay valid; another value is part of the evaluation's key only."""


def recipe_key(recipe: Recipe) -> str:
    """16 hex digits over the settings of all steps: those that can change an artifact or a picture.

    The same recipe has the same key wherever its steps run and its files lie; no file of the user's is read for it.
    """
    tables = {row.name: own_tables(section) for row in STEPS if (section := getattr(recipe, row.name)) is not None}
    content = json.dumps({"seed": recipe.seed, **tables}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sampling_tables(recipe: Recipe) -> Json:
    """The sampling fields of every trained network that is sampled; the steps that sample depend on them."""
    begun = {row.begins_with for row in STEPS}
    models = {name: to_dict(section)["model"] for name, section in recipe.trained().items() if name not in begun}
    tables = {
        name: {field: model[field] for field in SAMPLING if field in model and _IN_TRAINING.get(field) != model[field]}
        for name, model in models.items()
    }
    return {name: {"model": fields} for name, fields in tables.items() if fields}


def own_tables(section: StepSection) -> Json:
    """The fields of a section that are part of its step's key, before those that come from elsewhere."""
    return without_added(without_resources(to_dict(section)))


def without_added(tables: Json, place: str = "") -> Json:
    """The tables without the fields of ``ADDED_LATER`` that have their old default."""
    return {
        name: without_added(value, f"{place}{name}.") if isinstance(value, dict) else value
        for name, value in tables.items()
        if f"{place}{name}" not in ADDED_LATER or ADDED_LATER[f"{place}{name}"] != value
    }


def without_sampling(tables: Json) -> Json:
    """The tables without the sampling fields, because no weight depends on them.

    The analytic sampler stays: the training measures its variance at each sampling step.
    """
    model = tables.get("model", {})
    if not model or model.get("sampler", {}).get("method") == "analytic":
        return tables
    fields = {name: value for name, value in model.items() if name not in SAMPLING}
    return tables | {"model": fields | {name: value for name, value in _IN_TRAINING.items() if name in model}}
