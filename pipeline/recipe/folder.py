"""A folder of trained networks as a recipe, so that `unclip sample` reads what import or `export --native` wrote.

The folder holds ``clip/``, ``prior/``, ``decoder/`` and optional upsamplers, each with the files of its artifact. A
network that a recipe uses unchanged (``init_from``, 0 steps) can be sampled without a run and without pairs.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recipe.steps import STEPS

Json = dict[str, Any]


def folder_tables(folder: Path) -> Json:
    """The tables of a recipe that uses the networks of a folder unchanged.

    Raises:
        ConfigError: If the folder does not hold such networks.
    """
    if (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder}: is in diffusers' layout; first: unclip import {folder} --out MY-FOLDER")
    if (folder / "noisy_clip").is_dir():
        raise ConfigError(
            f"{folder}: CLIP guidance needs a recipe that trains noisy_clip; move {folder / 'noisy_clip'} elsewhere to "
            "sample without it"
        )
    tables: Json = {"name": folder.resolve().name, "workspace": f"workspace/{folder.resolve().name}"}
    tables["clip"] = {"source": "pretrained", "name": str(folder.resolve() / "clip"), "tag": ""}
    sides_px: list[int] = []
    for row in STEPS:
        if not row.in_cascade or "init_from" not in row.files:
            continue
        path = folder / row.name / "config.json"
        if row.trains == "upsampler" and not path.is_file():
            continue
        try:
            model: Json = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"there is no {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error!r}"
            raise ConfigError(
                f"{folder}: neither a recipe nor a folder of networks, as `unclip import` or `unclip export --native` "
                f"writes it: {reason}"
            ) from None
        tables[row.name] = {"init_from": str(folder.resolve() / row.name), "train": {"num_steps": 0}, "model": model}
        sides_px.append(model.get("image_px", 0))
    tables["download"] = {"image_px": max(256, *sides_px)}
    return tables
