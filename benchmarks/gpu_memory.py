"""Memory of a training on a GPU: what `unclip plan --cost` counts, beside the most that the allocator gave out.

    python -m benchmarks.gpu_memory [--steps 4]

Trains networks of large sizes for a few steps on random pictures, captions and embeddings, each in a process of its
own. Floor: within 10 %.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import CheckpointError

from benchmarks.side_by_side import publish
from pipeline.clip.model import create_clip
from pipeline.data.vectors import to_unit
from pipeline.networks.arithmetic import Arithmetic
from pipeline.networks.clip import save_clip_artifact
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.train.assemble import TrainJob
from pipeline.train.fitting import recipe_memory
from pipeline.train.job import run_job
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.shards import Sample, make_embeddings, make_jpeg, write_shard

DEMO = Path(__file__).parents[1] / "configs" / "demo.toml"
_LARGE = (
    *("decoder.model.image_px=32", "decoder.train.precision=bfloat16", "decoder.train.optimizer=adamw"),
    *("decoder.model.unet.channels=192", "decoder.model.unet.channel_mults=[1, 2, 3, 4]"),
    *("decoder.model.unet.num_res_blocks=3", "decoder.model.unet.attention_resolutions=[32, 16, 8]"),
    *("decoder.model.unet.head_channels=64", "decoder.model.unet.norm_groups=32", "decoder.model.unet.patch_px=1"),
    *("decoder.model.unet.position_bands=0", "upsampler_1.model.low_res_px=32", "upsampler_1.model.image_px=64"),
)
CASES = {
    "decoder, 192 channels, 32 px, bfloat16": ("decoder", (*_LARGE, "decoder.train.batch_size=128")),
    "the same, activations recomputed": (
        "decoder",
        (*_LARGE, "decoder.train.batch_size=512", "decoder.resources.checkpointing=true"),
    ),
    "prior, width 2048, 20 layers, bfloat16": (
        "prior",
        (
            "prior.model.width=2048",
            "prior.model.depth=20",
            "prior.model.num_heads=32",
            "prior.train.batch_size=256",
            "prior.train.precision=bfloat16",
            "prior.train.optimizer=adamw",
            "clip.model.context_length=8",  # captions here are no longer, and a batch is as long as its longest
        ),
    ),
    "decoder of the demo, float32, Muon": ("decoder", ("decoder.train.batch_size=512",)),
    "CLIP of the demo's shape, 64 px, 2048 pairs, bfloat16": (
        "clip",
        (
            "clip.model.image_px=64",
            "clip.model.vision_width=48",
            "clip.train.batch_size=2048",
            "clip.train.precision=bfloat16",
        ),
    ),
}
"""What is trained: its step, and what differs from the demo."""
_ROWS = 2048


def measure(name: str, num_steps: int, device: str) -> dict[str, Any]:
    """One row."""
    step_name, changes = CASES[name]
    of_step = (f"train.num_steps={num_steps}", "train.warmup_steps=0", f'resources.accelerator="{device}"')
    words = [*changes, *(f"{step_name}.{change}" for change in (*of_step, "resources.num_workers=1"))]
    recipe = load_recipe(DEMO, words)
    counted = next(one for one in recipe_memory(recipe) if one.name == step_name)
    step = next(one for one in make_plan(recipe) if one.name == step_name)
    Arithmetic().set_up()
    with tempfile.TemporaryDirectory() as folder:
        inputs = _make_inputs(recipe, Path(folder))
        output = artifact_of(Workspace(folder), step)
        job = TrainJob(step_name, recipe, inputs, output, step.key, torch.device(device), num_threads=8)
        run_job(job, lambda *_: None)
    measured = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "training": name,
        "counted_gb": counted.total / 1e9,
        "measured_gb": measured / 1e9,
        "ratio": counted.total / measured if measured else None,
        "state_gb": counted.state / 1e9,
    }


def _make_inputs(recipe: Recipe, folder: Path) -> dict[str, Artifact]:
    """A CLIP with random weights, pictures, and embeddings that have nothing to do with either."""
    clip, download, embed = (Artifact(str(folder / name)) for name in ("clip", "download", "embed"))
    save_clip_artifact(clip, create_clip(recipe.clip.model))
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"http://a/{number}", f"caption {number}", make_jpeg(number, (64, 64))) for number in range(_ROWS)
    ]
    write_shard(download, "00000", samples, "jpg", digits=5)
    z = to_unit(rng.standard_normal((_ROWS, recipe.clip.model.dims().embed_dim), np.float32))
    make_embeddings(embed, z, z, _ROWS)
    return {"clip": clip, "download": download, "embed": embed}


def main() -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in CASES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                rows.append(pool.submit(measure, name, args.steps, "cuda").result())
                print(rows[-1], flush=True)
            except (torch.cuda.OutOfMemoryError, CheckpointError) as error:
                print(f"{name}: {error}")
    publish("gpu_memory", rows, {"device": torch.cuda.get_device_name(), "steps": args.steps})


if __name__ == "__main__":
    main()
