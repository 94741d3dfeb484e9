"""Chunks decoded in threads and in other processes are the same, and the processes end with this one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.clip.files import load_inputs
from pipeline.data.chunks import Chunk, DecodedChunk, ProcessDecoders, decode_chunk
from pipeline.data.embed import Embedder
from pipeline.data.shards import good_samples
from pipeline.errors import DataError
from pipeline.recipe.sections import EmbedConfig
from pipeline.workspace.store import Artifact
from tests.tiny.command import ROOT
from tests.tiny.networks import make_clip
from tests.tiny.shards import Sample, make_jpeg, write_shard


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def decoders(clip_folder: Path) -> Generator[ProcessDecoders]:
    decoders = ProcessDecoders(clip_folder, 2)
    yield decoders
    decoders.close()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """90 pictures, of which number 7 is none."""
    pictures = [b"no picture" if number == 7 else make_jpeg(number, (40, 36)) for number in range(90)]
    samples = [Sample(f"http://a/{number}", f"caption {number}", data) for number, data in enumerate(pictures)]
    return write_shard(Artifact(str(tmp_path_factory.mktemp("shard"))), "00000", samples, "jpg")


def _chunk(shard: tuple[Path, Path], num_rows: int = 20) -> Chunk:
    rows, pictures = good_samples(*shard, "00000")
    part = rows.slice(0, num_rows)
    return Chunk(pictures, *(part.column(name).to_pylist() for name in ("key", "uid", "caption")))


def _equal(one: DecodedChunk, other: DecodedChunk) -> bool:
    arrays = np.array_equal(one.pixels, other.pixels) and np.array_equal(one.tokens, other.tokens)
    return arrays and (one.good, one.failures) == (other.good, other.failures)


def test_a_process_decodes_as_this_one_does(
    clip_folder: Path, decoders: ProcessDecoders, shard: tuple[Path, Path]
) -> None:
    expected = decode_chunk(load_inputs(clip_folder), _chunk(shard))
    assert expected.pixels.shape == (19, 32, 32, 3)
    assert list(expected.failures) == [7]
    results = [decoders.submit(_chunk(shard)) for _ in range(5)]
    assert all(_equal(result(), expected) for result in results)


def test_embeddings_are_the_same_whatever_decodes(
    clip_folder: Path, decoders: ProcessDecoders, shard: tuple[Path, Path]
) -> None:
    config = EmbedConfig(batch_size=70)
    by_threads = Embedder(clip_folder, config)(*shard, "00000")
    by_processes = Embedder(clip_folder, config, decoders)(*shard, "00000")
    assert by_processes.table.equals(by_threads.table)
    assert by_processes.failures == by_threads.failures
    assert by_threads.counts == {"in": 90, "ok": 89, "corrupt": 1}


def test_a_damaged_shard_is_named_by_the_process_that_asked(
    decoders: ProcessDecoders, shard: tuple[Path, Path]
) -> None:
    chunk = _chunk(shard)
    chunk.uids[3] = "f" * 32
    with pytest.raises(DataError, match=f"shard 00000: key 0000003: uid {'f' * 32}: the row has uid"):
        decoders.submit(chunk)()


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "pipeline.data.chunks" in " ".join(child.cmdline())]


def test_a_process_that_dies_is_replaced(decoders: ProcessDecoders, shard: tuple[Path, Path]) -> None:
    expected = decoders.submit(_chunk(shard))()
    children = _children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert all(_equal(decoders.submit(_chunk(shard))(), expected) for _ in range(3))


def test_processes_end_with_the_one_that_started_them(clip_folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.data.chunks import ProcessDecoders\n"
        "ProcessDecoders(Path(sys.argv[1]), 2); print('started', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(clip_folder)], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        parent.kill()
    until = time.monotonic() + 60
    while any(child.is_running() for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)
