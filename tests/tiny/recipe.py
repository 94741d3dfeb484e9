"""One tiny recipe: the demo's steps, every size shrunken; ``changes`` are laid over it, table by table."""

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w

from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from tests.models import tiny_models

Tables = dict[str, Any]

CLIP: Tables = {
    "embed_dim": 16,
    "image_px": 32,
    "vision_width": 8,
    "text_width": 16,
    "text_heads": 2,
    "text_layers": 1,
    "context_length": 32,
}
UNET: Tables = asdict(replace(tiny_models.UNET, attention_resolutions=(), head_channels=8, dropout=0.1))
TRAINED = ("clip", "prior", "decoder", "upsampler_1", "upsampler_2")
_SAMPLER = {"method": "ddim", "num_steps": 3, "respacing": ""}


def _upsampler(low_res_px: int, image_px: int) -> Tables:
    return {"low_res_px": low_res_px, "image_px": image_px, "crop_px": 8, "unet": UNET, "sampler": _SAMPLER}


TABLES: Tables = {
    "name": "tiny",
    "download": {"image_px": 32},
    "clip": {"model": CLIP},
    "prior": {"model": {"width": 16, "depth": 1, "num_heads": 2, "sampler": {**_SAMPLER, "clip_x0": False}}},
    "decoder": {"model": {"image_px": 8, "unet": {**UNET, "attention_resolutions": [4]}, "sampler": _SAMPLER}},
    "upsampler_1": {"model": _upsampler(8, 16)},
    "upsampler_2": {"model": _upsampler(16, 32)},
}


def merge(below: Tables, above: Tables) -> Tables:
    """A copy of ``below`` with the values of ``above``; tables are merged key by key, and None takes a table away."""
    merged = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = merge(below[key], above[key])
    return merged


def tiny_tables(workspace: Path, **changes: Any) -> Tables:
    """The tables of a tiny recipe with its workspace, before ``parse_recipe``."""
    return merge(TABLES | {"workspace": str(workspace)}, changes)


def keys_of(recipe: Recipe) -> dict[str, str]:
    """The key of each step of a recipe."""
    return {step.name: step.key for step in make_plan(recipe)}


def training(num_steps: int, *, batch_size: int, save_every_steps: int = 2, log_every_steps: int = 1) -> Tables:
    """The tables of a short training, the same for each network."""
    return {
        "train": {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": 1e-3, "ema_decay": 0.9},
        "resources": {"save_every_steps": save_every_steps, "log_every_steps": log_every_steps},
    }


def write_recipe(
    folder: Path,
    *,
    port: int,
    num_steps: int = 4,
    num_pairs: int = 64,
    save_every: int = 2,
    long_trainings: Collection[str] = TRAINED,
) -> Path:
    """Write a recipe whose every step runs into ``folder``; its workspace is beside it.

    One worker a step, because each of them loads torch and open_clip, which takes most of the time of such a run.
    ``num_steps`` and ``save_every`` are those of ``long_trainings``; the other trainings are short.
    """
    one_worker = {"resources": {"num_workers": 1}}
    tables = tiny_tables(
        folder / "workspace",
        pairs={
            "validation_prob": 0.15,
            "drawn": {"num_pairs": num_pairs, "image_px": 32, "port": port, "num_faulty": 5},
        },
        download={"samples_per_shard": 24, "timeout_s": 2, "deadline_s": 4.0, "retries": 0, **one_worker},
        embed={"batch_size": 8, **one_worker},
        index={"num_recall_queries": 8},
        prior={"model": {"sampler": {"clip_x0": True}}},
        evaluate={"num_prompts": 8, "num_shown": 2, "num_images_per_shown": 2, "batch_size": 4, **one_worker},
    )
    long, short = (
        training(steps, batch_size=8, save_every_steps=every, log_every_steps=2)
        for steps, every in ((num_steps, save_every), (4, 2))
    )
    trainings = {name: long if name in long_trainings else short for name in TRAINED}
    path = folder / "tiny.toml"
    path.write_text(tomli_w.dumps(merge(tables, trainings)))
    return path
