"""Two workspaces: one as a finished run leaves it, with invented numbers; one with real files and untrained networks."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter

from pipeline.clip import create_clip
from pipeline.data.drawn import write_evaluation
from pipeline.data.embed import Embedder
from pipeline.data.rows import make_uid
from pipeline.evaluate.metrics import Rate
from pipeline.networks.clip import save_clip_artifact
from pipeline.networks.files import save_network
from pipeline.networks.table import kind_of
from pipeline.pictures import to_png
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.retrieve.build import build_index
from pipeline.shapes.captions import canonical_caption, training_caption
from pipeline.shapes.draw import draw
from pipeline.shapes.scene import Scene, evaluation_scenes, training_scene
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace

SECONDS = {
    "pairs": 2.1,
    "download": 21.0,
    "clip": 64.0,
    "embed": 9.0,
    "index": 1.2,
    "prior": 83.0,
    "prior_2": 83.0,
    "decoder": 241.0,
    "upsampler_1": 118.0,
    "upsampler_2": 96.0,
    "evaluate": 102.0,
}
_CREATED = 1_760_000_000.0


def make_recipe(workspace: Path, **tables: Any) -> Recipe:
    """A recipe of the demo's shape: 16 px decoder, upsamplers to 64 and 128 px."""
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
    return parse_recipe(data | tables)


def commit(artifact: Artifact, step: Step, *, end_s: float, counts: dict[str, int] | None = None) -> None:
    manifest = manifest_of(step, artifact, counts, wall_s=SECONDS[step.name])
    versions = {"unclip": "0.1.0", "torch": "2.13.0"}
    artifact.commit(dataclasses.replace(manifest, created=_CREATED + end_s, versions=versions))


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
        },
        "two objects": {
            "both colours": _rates(97, 120, 4),
            "both shapes": _rates(71, 120, 6),
            "binding": _rates(58, 120, 2),
            "relation": _rates(88, 120, 28),
            "background": _rates(119, 120, 24),
        },
    },
    "clip_score": {
        "generated": {"mean": 0.612, "std": 0.08, "count": 240, "low": 0.60, "high": 0.62},
        "real": {"mean": 0.671, "std": 0.06, "count": 240, "low": 0.66, "high": 0.68},
        "shuffled": {"mean": 0.082, "std": 0.2, "count": 240, "low": 0.06, "high": 0.11},
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
            drawing = {"file": samples[0], "label": "drawn", "caption": prompt}
            pictures["neighbours"].append({"prompt": prompt, "pictures": [drawing, *near]})
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
    workspace, end_s = Workspace(recipe.workspace), 0.0
    for step in make_plan(recipe, until=until):
        artifact, counts = artifact_of(workspace, step), None
        end_s += SECONDS[step.name]
        if step.name in recipe.trained():
            _write_losses(artifact, step, recipe.trained()[step.name].train.num_steps)
        if step.name == "download":
            counts = {"in": 8012, "ok": 8000, "failed_to_download": 9, "failed_to_resize": 3}
            status = {"success": 8000, "HTTP Error 404: Not Found": 4, "timed out": 3, "image decoding error": 3}
            artifact.write_json("00000_stats.json", {"status_dict": status})
            artifact.write_bytes("00000.tar", b"x" * 5_000_000)
        if step.name == "index":
            artifact.write_json(
                "index.json",
                {"kind": "flat", "num_rows": 8000, "image": {"recall_at_10": 1.0}, "text": {"recall_at_10": 0.998}},
            )
        if step.name == "evaluate":
            fill_evaluate(artifact, num_shown)
        commit(artifact, step, end_s=end_s, counts=counts)
    return make_plan(recipe)


# A second workspace, whose networks are real and tiny and have learned nothing.

NUM_PICTURES = 40
TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "pairs": {"drawn": {"num_pairs": NUM_PICTURES, "image_px": 32, "num_faulty": 0}},
    "download": {"image_px": 32},
    "clip": {
        "model": {
            "embed_dim": 16,
            "image_px": 32,
            "vision_width": 8,
            "text_width": 16,
            "text_heads": 2,
            "text_layers": 1,
            "context_length": 32,
        }
    },
    "prior": {"model": {"width": 16, "depth": 1, "num_heads": 2, "sampler": {"num_steps": 3, "clip_x0": False}}},
    "prior_2": {"model": {"kind": "autoregressive", "width": 16, "depth": 1, "num_heads": 2, "num_components": 4}},
    "evaluate": {"num_prompts": 10, "num_shown": 3, "num_images_per_shown": 2, "batch_size": 5},
}
_UNET = {"channels": 8, "channel_mults": [1, 2], "num_res_blocks": 1, "norm_groups": 4, "attention_resolutions": []}
_DDIM = {"method": "ddim", "num_steps": 2, "respacing": ""}


