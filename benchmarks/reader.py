"""The reader of a training: rows a second beside others, and how long a training waits for it, in one run.

    python -m benchmarks.reader [--shards 16] [--rows 10000] [--streaming FOLDER]

Prior: uid, caption and z_image in batches of 4,096 rows, from shards with z_image and z_text in float16 (width 768).
Ours gives them shuffled, as a training reads them, in two threads, with uids that are gathered only when they are asked
for; Ray Data's ``iter_batches`` in the order of the files, which is its
quickest; mosaicml-streaming (installed apart, in FOLDER) shuffled, by a DataLoader with one process. All take turns,
and the time begins with the first batch, so that no start counts. The ratio is of the medians.

Waiting: the share of a training's time in which its loop waits for the next batch, with the real step of a small
network on as many threads as there are cores, of which the reader takes its part: a prior at batch 4,096, and a
decoder on JPEG shards (256 px, decoded to 64 px) at batch 16.
"""

import argparse
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from PIL import Image
from torch import nn

from benchmarks.peers import make_inputs
from benchmarks.side_by_side import publish
from benchmarks.train_step import DIMS
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.layers.config import UNetConfig
from pipeline.data.batch import Batch
from pipeline.data.batches import iterate_batches, plan_order
from pipeline.data.order import Share
from pipeline.data.samples import Samples
from pipeline.data.training_rows import ShardReader
from pipeline.data.vectors import to_unit
from pipeline.workspace.store import Artifact
from tests.tiny.shards import Sample, make_embeddings, write_shard

BATCH = 4096


def ours(embed: Artifact, num_batches: int) -> Iterator[int]:
    """Rows of each batch."""
    with closing(_batches(Samples(ShardReader(None, embed, "train"), 0), BATCH)) as batches:
        for batch in itertools.islice(batches, num_batches):
            yield len(batch)


def rays(embed: Artifact, num_batches: int) -> Iterator[int]:
    """Rows of each batch."""
    paths = [str(embed.path(f"{shard}.parquet")) for shard in embed.shard_records()]
    dataset = ray.data.read_parquet(paths).select_columns(["uid", "caption", "z_image"])
    batches = dataset.iter_batches(batch_size=BATCH, batch_format="numpy")
    for batch in itertools.islice(batches, num_batches):
        yield len(batch["uid"])


def write_streaming(embed: Artifact, folder: Path) -> None:
    """The same rows as MDS shards."""
    import pyarrow.parquet as pq
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    from pipeline.data.vectors import read_column

    columns = {"uid": "str", "caption": "str", "z_image": "ndarray:float16:768"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for shard in embed.shard_records():
            path = embed.path(f"{shard}.parquet")
            table = pq.read_table(path, columns=["uid", "caption"])
            rows = zip(
                table["uid"].to_pylist(), table["caption"].to_pylist(), read_column(path, "z_image"), strict=True
            )
            for uid, caption, z_image in rows:
                writer.write({"uid": uid, "caption": caption, "z_image": z_image})


def streamings(folder: Path, num_batches: int) -> Iterator[int]:
    """Rows of each batch."""
    from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]

    dataset: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=1)
    for batch in itertools.islice(loader, num_batches):
        yield len(batch["uid"])


def rate(rows: Iterator[int]) -> float:
    """Rows a second after the first batch."""
    next(rows)
    start = time.perf_counter()
    count = sum(rows)
    return count / (time.perf_counter() - start)


def waiting(samples: Samples, batch_size: int, step: Callable[[Batch], None], num_steps: int) -> dict[str, float]:
    """Share of the time that the loop waits for batches, after the first two steps."""
    start = stalled = 0.0
    with closing(_batches(samples, batch_size)) as batches:
        for number in range(num_steps + 2):
            if number == 2:
                start, stalled = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(batches)
            stalled += time.perf_counter() - asked
            step(batch)
        seconds = time.perf_counter() - start
    return {
        "step_ms": round(1000 * (seconds - stalled) / num_steps, 1),
        "rows_per_s": round(num_steps * batch_size / seconds, 1),
        "stalled_share": round(stalled / seconds, 4),
    }


