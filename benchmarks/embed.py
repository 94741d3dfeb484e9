"""The embed step beside its network alone on ready tensors, and beside clip-retrieval, in one run.

    python -m benchmarks.embed [--device cuda --precision bfloat16 --cpus 16] [--model ViT-B-32]
    python -m benchmarks.embed --peer FOLDER        also clip-retrieval's, installed apart with its packages in FOLDER

The weights are random: the arithmetic is that of public ones. Shards hold JPEG files of 256 px (quality 95) with
captions of ten words. Embed is all that a worker does for a shard, less Ray: it checks the checksum, decodes,
tokenises, encodes and writes, two shards at a time. The network alone encodes as many ready batches, in the same
arithmetic. clip-retrieval's own worker reads the same tars, with as many processes; its time begins with its second
batch, when its processes have started. All take turns; the ratio is of the medians. Floors: 0.90 times the network
alone, 1.2 times clip-retrieval.
"""

import argparse
import hashlib
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.side_by_side import publish
from pipeline.clip.files import load_clip, save_clip
from pipeline.clip.frozen import FrozenClip
from pipeline.clip.model import describe_clip
from pipeline.data.chunks import ProcessDecoders
from pipeline.data.embed import Embedder
from pipeline.data.rows import make_uid
from pipeline.data.vectors import write_embeddings
from pipeline.networks.arithmetic import Arithmetic
from pipeline.recipe.sections import EmbedConfig, TaskResources
from tests.tiny.shards import write_tar

_WORDS = "a photo of two small dogs playing on the wet beach at sunset with an old red ball near blue boats".split()  # noqa: SIM905

_FLOORS = {"the network alone": 0.9, "clip-retrieval": 1.2}


def make_shards(folder: Path, num_shards: int, num_rows: int, side_px: int = 256) -> list[tuple[Path, Path]]:
    """(tar, parquet) of each shard, in img2dataset's layout."""
    rng = np.random.default_rng(0)
    pictures: list[bytes] = []
    for _ in range(64):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((side_px, side_px), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
        pictures.append(stream.getvalue())
    shards: list[tuple[Path, Path]] = []
    for shard in range(num_shards):
        rows: list[dict[str, str]] = []
        members: list[tuple[str, bytes]] = []
        for row in range(num_rows):
            caption, url = " ".join(rng.choice(_WORDS, 10)), f"http://a/{shard}/{row}.jpg"
            fields = {"uid": make_uid(url, caption), "url": url, "caption": caption, "split": "train"}
            fields |= {"key": f"{shard:05d}{row:05d}", "status": "success"}
            rows.append(fields)
            files = {"jpg": pictures[rng.integers(64)], "txt": caption.encode(), "json": json.dumps(fields).encode()}
            members += [(f"{fields['key']}.{name}", data) for name, data in files.items()]
        tar, parquet = folder / f"{shard:05d}.tar", folder / f"{shard:05d}.parquet"
        write_tar(tar, members)
        pq.write_table(pa.Table.from_pylist(rows), parquet)
        shards.append((tar, parquet))
    return shards


def embed_all(embedder: Embedder, shards: list[tuple[Path, Path]], out: Path) -> float:
    """Seconds of all shards, two at a time."""

    def embed_one(shard: tuple[Path, Path]) -> None:
        for path in shard:
            with path.open("rb") as stream:
                hashlib.file_digest(stream, "sha256")
        result = embedder(*shard, shard[0].stem)
        assert result.counts["corrupt"] == 0
        target = out / f"{shard[0].stem}.parquet"
        write_embeddings([result.table], target, result.table.schema)
        with target.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(embed_one, shards))
    return time.perf_counter() - start


def forward_all(clip: FrozenClip, config: EmbedConfig, num_rows: int) -> float:
    """Seconds of the network alone on ``num_rows`` ready rows."""
    device = torch.device(config.resources.accelerator)
    size, side_px = min(config.batch_size, num_rows), clip.image_px
    pixels = torch.randint(0, 256, (size, side_px, side_px, 3), dtype=torch.uint8, device=device)
    tokens = clip.clip.tokenize([" ".join(_WORDS[:10])] * size)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.precision)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for first in range(0, num_rows, size):
            part = slice(0, min(size, num_rows - first))
            last = clip.encode_image(pixels[part]), clip.embed_tokens(tokens[part])
    last[0].cpu(), last[1].cpu()
    return time.perf_counter() - start