def tiny_tables(workspace: Path) -> dict[str, Any]:
    unet = _UNET | {"attention_resolutions": [4], "head_channels": 8}
    decoder = {"image_px": 8, "unet": unet, "context_width": 8, "sampler": {**_DDIM, "guidance_scale": 1.5}}
    sides = {"upsampler_1": (8, 16), "upsampler_2": (16, 32)}
    upsamplers = {
        name: {"model": {"low_res_px": low, "image_px": high, "crop_px": 8, "unet": _UNET, "sampler": _DDIM}}
        for name, (low, high) in sides.items()
    }
    return TINY | {"workspace": str(workspace), "decoder": {"model": decoder}} | upsamplers


def _write_shard(download: Artifact, seed: int) -> None:
    """Shard 00000 as img2dataset writes it; every fifth row is set aside for validation."""
    rows: list[dict[str, str]] = []
    with download.write("00000.tar") as path, tarfile.open(path, "w") as tar:
        for index in range(NUM_PICTURES):
            scene, key = training_scene(seed, index), f"{index:08d}"
            url, caption = f"http://127.0.0.1/{index}.png", training_caption(scene, seed, index)
            uid, split = make_uid(url, caption), "train" if index % 5 else "validation"
            rows.append({"uid": uid, "key": key, "url": url, "caption": caption, "split": split, "status": "success"})
            for name, data in (("png", to_png(draw(scene, 32))), ("json", json.dumps({"uid": uid}).encode())):
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with download.write("00000.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    counts = {"in": NUM_PICTURES, "ok": NUM_PICTURES}
    download.commit_shard(ShardRecord(shard="00000", counts=counts, files={}))


def _write_networks(recipe: Recipe, artifacts: dict[str, Artifact]) -> None:
    torch.manual_seed(recipe.seed)
    clip = create_clip(recipe.clip.model)
    save_clip_artifact(artifacts["clip"], clip)
    # The second prior comes last, so that the others have the weights that they would have without it.
    for name, section in sorted(recipe.trained().items(), key=lambda item: item[0] == "prior_2"):
        if name != "clip":
            config: Any = section.model
            network = kind_of(config).create(config, recipe.clip.model.dims())
            for parameter in network.parameters():  # those that start at zero too
                torch.nn.init.normal_(parameter, std=0.1)
            save_network(artifacts[name], config, recipe.clip.model.dims(), network.state_dict())


def build_tiny_workspace(recipe: Recipe) -> None:
    """Every step up to evaluate, with real files of every kind."""
    workspace = Workspace(recipe.workspace)
    steps = {step.name: step for step in make_plan(recipe)}
    artifacts = {name: artifact_of(workspace, step) for name, step in steps.items()}
    if recipe.pairs.source == "drawn":
        with artifacts["pairs"].write("evaluation.parquet") as path:
            write_evaluation(path, recipe.seed)
    _write_shard(artifacts["download"], recipe.seed)
    _write_networks(recipe, artifacts)
    embedder = Embedder(artifacts["clip"].path("open_clip_config.json").parent, 8)
    shard = [artifacts["download"].path(f"00000.{suffix}") for suffix in ("tar", "parquet")]
    with artifacts["embed"].write("00000.parquet") as path:
        counts = embedder(shard[0], shard[1], "00000", path)
    artifacts["embed"].commit_shard(ShardRecord(shard="00000", counts=dict(counts), files={}))
    for name, step in steps.items():
        if name == "index":
            build_index(artifacts["embed"], artifacts["index"], recipe.index, seed=recipe.seed)
        if name != "evaluate":
            commit(artifacts[name], step, end_s=1.0)


def evaluate_step(recipe: Recipe) -> Step:
    return next(step for step in make_plan(recipe) if step.name == "evaluate")