def prior_step() -> Callable[[Batch], None]:
    """A step of a small network of embeddings."""
    network = nn.Sequential(nn.Linear(768, 1024), nn.GELU(), nn.Linear(1024, 768))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step(batch: Batch) -> None:
        z_image = batch.require_z_image()
        (network(z_image) - z_image).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoder_step(batch_size: int) -> Callable[[Batch], None]:
    """A step of a small decoder at 64 px."""
    unet = UNetConfig(
        channels=32, channel_mults=(1, 2, 2), num_res_blocks=1, attention_resolutions=(16,), head_channels=32
    )
    network = Decoder(DecoderConfig(image_px=64, context_width=64, unet=unet), DIMS)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    inputs = make_inputs(DIMS, batch_size, 1)

    def step(batch: Batch) -> None:
        pixels = batch.require_images().permute(0, 3, 1, 2).float() / 127.5 - 1
        condition = network.encode_condition(inputs.z_image, inputs.text)
        network(pixels, inputs.t, condition).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def write_pictures(folder: Path, num_rows: int) -> Artifact:
    """Two shards of JPEG files of 256 px with much detail, some 30 KB each."""
    download, rng = Artifact(str(folder)), np.random.default_rng(0)
    for shard in range(2):
        samples: list[Sample] = []
        for number in range(num_rows // 2):
            coarse = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            file = io.BytesIO()
            Image.fromarray(coarse).save(file, "JPEG", quality=90)
            samples.append(Sample(f"http://a/{shard}/{number}", f"caption {number}", file.getvalue()))
        write_shard(download, f"{shard:05d}", samples, "jpg", digits=5)
    return download


def _batches(samples: Samples, batch_size: int) -> Any:
    order = plan_order(samples, 0, where="benchmark")
    return iterate_batches(samples, order, Share(batch_size), 0, prefetch=True)


def main() -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--streaming", default="", help="Folders with mosaicml-streaming, as in PYTHONPATH.")
    args = parser.parse_args()
    num_cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_cpus)
    sys.path += [folder for folder in args.streaming.split(os.pathsep) if folder]
    with tempfile.TemporaryDirectory() as name:
        folder, num_rows = Path(name), args.shards * args.rows
        vectors = to_unit(np.random.default_rng(0).standard_normal((num_rows, 768), np.float32).astype(np.float16))
        embed = Artifact(str(folder / "embed"))
        make_embeddings(embed, vectors, vectors[::-1], args.rows)
        del vectors
        num_batches = num_rows // BATCH
        readers = {"ours": lambda: ours(embed, num_batches), "ray_data": lambda: rays(embed, num_batches)}
        if args.streaming:
            write_streaming(embed, folder / "mds")
            readers["streaming"] = lambda: streamings(folder / "mds", num_batches)
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rates: dict[str, list[float]] = {reader: [] for reader in readers}
        for turn in range(args.repeats + 1):
            for reader, read in readers.items():
                measured = rate(read())
                if turn:  # the first turn warms up
                    rates[reader].append(measured)
        ray.shutdown()
        prior = waiting(Samples(ShardReader(None, embed, "train"), 0), BATCH, prior_step(), args.steps)
        download = write_pictures(folder / "download", args.pictures)
        samples = Samples(ShardReader(download, None, "train"), 64, num_threads=num_cpus)
        decoder = waiting(samples, 16, decoder_step(16), args.steps)
    medians = {reader: statistics.median(values) for reader, values in rates.items()}
    rows: list[dict[str, Any]] = [
        {
            "part": f"embeddings: {reader}",
            "rows_per_s": value,
            "ratio": medians["ours"] / value,
            "step_ms": None,
            "stalled_share": None,
        }
        for reader, value in medians.items()
    ]
    rows += [{"part": "prior's step", "ratio": None} | prior, {"part": "decoder's step", "ratio": None} | decoder]
    settings = {name: getattr(args, name) for name in ("shards", "rows", "pictures", "steps", "repeats")}
    publish("reader", rows, settings | {"cpus": num_cpus, "load": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
