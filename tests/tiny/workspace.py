"""A workspace with every step but evaluate finished: real files, and real networks whose weights are random."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.clip.model import create_clip
from pipeline.data.drawn import write_evaluation
from pipeline.data.embed import Embedder
from pipeline.data.vectors import write_embeddings
from pipeline.networks.clip import load_clip_artifact, save_clip_artifact
from pipeline.networks.files import save_network
from pipeline.networks.table import kind_of
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.retrieve.build import build_index
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace
from tests.models.tiny_models import randomise
from tests.tiny.recipe import Tables, merge, tiny_tables, write_recipe
from tests.tiny.shards import Sample, drawn_sample, plain_picture, write_download, write_shard

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white", "gray", "pink")
NUM_PICTURES = 40


def evaluated_tables(workspace: Path, **changes: Any) -> Tables:
    """Tables of a recipe with a second prior, and so few prompts that an evaluation takes seconds."""
    tables = tiny_tables(
        workspace,
        seed=7,
        pairs={"drawn": {"num_pairs": NUM_PICTURES, "image_px": 32, "num_faulty": 0}},
        prior_2={"model": {"kind": "autoregressive", "width": 16, "depth": 1, "num_heads": 2, "num_components": 4}},
        decoder={"model": {"context_width": 8, "sampler": {"num_steps": 2, "guidance_scale": 1.5}}},
        evaluate={
            "num_prompts": 10,
            "num_trained_prompts": 4,
            "num_shown": 3,
            "num_images_per_shown": 2,
            "batch_size": 5,
        },
    )
    return merge(tables, changes)


def evaluated_workspace(workspace: Path, *, has_validation: bool = True, **changes: Any) -> Recipe:
    """All that ``evaluate`` reads: pairs of the demo, every fifth for validation, or none."""
    recipe = parse_recipe(evaluated_tables(workspace, **changes))
    samples = (
        drawn_sample(i, seed=recipe.seed, is_validation=has_validation and i % 5 == 0) for i in range(NUM_PICTURES)
    )
    finish_workspace(recipe, samples, "png")
    return recipe


def served_workspace(folder: Path, *, port: int = 8976, overrides: tuple[str, ...] = ()) -> Recipe:
    """All that ``serve`` reads, beside its recipe's file: a plain JPEG picture of each colour."""
    recipe = load_recipe(write_recipe(folder, port=port), overrides)
    finish_workspace(recipe, plain_samples(), "jpg")
    return recipe


def plain_samples() -> Iterator[Sample]:
    for colour in COLOURS:
        picture = plain_picture(colour, kind="JPEG")
        yield Sample(f"http://127.0.0.1:1/{colour}.jpg", f"a {colour} picture", picture)


def finish_workspace(recipe: Recipe, samples: Iterable[Sample], suffix: str) -> None:
    """Commit every step but evaluate; ``samples`` become the only shard, with pictures of that suffix."""
    workspace = Workspace(recipe.workspace)
    steps = {step.name: step for step in make_plan(recipe) if step.name != "evaluate"}
    outputs = {name: artifact_of(workspace, step) for name, step in steps.items()}
    if recipe.pairs.source == "drawn":
        with outputs["pairs"].write("evaluation.parquet") as path:
            write_evaluation(path, recipe.seed)
    tar, parquet = write_shard(outputs["download"], "00000", samples, suffix)
    write_networks(recipe, outputs)
    result = Embedder(outputs["clip"].path("open_clip_config.json").parent, recipe.embed)(tar, parquet, "00000")
    with outputs["embed"].write("00000.parquet") as path:
        write_embeddings([result.table], path, result.table.schema)
    outputs["embed"].commit_shard(ShardRecord(shard="00000", counts=dict(result.counts), files={}))
    for name, step in steps.items():
        if name == "index":
            build_index(outputs["embed"], outputs["index"], recipe.index, seed=recipe.seed)
        outputs[name].commit(manifest_of(step, outputs[name]))


def finish_download(recipe: Recipe) -> None:
    """Commit the list of pairs, without a file of it, and the download: all that an upsampler is trained on."""
    steps = {step.name: step for step in make_plan(recipe)}
    for name in ("pairs", "download"):
        output = artifact_of(Workspace(recipe.workspace), steps[name])
        if name == "download":
            write_download(Path(output.uri), num_shards=4)
        output.commit(manifest_of(steps[name], output))


def write_networks(recipe: Recipe, outputs: dict[str, Artifact]) -> None:
    """Write every trained network of a recipe with random weights."""
    torch.manual_seed(recipe.seed)
    save_clip_artifact(outputs["clip"], create_clip(recipe.clip.model))
    null_text = load_clip_artifact(outputs["clip"]).encode_text([""])
    dims = recipe.clip.model.dims()
    # The second prior comes last, so that the others have the weights that they would have without it.
    for name, section in sorted(recipe.trained().items(), key=lambda item: item[0] == "prior_2"):
        if name != "clip":
            config: Any = section.model
            network = kind_of(config).create(config, dims)
            randomise(network)
            if hasattr(network, "null_text"):
                network.null_text.set(null_text)
            save_network(outputs[name], config, dims, network.state_dict())


def evaluate_step(recipe: Recipe) -> Step:
    """The one step that ``finish_workspace`` leaves to do."""
    return next(step for step in make_plan(recipe) if step.name == "evaluate")
