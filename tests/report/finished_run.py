"""A workspace as a finished run of the demo leaves it: every step committed, its pictures and numbers invented."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from pipeline.evaluate.metrics import Rate, difference_of
from pipeline.pictures.png import to_png
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.steps import STEP_ROWS
from pipeline.retrieve.build import build_index
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.draw import draw
from pipeline.shapes.scene import Scene, evaluation_scenes
from pipeline.workspace.store import MANIFEST, Artifact, Workspace
from tests.retrieve.conftest import unit
from tests.tiny.shards import make_embeddings

SECONDS = {
    "pairs": 2.1,
    "download": 21.0,
    "clip": 64.0,
    "embed": 9.0,
    "index": 1.2,
    "prior": 83.0,
    "prior_2": 83.0,
    "first_decoder": 160.0,
    "decoder": 241.0,
    "upsampler_1": 118.0,
    "upsampler_2": 96.0,
    "evaluate": 102.0,
}
NUM_EMBEDDED = 60
_CREATED = 1_760_000_000.0


def make_recipe(workspace: Path, **tables: Any) -> Recipe:
    """A recipe of the demo's shape: 16 px decoder, upsamplers to 64 and 128 px."""
    return parse_recipe(recipe_tables(workspace, **tables))


def recipe_tables(workspace: Path, **tables: Any) -> dict[str, Any]:
    """The tables of such a recipe, as a file holds them."""
    unet = {"channels": 32, "channel_mults": [1, 2], "num_res_blocks": 1, "attention_resolutions": []}
    upsampler = {"crop_px": 16, "unet": unet, "sampler": {"num_steps": 8, "respacing": ""}}
    data = {
        "name": "demo",
        "workspace": str(workspace),
        "download": {"image_px": 128},
        "decoder": {
            "model": {"image_px": 16, "unet": {**unet, "attention_resolutions": [8], "head_channels": 32}},
            "train": {"num_steps": 1200},
        },
        "upsampler_1": {"model": {**upsampler, "image_px": 64, "low_res_px": 16}},
        "upsampler_2": {"model": {**upsampler, "image_px": 128, "low_res_px": 64}},
    }
    return data | tables


_DOWNLOAD_METRICS = {
    "failures": {"http-404": 4, "timeout": 3, "image cannot be decoded": 3},
    "one_pixel": 17,
    "repeated": [{"digest": "0" * 64, "urls": 1234, "url": "www.example.com/none.png"}],
}


def commit(
    artifact: Artifact,
    step: Step,
    *,
    end_s: float,
    counts: dict[str, int] | None = None,
    metrics: dict[str, Any] | None = None,
) -> None:
    manifest = manifest_of(step, artifact, counts, wall_s=SECONDS[step.name])
    versions = {"unclip": "0.1.0", "torch": "2.13.0"}
    metrics = metrics or ({"num_parameters": 1_800_000} if STEP_ROWS[step.name].trains else {})
    metrics |= _DOWNLOAD_METRICS if step.name == "download" else {}
    artifact.commit(dataclasses.replace(manifest, created=_CREATED + end_s, versions=versions, metrics=metrics))


def _soft(scene: Scene, seed: int, side_px: int = 128) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 3, (side_px, side_px, 3))
    picture = draw(scene, side_px).filter(ImageFilter.GaussianBlur(0.7))
    return Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))


def _rates(hits: int, total: int, floor: int) -> dict[str, Any]:
    kinds = {"generated": hits, "real": total, "guess": floor}
    return {kind: Rate(value, total).to_dict() for kind, value in kinds.items()}


