"""A rehearsal of a recipe: every step on a few rows, in a temporary workspace, with the code of the real one."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import psutil
import torch

from pipeline.clip.model import describe_clip
from pipeline.data.download import Downloader, address_rules, read_rows
from pipeline.data.drawn import EVALUATION, write_evaluation
from pipeline.data.embed import Embedder
from pipeline.data.make_pairs import write_pairs
from pipeline.data.pairs import Pairs
from pipeline.data.shard_writer import ShardFiles
from pipeline.data.sources import Source, source_of
from pipeline.data.tars import take_in, tar_files
from pipeline.errors import ConfigError, DataError
from pipeline.networks.clip import clip_folder, save_clip_artifact
from pipeline.networks.cores import use_cores
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.build import build_index
from pipeline.shapes.server import serve_pictures
from pipeline.timing.clock import Clock
from pipeline.timing.trainings import RehearsedTraining
from pipeline.timing.units import RowUnits, TrainingUnits
from pipeline.train.assemble import TrainJob
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace

NUM_ROWS = 256
"""Rows of a rehearsal: half of them for training, half for validation."""
_SHARD = "00000"
_WHOLE_PAIRS = "pairs-of-a-tar"
_LEAST_ROWS = 8
_DEADLINE_S = 5.0


class Rehearsal:
    """A temporary workspace with a few rows, in which the steps of a recipe are taken.

    Args:
        recipe: The recipe.
        folder: An empty folder.
        finished: Finished artifacts, by step name; they are used in place of rehearsed ones.
    """

    def __init__(self, recipe: Recipe, folder: Path, finished: Mapping[str, Artifact]) -> None:
        shapes = replace(recipe.pairs.drawn, num_pairs=NUM_ROWS, num_faulty=0, port=_free_port())
        first_list = recipe.pairs.each()[0]
        pairs = replace(first_list, max_pairs=NUM_ROWS, validation_prob=0.5, drawn=shapes)
        # A dead host may take its deadline in a real run; a rehearsal waits less long for a row.
        deadline_s = min(recipe.download.deadline_s, _DEADLINE_S)
        download = replace(recipe.download, samples_per_shard=NUM_ROWS, retries=0, deadline_s=deadline_s)
        self.recipe = replace(recipe, workspace=str(folder), pairs=pairs, download=download)
        self._workspace = Workspace(str(folder))
        self._finished = {name: artifact for name, artifact in finished.items() if name in recipe.trained()}
        self.num_good = 0
        """Rows that the download brought."""
        self.num_pairs = 0
        """Rows of the pairs."""

    def artifact(self, name: str) -> Artifact:
        """The artifact of a step: finished, or rehearsed."""
        return self._finished.get(name) or self._workspace.artifact(name, "rehearsal")

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        """The artifacts of all steps, by name."""
        return {name: self.artifact(name) for name in ("pairs", "download", "embed", *self.recipe.trained())}

    def pairs(self) -> RowUnits:
        """Write the pairs."""
        output, source, config = self.artifact("pairs"), source_of(self.recipe), self.recipe.pairs
        if config.source == "shards":
            return self._pairs_of_a_tar(source, output)
        clock = Clock(torch.device("cpu"), 1)
        one_row = replace(config, max_pairs=1, drawn=replace(config.drawn, num_pairs=1))
        fixed_s = clock.time(lambda: write_pairs(replace(source, config=one_row), self.artifact("pairs-of-one")))
        start = clock.now()
        summary = write_pairs(source, output)
        self.num_pairs = summary.counts["ok"]
        row_s = max(0.0, clock.now() - start - fixed_s) / summary.counts["in"]
        if config.source == "drawn":
            with output.write(EVALUATION) as path:
                fixed_s += clock.time(lambda: write_evaluation(path, self.recipe.seed))
        return RowUnits(row_s=row_s, fixed_s=fixed_s)

    def download(self) -> RowUnits:
        """Download the pairs.

        Raises:
            DataError: If too few rows come through to train on.
        """
        config, output = self.recipe.download, self.artifact("download")
        if self.recipe.pairs.source == "shards":
            return self._take_in(output)
        rows = read_rows(Pairs(self.artifact("pairs")), _SHARD, config)
        names = [f"{_SHARD}.tar", f"{_SHARD}.parquet", f"{_SHARD}_stats.json"]
        rules = address_rules(self.recipe.pairs, config)
        with _pictures(self.recipe), Downloader(config, rules) as downloader, contextlib.ExitStack() as stack:
            files = ShardFiles(*(stack.enter_context(output.write(name)) for name in names))
            start, before_s = time.perf_counter(), _processor_s()
            counts = downloader.download(rows, _SHARD, files)
            # With a local server, its time and the worker's are added: they share the cores.
            processor_s = _processor_s() - before_s
            wall_s = time.perf_counter() - start
        is_local = self.recipe.pairs.source == "drawn"
        seconds = processor_s if is_local else max(wall_s, processor_s)
        self.num_good = counts["ok"]
        if self.num_good < min(_LEAST_ROWS, self.num_pairs):
            raise DataError(
                f"download: {self.num_good} of {counts['in']} rows came through, too few to measure with; "
                "look at the list and at the network"
            )
        self._commit(output, dict(counts), names)
        return RowUnits(row_s=seconds / counts["in"])

    @cached_property
    def _first_tar(self) -> tuple[str, float]:
        """The first tar of the shards on this machine's disk, and the seconds in which a remote one was fetched."""
        folder, uri, start = self.artifact("tar"), tar_files(self.recipe.pairs.path)[0].uri, time.perf_counter()
        folder.link(f"{_SHARD}.tar", uri)
        return str(folder.path(f"{_SHARD}.tar")), time.perf_counter() - start

    def _pairs_of_a_tar(self, source: Source, output: Artifact) -> RowUnits:
        """Write the pairs of the first tar, and the few of the rehearsal.

        A tar is opened, listed and hashed whole, however few of its rows are used. So the time of both steps that read
        it is that of a whole one, for each of its rows.
        """
        tar, fetched_s = self._first_tar
        whole, few = (replace(source.config, path=tar, max_pairs=most) for most in (0, NUM_ROWS))
        start = time.perf_counter()
        summary = write_pairs(replace(source, config=whole), self.artifact(_WHOLE_PAIRS))
        seconds = fetched_s + time.perf_counter() - start
        self.num_pairs = write_pairs(replace(source, config=few), output).counts["ok"]
        return RowUnits(row_s=seconds / summary.counts["in"])

    def _take_in(self, output: Artifact) -> RowUnits:
        """Take in the first tar whole, and the rows of it that the rehearsal has."""
        tar, fetched_s = self._first_tar
        whole, few = (Pairs(self.artifact(name)).part(_SHARD) for name in (_WHOLE_PAIRS, "pairs"))
        start = time.perf_counter()
        take_in(tar, whole, _SHARD, self.artifact("download-of-a-tar"))
        seconds = fetched_s + time.perf_counter() - start
        files = take_in(tar, few, _SHARD, output)
        output.learn(files)
        self.num_good = few.num_rows
        self._commit(output, {"in": few.num_rows, "ok": few.num_rows}, list(files))
        return RowUnits(row_s=seconds / max(1, whole.num_rows))

    def embed(self) -> RowUnits:
        """Embed the rows."""
        config, download, output = self.recipe.embed, self.artifact("download"), self.artifact("embed")
        clock = self._clock(config.resources.accelerator, config.resources.cpus_per_worker)
        start = clock.now()
        clip = clip_folder(self.artifact("clip"))
        embedder = Embedder(clip, config)
        loaded = clock.now()
        tar, parquet = (download.path(f"{_SHARD}.{suffix}") for suffix in ("tar", "parquet"))
        result, names = embedder.write(tar, parquet, _SHARD, output)
        done = clock.now()
        self._commit(output, dict(result.counts), names)
        return RowUnits(row_s=(done - loaded) / result.counts["in"], fixed_s=loaded - start)

    def index(self) -> RowUnits:
        """Build the index; the kinds for many rows take longer for each row than the one that these few get."""
        config = self.recipe.index
        clock = self._clock("cpu", config.resources.cpus_per_worker)
        seconds = clock.time(
            lambda: build_index(self.artifact("embed"), self.artifact("index"), config, seed=self.recipe.seed)
        )
        return RowUnits(row_s=seconds / self.num_good)

    def job(self, name: str) -> TrainJob:
        """A training on the rehearsal's rows."""
        resources = self.recipe.trained()[name].resources
        return TrainJob(
            name=name,
            recipe=self.recipe,
            inputs=self.artifacts,
            output=self._workspace.artifact(name, "rehearsal"),
            digest="rehearsal",
            device=torch.device(resources.accelerator),
            num_threads=max(1, int(resources.cpus_per_worker)),
        )

    def training(self, name: str) -> TrainingUnits:
        """Take a few steps of a training and write its artifact; a pretrained CLIP only takes its shape.

        Raises:
            ConfigError: If the shape of a pretrained CLIP is not known on this machine.
        """
        clip = self.recipe.clip
        if name != "clip" or clip.source == "train":
            return RehearsedTraining(self.job(name)).units()
        start = time.perf_counter()
        is_folder = Path(clip.name).is_dir()
        try:
            save_clip_artifact(self.artifact(name), describe_clip(f"local-dir:{clip.name}" if is_folder else clip.name))
        except ValueError as error:
            raise ConfigError(f"clip.name: {error}; or load it first: unclip run RECIPE --until clip") from error
        return TrainingUnits(step_s=0.0, start_s=time.perf_counter() - start)

    def _clock(self, accelerator: str, cpus: float) -> Clock:
        return Clock(torch.device(accelerator), use_cores(cpus))

    def _commit(self, output: Artifact, counts: dict[str, int], names: list[str]) -> None:
        files = {name: output.describe(name) for name in names}
        output.commit_shard(ShardRecord(shard=_SHARD, counts=counts, files=files))


@contextmanager
def _pictures(recipe: Recipe) -> Generator[None]:
    """Serve the drawn source's pictures inside the block."""
    if recipe.pairs.source == "drawn":
        with serve_pictures(recipe.pairs.drawn.port):
            yield
    else:
        yield


def _processor_s() -> float:
    """Processor time of this process and of those that it started."""
    this = psutil.Process()
    times = [process.cpu_times() for process in [this, *this.children(recursive=True)]]
    return sum(spent.user + spent.system for spent in times)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