def peer_rate(packages: Path, weights: Path, model: str, shards: list[tuple[Path, Path]], args: Any) -> float:
    """Rows/s of clip-retrieval's own worker, from its second batch on."""
    if str(packages) not in sys.path:
        sys.path.append(str(packages))
    for name in ("fire", "wandb", "sentence_transformers"):  # for its command line, its curves and another model
        stub = ModuleType(name)
        setattr(stub, "SentenceTransformer", None)  # noqa: B010
        sys.modules[name] = stub
    from clip_retrieval.clip_inference import worker as peer

    times: list[float] = []

    class TimedRunner(peer.Runner):
        def __init__(self, **builders: Any) -> None:
            def reader_builder(sampler: Any) -> Any:
                reader = builders["reader_builder"](sampler)
                loader = reader.dataloader

                class Reader:
                    def __iter__(self) -> Any:
                        for batch in loader:
                            times.append(time.perf_counter())
                            yield batch

                return Reader()

            super().__init__(**builders | {"reader_builder": reader_builder})

    with tempfile.TemporaryDirectory() as out, mock.patch.object(peer, "Runner", TimedRunner):
        peer.worker(
            [0],
            [str(tar) for tar, _ in shards],
            out,
            1,
            input_format="webdataset",
            batch_size=args.batch_size,
            num_prepro_workers=max(1, args.cpus - 1),
            clip_model=f"open_clip:{model}/{weights}",
            use_jit=False,
        )
        stop = time.perf_counter()
    num_rows = len(shards) * args.rows
    return (num_rows - args.batch_size) / (stop - times[1])


def main() -> None:
    """Measure, and publish the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path)
    args = parser.parse_args()
    resources = TaskResources(num_workers=1, cpus_per_worker=args.cpus, accelerator=args.device)
    config = EmbedConfig(
        batch_size=args.batch_size, precision=args.precision, compiled=args.compiled, resources=resources
    )
    torch.set_num_threads(args.cpus)
    Arithmetic(config.precision).set_up()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save_clip(describe_clip(args.model), folder / "clip")
        (folder / "out").mkdir()
        shards = make_shards(folder, args.shards, args.rows)
        num_rows = args.shards * args.rows
        use_processes = args.device == "cuda" and args.cpus > 1
        embedder = Embedder(
            folder / "clip", config, ProcessDecoders(folder / "clip", args.cpus - 1) if use_processes else None
        )
        alone = FrozenClip(load_clip(folder / "clip")).to(args.device)
        if args.compiled:
            alone.compile_towers()
        tasks: dict[str, Callable[[], float]] = {
            "embed": lambda: embed_all(embedder, shards, folder / "out"),
            "the network alone": lambda: forward_all(alone, config, num_rows),
        }
        if args.peer:
            weights = folder / "clip/open_clip_model.safetensors"
            tasks["clip-retrieval"] = lambda: num_rows / peer_rate(args.peer, weights, args.model, shards, args)
        for run in tasks.values():
            run()
        seconds: dict[str, list[float]] = {task: [] for task in tasks}
        for _ in range(args.repeats):
            for task, run in tasks.items():
                seconds[task].append(run())
        rates = {task: num_rows / statistics.median(values) for task, values in seconds.items()}
    settings = {
        "model": args.model,
        "arithmetic": f"{args.precision}, TF32 {'on' if config.has_tf32 else 'off'}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine(),
        "cpus": args.cpus,
        "batch_size": args.batch_size,
        "compiled": args.compiled,
        "rows": num_rows,
        "seconds": {task: [round(value, 3) for value in values] for task, values in seconds.items()},
    }
    publish("embed", [_row(name, rates, floor) for name, floor in _FLOORS.items() if name in rates], settings)


def _row(name: str, rates: dict[str, float], floor: float) -> dict[str, Any]:
    """Embed beside one of the others, in rows a second."""
    return {
        "beside": name,
        "ours_per_s": rates["embed"],
        "theirs_per_s": rates[name],
        "ratio": rates["embed"] / rates[name],
        "floor": floor,
    }


if __name__ == "__main__":
    main()
