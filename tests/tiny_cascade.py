"""A workspace with everything that serving reads: real networks with random weights, real shards, a real index."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.clip import create_clip
from pipeline.data.embed import Embedder
from pipeline.data.rows import make_uid
from pipeline.networks.clip import load_clip_artifact, save_clip_artifact
from pipeline.networks.files import save_network
from pipeline.networks.table import kind_of
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.retrieve.build import build_index
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny import tiny_recipe

COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "black", "white", "gray", "pink"]


def randomise(network: torch.nn.Module) -> None:
    """Random weights in place of those that start at zero, so that every input matters to the output."""
    for name, parameter in network.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)


def finished_workspace(folder: Path, *, port: int = 8976, overrides: tuple[str, ...] = ()) -> Recipe:
    """Write a tiny recipe and the artifacts that serving reads, all committed."""
    recipe = load_recipe(tiny_recipe(folder, port=port), overrides)
    torch.manual_seed(0)
    workspace = Workspace(recipe.workspace)
    steps = {step.name: step for step in make_plan(recipe)}
    outputs = {name: artifact_of(workspace, step) for name, step in steps.items()}
    _write_shard(outputs["download"])
    save_clip_artifact(outputs["clip"], create_clip(recipe.clip.model))
    _embed(outputs)
    build_index(outputs["embed"], outputs["index"], recipe.index, seed=0)
    for name, section in recipe.trained().items():
        if name != "clip":
            network = kind_of(section.model).create(section.model, recipe.clip.model.dims())
            randomise(network)
            if name in {"prior", "decoder"}:
                network.null_text.set(load_clip_artifact(outputs["clip"]).encode_text([""]))
            save_network(outputs[name], section.model, recipe.clip.model.dims(), network.state_dict())
    for name in ("download", "clip", "embed", "index", *recipe.trained()):
        outputs[name].commit(manifest_of(steps[name], outputs[name]))
    return recipe


def _write_shard(download: Artifact) -> None:
    """One shard as img2dataset writes it: a plain picture of each colour."""
    rows = []
    with download.write("00000.tar") as path, tarfile.open(path, "w") as tar:
        for number, colour in enumerate(COLOURS):
            key, caption, url = f"{number:09d}", f"a {colour} picture", f"http://127.0.0.1:1/{colour}.jpg"
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), colour).save(picture, "JPEG")
            row = {"uid": make_uid(url, caption), "url": url, "caption": caption, "split": "train", "key": key}
            rows.append(row | {"status": "success"})
            members = (
                ("jpg", picture.getvalue()),
                ("json", json.dumps(row).encode()),
                ("txt", caption.encode()),
            )
            for extension, data in members:
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    with download.write("00000.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    download.commit_shard(ShardRecord(shard="00000", counts={"in": len(rows), "ok": len(rows)}, files={}))


def _embed(outputs: dict[str, Artifact]) -> None:
    download, embed = outputs["download"], outputs["embed"]
    embedder = Embedder(outputs["clip"].path("open_clip_config.json").parent, batch_size=8)
    with embed.write("00000.parquet") as path:
        counts = embedder(download.path("00000.tar"), download.path("00000.parquet"), "00000", path)
    embed.commit_shard(ShardRecord(shard="00000", counts={"in": len(COLOURS), **counts}, files={}))


def png(colour: str, side_px: int = 32) -> bytes:
    """A plain picture as a PNG file."""
    stream = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(stream, "PNG")
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """The pixels of a picture file, (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))