METRICS: dict[str, Any] = {
    "num_prompts": 240,
    "prompts": "drawn",
    "pixel_check": {
        "one object": {
            "colour": _rates(118, 120, 17),
            "shape": _rates(109, 120, 19),
            "size": _rates(101, 120, 41),
            "background": _rates(120, 120, 25),
            "count": _rates(119, 120, 60),
            "everything": _rates(95, 120, 0),
        },
        "two objects": {
            "both colours": _rates(97, 120, 4),
            "both shapes": _rates(71, 120, 6),
            "binding": _rates(58, 120, 2),
            "relation": _rates(88, 120, 28),
            "relation, given which is which": {
                "generated": Rate(60, 97).to_dict(),
                "real": Rate(120, 120).to_dict(),
                "guess": {"rate": 0.24, "total": 97},
            },
            "everything": _rates(37, 120, 1),
            "background": _rates(119, 120, 24),
        },
    },
    "clip_score": {
        "generated": {"mean": 0.612, "std": 0.08, "count": 240, "low": 0.60, "high": 0.62},
        "real": {"mean": 0.671, "std": 0.06, "count": 240, "low": 0.66, "high": 0.68},
        "shuffled": {"mean": 0.082, "std": 0.2, "count": 240, "low": 0.06, "high": 0.11},
    },
    "held_out": {
        "two objects": {
            kind: {
                name: {
                    "held_out": held_out.to_dict(),
                    "trained": trained.to_dict(),
                    "difference": difference_of(held_out, trained),
                }
                for name, held_out, trained in (
                    ("both shapes", Rate(total // 2, total), Rate(36, 60)),
                    ("everything", Rate(total // 5, total), Rate(20, 60)),
                )
            }
            for kind, total in (("new pair", 90),)
        }
    },
    "preference": {
        "generated": Rate(190, 226).to_dict() | {"without_negative": 14},
        "real": Rate(220, 226).to_dict() | {"without_negative": 14},
        "chance": 0.5,
    },
    "r_precision": {"generated": Rate(151, 240).to_dict(), "real": Rate(190, 240).to_dict(), "chance": 1 / 240},
    "prior": {"z_image": {"mean": 0.87}, "unrelated_image": {"mean": 0.06}},
    "frechet_features": {"generated": 31.25, "count": 240},
    "cmmd": {"generated": 1.75, "real": 0.25, "count": 240},
    "precision": {"generated": Rate(180, 240).to_dict(), "real": Rate(216, 240).to_dict()},
    "recall": {"generated": Rate(120, 240).to_dict(), "real": Rate(214, 240).to_dict()},
    "upsampler_1": {
        "psnr_db": {"mean": 27.4},
        "bicubic_psnr_db": {"mean": 23.2},
        "ssim": {"mean": 0.912},
        "bicubic_ssim": {"mean": 0.871},
        "sharpness": {"mean": 812.0},
        "bicubic_sharpness": {"mean": 205.0},
        "real_sharpness": {"mean": 934.0},
    },
    "memorisation": {
        "generated": {"mean": 0.951},
        "real": {"mean": 0.957},
        "closer_than_real": Rate(14, 240).to_dict(),
    },
}


def fill_evaluate(artifact: Artifact, num_shown: int) -> None:
    pictures: dict[str, list[Any]] = {"shown": [], "stages": [], "reconstructions": [], "neighbours": []}

    def put(name: str, picture: Image.Image) -> str:
        artifact.write_bytes(name, to_png(picture))
        return name

    for number, entry in enumerate(evaluation_scenes(max(num_shown, 8), seed=0)[:num_shown]):
        scene, prompt = entry.scene, canonical_caption(entry.scene)
        samples = [put(f"samples/{number}-{j}.png", _soft(scene, 10 * number + j)) for j in range(4)]
        pictures["shown"].append(
            {
                "prompt": prompt,
                "pictures": [
                    {"file": name, "seed": 4 * number + j, "check": (number + j) % 7 != 3}
                    for j, name in enumerate(samples)
                ],
            }
        )
        if number < min(6, num_shown):
            sides = [(16, "16 px"), (64, "64 px"), (128, "128 px")]
            stages = [
                {"file": put(f"stages/{number}-{side}.png", _soft(scene, 1, side)), "label": label}
                for side, label in sides
            ]
            pictures["stages"].append({"prompt": prompt, "pictures": stages})
            pictures["reconstructions"].append(
                {
                    "prompt": prompt,
                    "similarity": 0.93,
                    "pictures": [
                        {"file": stages[2]["file"], "label": "real"},
                        {"file": stages[0]["file"], "label": "decoded"},
                        {"file": stages[1]["file"], "label": "upsampled"},
                    ],
                }
            )
            near = [{"file": samples[j], "label": f"0.9{9 - j}", "caption": prompt} for j in range(1, 4)]
            sample = {"file": samples[0], "label": "sample", "caption": prompt}
            pictures["neighbours"].append({"prompt": prompt, "pictures": [sample, *near]})
    pictures["failures"] = [
        {
            "title": "one object",
            "total": 120,
            "failed": 25,
            "pictures": [
                {
                    "file": put(f"failures/{number}.png", _soft(entry.scene, number)),
                    "prompt": canonical_caption(entry.scene),
                    "seed": 1000 * number,
                    "wrong": ["shape", "size"],
                    "shows": "small red ? on white",
                }
                for number, entry in enumerate(evaluation_scenes(2, seed=0))
            ],
        },
        {"title": "two objects", "total": 120, "failed": 0, "pictures": []},
    ]
    artifact.write_json("pictures.json", pictures)
    artifact.write_json("metrics.json", METRICS)


def _write_losses(artifact: Artifact, step: Step, num_steps: int) -> None:
    rng = np.random.default_rng(len(step.name))
    rows = [
        {"step": s, "loss": float(0.02 + 0.9 / (1 + s / 15) * np.exp(rng.normal(0, 0.12))), "lr": 1e-3}
        for s in range(0, num_steps + 1, 20)
    ]
    rows.append({"step": num_steps, "val_loss": 0.0457})
    artifact.write_bytes("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def fill_workspace(recipe: Recipe, *, until: str = "evaluate", num_shown: int = 4) -> list[Step]:
    """Commit every step up to ``until``; returns the whole plan."""
    workspace, end_s, plan = Workspace(recipe.workspace), 0.0, {step.name: step for step in make_plan(recipe)}
    for step in make_plan(recipe, until=until):
        artifact, counts, metrics = artifact_of(workspace, step), None, None
        end_s += SECONDS[step.name]
        if step.name in recipe.trained():
            _write_losses(artifact, step, recipe.trained()[step.name].train.num_steps)
        if step.name == "download":
            counts = {"in": 8012, "ok": 8000, "failed_to_download": 9, "failed_to_resize": 3}
            artifact.write_bytes("00000.tar", b"x" * 5_000_000)
        if step.name == "embed" and not artifact.exists(MANIFEST):
            vectors = unit(np.random.default_rng(0).normal(size=(NUM_EMBEDDED, 8)))
            make_embeddings(artifact, vectors, vectors, rows_per_shard=NUM_EMBEDDED)
        if step.name == "index":
            before = artifact.manifest()
            embed = artifact_of(workspace, plan["embed"])
            metrics = before.metrics if before else build_index(embed, artifact, recipe.index, seed=0).metrics
        if step.name == "evaluate":
            fill_evaluate(artifact, num_shown)
        commit(artifact, step, end_s=end_s, counts=counts, metrics=metrics)
    return make_plan(recipe)
