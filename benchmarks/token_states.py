"""A prior's step with stored token states, beside the same step that runs the frozen CLIP's text tower.

    python -m benchmarks.token_states [--rounds 7] [--threads 1] [--batch-size 16]

Both read their batch from the same files and take an optimizer step in float32 (forward, backward, fused AdamW); ours
reads the token states that the embed step stores (`embed.token_states`), the other tokenises its captions and runs the
tower. Prior, tower and embeddings have the same width, prior and tower the same depth: 768 and 12 are ViT-L/14's.
Captions are the demo's, of 7 to 23 tokens. `row_bytes` are those of a row's token states, `of_embeddings` the ratio to
those of its embeddings.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import compare, publish
from models.clip_config import ClipConfig
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.sample_random import SampleRandom
from pipeline.clip.frozen import FrozenText, freeze
from pipeline.clip.model import create_clip
from pipeline.data.batch import TextEncoder
from pipeline.data.rows import make_uid
from pipeline.data.samples import Samples
from pipeline.data.token_states import EmptyCaption, pack, states_file, states_schema, to_rows, write_states
from pipeline.data.training_rows import ShardReader
from pipeline.data.vectors import to_unit
from pipeline.networks.prior import PriorObjective
from pipeline.shapes.captions import training_caption
from pipeline.shapes.scene import training_scene
from pipeline.workspace.store import Artifact
from tests.tiny.shards import write_vectors

SIZES = ((256, 6), (768, 12))
"""Width and depth of prior and text tower."""
_SHARD = "00000"
_AT_ONCE = 64


def write_shard(folder: Path, clip: FrozenText, num_rows: int) -> Artifact:
    """A shard of random embeddings with the captions of the demo and their token states."""
    import pyarrow as pa

    embed = Artifact(str(folder))
    captions = [training_caption(training_scene(0, number), 0, number) for number in range(num_rows)]
    rows = [
        {
            "uid": make_uid(f"http://a/{i}", text),
            "key": f"{_SHARD}{i:05d}",
            "url": "",
            "caption": text,
            "split": "train",
        }
        for i, text in enumerate(captions)
    ]
    vectors = to_unit(
        np.random.default_rng(0).standard_normal((num_rows, clip.dims.embed_dim), np.float32).astype(np.float16)
    )
    write_vectors(embed, _SHARD, rows, vectors, vectors[::-1])
    schema = states_schema(EmptyCaption(clip.dims, clip.encode_text([""])))
    with embed.write(states_file(_SHARD)) as path, write_states(path, schema) as writer:
        for start in range(0, num_rows, _AT_ONCE):
            uids = pa.array([row["uid"] for row in rows[start : start + _AT_ONCE]])
            text = clip.encode_text(captions[start : start + _AT_ONCE])
            writer.write_batch(to_rows(uids, pack(text, clip.dims.context_length), schema))
    return embed


def make_step(prior: Prior, samples: Samples, encode: TextEncoder, batch_size: int) -> Callable[[], None]:
    """A step on the next rows, from the files to the update."""
    objective = PriorObjective(prior, encode).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-5, fused=True)
    taken = 0

    def step() -> None:
        nonlocal taken
        rows = np.arange(taken, taken + batch_size) % samples.num_rows
        batch = samples.batch(np.stack([np.zeros_like(rows), rows], axis=1))
        objective(batch, SampleRandom.of_samples(taken, range(batch_size))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken += batch_size

    return step


def run(
    rounds: int, batch_size: int, sizes: tuple[tuple[int, int], ...] = SIZES, rows: int = 512
) -> list[dict[str, Any]]:
    """One comparison for each size."""
    results: list[dict[str, Any]] = []
    for width, depth in sizes:
        torch.manual_seed(0)
        heads = max(1, width // 64)
        config = ClipConfig(embed_dim=width, text_width=width, text_layers=depth, text_heads=heads)
        clip = freeze(create_clip(config).without_images())
        prior = Prior(PriorConfig(width=width, depth=depth, num_heads=heads), clip.dims)
        prior.null_text.set(clip.encode_text([""]))
        with tempfile.TemporaryDirectory() as name:
            embed = write_shard(Path(name), clip, rows)
            sizes_of_files = embed.sizes()
            readers = (ShardReader(None, embed, "train", states=states) for states in (embed, None))
            ours, theirs = (make_step(prior, Samples(reader, 0), clip.encode_text, batch_size) for reader in readers)
            comparison = compare(f"prior and tower {width} x {depth}", ours, theirs, rounds=rounds, floor=1.0)
        row_bytes = sizes_of_files[states_file(_SHARD)] / rows
        results.append(asdict(comparison) | {"row_bytes": row_bytes, "of_embeddings": row_bytes / (4 * width)})
    return results


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    publish("token_states", run(arguments.rounds, arguments.batch_size), vars(arguments))


if __name__ == "__main__":
    main()
