"""A rehearsal of a recipe: every step on a few rows, in a temporary workspace, with the code of the real one."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.clip.model import describe_clip
from pipeline.data.arrays import save_array
from pipeline.data.decoders import Measures
from pipeline.data.download import Downloader, address_rules
from pipeline.data.drawn import EVALUATION, write_evaluation
from pipeline.data.embed import Embedder
from pipeline.data.make_pairs import write_pairs
from pipeline.data.npy_folder import NpyPart, find_parts, import_part
from pipeline.data.pairs import Pairs
from pipeline.data.selection import label_file
from pipeline.data.shard_again import join_shard
from pipeline.data.shard_rows import read_rows
from pipeline.data.shard_tables import read_names, read_schema, read_table
from pipeline.data.shard_writer import SUCCESS, ShardFiles, failure_causes
from pipeline.data.sources import Source, source_of
from pipeline.data.tars import take_in, tar_files
from pipeline.data.vectors import write_embeddings
from pipeline.errors import ConfigError, DataError
from pipeline.filter.labels import map_table, write_labels, write_table
from pipeline.filter.rules import RowRules
from pipeline.filter.scores import ScoreRules
from pipeline.machine import free_port
from pipeline.networks.clip import clip_folder, save_clip_artifact
from pipeline.networks.cores import use_cores
from pipeline.recipe.recipe import Recipe
from pipeline.retrieve.build import build_index
from pipeline.shapes.server import serve_pictures
from pipeline.timing.clock import Clock
from pipeline.timing.limited_hosts import LimitedHosts
from pipeline.timing.trainings import RehearsedTraining
from pipeline.timing.units import RowUnits, TrainingUnits
from pipeline.train.assemble import TrainJob
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.progress import duration
from pipeline.workspace.store import Artifact, Workspace

NUM_ROWS = 256
"""Rows of a rehearsal: half of them for training, half for validation."""
_SHARD = "00000"
_WHOLE_PAIRS = "pairs-of-a-tar"
_LEAST_ROWS = 8
"""Rows that have to come through, so that some are for training and some for validation."""
_IMPORTED_ROWS = 1 << 14
"""Rows of embeddings that are taken over for the time: fewer would mostly show how long files take to open."""
_KINDS = ("img", "text", "metadata")
_LONG_S = 10.0
"""A wait of which people hear."""
_DEADLINE_S = 5.0
"""Of a URL, so that a rehearsal with dead hosts is short; rows that a real run waits longer for count as failed."""


class Rehearsal:
    """A temporary workspace with a few rows, in which the steps of a recipe are taken.

    Args:
        recipe: The recipe.
        folder: An empty folder.
        finished: Finished artifacts, by step name; they are used in place of rehearsed ones.
        watch: Called with what takes long.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        finished: Mapping[str, Artifact],
        watch: Callable[[str], None] = lambda _what: None,
    ) -> None:
        shapes = replace(recipe.pairs.drawn, num_pairs=NUM_ROWS, num_faulty=0, port=free_port())
        first_list = recipe.pairs.each()[0]
        pairs = replace(first_list, max_pairs=NUM_ROWS, validation_prob=0.5, drawn=shapes)
        deadline_s = min(recipe.download.deadline_s, _DEADLINE_S)
        self._spared_s = recipe.download.deadline_s - deadline_s
        """How much longer a real run waits for a dead host."""
        download = replace(recipe.download, samples_per_shard=NUM_ROWS, retries=0, deadline_s=deadline_s)
        self.recipe = replace(recipe, workspace=str(folder), pairs=pairs, download=download)
        self._workspace = Workspace(str(folder))
        self._finished = {name: artifact for name, artifact in finished.items() if name in recipe.trained()}
        self._folder = folder
        self._watch = watch
        self._num_embedded = 0
        self.num_read = 0
        """Rows of the source that were read; repeated and damaged ones are no pairs."""
        self.num_pairs = 0
        """Rows of the pairs."""
        self.num_good = 0.0
        """Rows that the download brings, as far as some of them say."""
        self.pass_shares = dict[str, float]()
        """Share of its rows that a filter keeps, by step."""

    def artifact(self, name: str) -> Artifact:
        """The artifact of a step: finished, or rehearsed."""
        return self._finished.get(name) or self._workspace.artifact(name, "rehearsal")

    @cached_property
    def artifacts(self) -> dict[str, Artifact]:
        """The artifacts of all steps, by name."""
        return {name: self.artifact(name) for name in ("pairs", "download", "embed", *self.recipe.trained())}

    def rows(self, name: str) -> RowUnits | None:
        """Take a step that trains nothing; None if its time cannot be told from a few rows."""
        takes: dict[str, Callable[[], RowUnits | None]] = {
            "pairs": self.pairs,
            "download": self.download,
            "filter": self.filter,
            "embed": self.embed,
            "filter_embeddings": self.filter_embeddings,
            "index": self.index,
        }
        return takes[name]() if name in takes else None

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
        self.num_read, self.num_pairs = summary.counts["in"], summary.counts["ok"]
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
        all_rows = read_rows(Pairs(self.artifact("pairs")), _SHARD, config)
        hosts = LimitedHosts(config, [url or "" for url in all_rows.column("url").to_pylist()])
        names = [f"{_SHARD}.tar", f"{_SHARD}.parquet", f"{_SHARD}_stats.json"]
        rules = address_rules(self.recipe.pairs, config)
        with (
            _pictures(self.recipe),
            Downloader(config, rules, hosts) as downloader,
            contextlib.ExitStack() as stack,
        ):
            before_s = _processor_s()
            parts = self._fetch(downloader, hosts, all_rows)
            # With a local server, its time and the worker's are added: they share the cores.
            seconds = _processor_s() - before_s
            files = ShardFiles(*(stack.enter_context(output.write(name)) for name in names))
            counts = join_shard(all_rows, _SHARD, parts, [], files, config)
        if self.recipe.pairs.source != "drawn":
            # A real worker fetches rows of the next shards meanwhile: a dead host holds up one connection alone.
            num_late = failure_causes([output.read_json(names[2])])["deadline"]
            busy_s = downloader.busy_s + num_late * self._spared_s
            seconds = max(seconds, busy_s / config.resources.num_connections)
        if counts["ok"] < min(_LEAST_ROWS, counts["in"]):
            raise DataError(
                f"download: {counts['ok']} of {counts['in']} rows came through, too few to measure with; "
                "look at the list and at the network"
            )
        statuses = read_table(output.path(names[1]), ["status"]).column("status").to_pylist()
        self.num_good = hosts.num_good([status == SUCCESS for status in statuses])
        self._commit(output, dict(counts), names)
        row_s = seconds / counts["in"]
        unshared_s = hosts.row_s() - row_s / config.resources.num_workers
        return RowUnits(row_s=row_s, unshared_row_s=max(0.0, unshared_s))

    def _fetch(self, downloader: Downloader, hosts: LimitedHosts, all_rows: pa.Table) -> list[ShardFiles]:
        """Download the rows of ``hosts``, and others while some come through, but too few; returns parts of a shard.

        Which rows come is settled by the list: another try would bring the same ones.
        """
        parts, counts, waited_s = list[ShardFiles](), Counter[str](), 0.0
        while (first := counts["in"]) < len(hosts.rows):
            rows, wait_s = all_rows.take(pa.array(hosts.rows[first:], pa.int64())), hosts.wait_s - waited_s
            waited_s += wait_s
            if wait_s >= _LONG_S:
                rate = self.recipe.download.resources.max_rate_per_host
                self._watch(f"download of {rows.num_rows} rows: {duration(wait_s)}, at {rate:g}/s from a host")
            names = (f"part-{first}{suffix}" for suffix in (".tar", ".parquet", "_stats.json"))
            parts.append(ShardFiles(*(self._folder / name for name in names)))
            counts.update(downloader.download(rows, _SHARD, parts[-1], first=first))
            num_missing = _LEAST_ROWS - counts["ok"]
            if counts["ok"] and num_missing > 0:  # if none came, others are no likelier to
                others = min(counts["in"], math.ceil(num_missing * counts["in"] / counts["ok"]))
                hosts.choose(counts["in"] + others)
        return parts

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
        counts = write_pairs(replace(source, config=few), output).counts  # first, because it loads the tokenizer
        self.num_read, self.num_pairs = counts["in"], counts["ok"]
        start = time.perf_counter()
        summary = write_pairs(replace(source, config=whole), self.artifact(_WHOLE_PAIRS))
        seconds = fetched_s + time.perf_counter() - start
        return RowUnits(row_s=seconds / summary.counts["in"])

    def _take_in(self, output: Artifact) -> RowUnits:
        """Take in the first tar whole, and the rows of it that the rehearsal has."""
        tar, fetched_s = self._first_tar
        whole, few = (Pairs(self.artifact(name)).part(_SHARD) for name in (_WHOLE_PAIRS, "pairs"))
        with Measures(self.recipe.download) as measures:
            start = time.perf_counter()
            take_in(tar, whole, _SHARD, self.artifact("download-of-a-tar"), measures)
            seconds = fetched_s + time.perf_counter() - start
            taken_in = take_in(tar, few, _SHARD, output, measures)
        output.learn(taken_in.files)
        self.num_good = taken_in.counts["ok"]
        if not self.num_good:
            raise DataError(f"download: {tar}: no picture of its first {few.num_rows} samples can be decoded")
        self._commit(output, taken_in.counts, list(taken_in.files))
        return RowUnits(row_s=seconds / max(1, whole.num_rows))

    def filter(self) -> RowUnits:
        """Measure and label the rows by themselves; the search for duplicates is not part of the time.

        All rows of the rehearsal stay for the other steps.

        Raises:
            ConfigError: If a rule cannot be applied.
        """
        config, output, download = self.recipe.filter, self.artifact("filter"), self.artifact("download")
        assert config is not None
        clock = self._clock("cpu", config.resources.cpus_per_worker)
        start = clock.now()
        rules = RowRules(config)
        loaded = clock.now()
        measures = rules(lambda: download.path(f"{_SHARD}.tar"), download.path(f"{_SHARD}.parquet"), _SHARD)
        return self._label("filter", output, measures, clock, start, loaded)

    def filter_embeddings(self) -> RowUnits | None:
        """Score and label the rows by themselves, as ``filter``; None with semantic duplicates.

        The comparisons of these grow faster than the rows.

        Raises:
            ConfigError: If the weights of a head cannot be used.
        """
        config, output = self.recipe.filter_embeddings, self.artifact("filter_embeddings")
        assert config is not None
        if config.max_similarity < 1:
            return None
        clock = self._clock(config.resources.accelerator, config.resources.cpus_per_worker)
        path = self.artifact("embed").path(f"{_SHARD}.parquet")
        start = clock.now()
        rules = ScoreRules(config, int(read_schema(path).field("z_image").type.list_size))
        loaded = clock.now()
        measures = rules(path)
        table = read_table(path, read_names(path))
        with output.write(f"{_SHARD}.parquet") as copy:
            write_embeddings([table], copy, table.schema)
        units = self._label("filter_embeddings", output, measures, clock, start, loaded)
        self.pass_shares["filter_embeddings"] *= config.clip_score_share
        return units

    def _label(
        self, name: str, output: Artifact, measures: pa.Table, clock: Clock, start: float, loaded: float
    ) -> RowUnits:
        """Write the labels of measured rows, set ``pass_shares``; returns the times since ``start`` and ``loaded``."""
        with output.write(f"{_SHARD}.arrow") as path:
            write_table(measures, path)
        with output.write(label_file(_SHARD)) as path:
            counts, _ = write_labels(map_table(output.path(f"{_SHARD}.arrow")), (), path, where=name)
        self.pass_shares[name] = counts.get("ok", 0) / max(1, counts["in"])
        return RowUnits(row_s=(clock.now() - loaded) / max(1, counts["in"]), fixed_s=loaded - start)

    def embed(self) -> RowUnits:
        """Embed the rows, or take over a few of those that others have embedded."""
        if self.recipe.embed.import_from:
            return self._import()
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
        self._num_embedded = result.counts["ok"]
        return RowUnits(row_s=(done - loaded) / result.counts["in"], fixed_s=loaded - start)

    def _import(self) -> RowUnits:
        """Take over rows of the first part of ``import_from``: many for the time, few for the other steps."""
        parts = [part for part in find_parts(Path(self.recipe.embed.import_from)) if part.num_rows]
        if not parts:
            raise DataError(f"embed: {self.recipe.embed.import_from}: no rows")
        clock = self._clock("cpu", self.recipe.embed.resources.cpus_per_worker)
        row_s = 0.0
        for count, output in ((_IMPORTED_ROWS, self.artifact("embed-of-a-slice")), (NUM_ROWS, self.artifact("embed"))):
            part, name = _first_rows(parts[0], count, self._folder), f"{_SHARD}.parquet"
            start = clock.now()
            with output.write(name) as path:
                counts, _ = import_part(part, 0.5, path)
            self._commit(output, dict(counts), [name])
            row_s = row_s or (clock.now() - start) / part.num_rows
            self._num_embedded = counts["ok"]
        return RowUnits(row_s=row_s)

    def index(self) -> RowUnits:
        """Build the index; the kinds for many rows take longer for each row than the one that these few get."""
        config = self.recipe.index
        clock = self._clock("cpu", config.resources.cpus_per_worker)
        seconds = clock.time(
            lambda: build_index(self.artifact("embed"), self.artifact("index"), config, seed=self.recipe.seed)
        )
        return RowUnits(row_s=seconds / max(1, self._num_embedded))

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

    def training(self, name: str, process_s: float = 0.0) -> TrainingUnits:
        """Take a few steps of a training and write its artifact; a pretrained CLIP only takes its shape.

        Args:
            name: Its step.
            process_s: Seconds in which a process starts.

        Raises:
            ConfigError: If the shape of a pretrained CLIP is not known on this machine.
        """
        clip = self.recipe.clip
        if name != "clip" or clip.source == "train":
            return RehearsedTraining(self.job(name)).units(process_s)
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


def _first_rows(part: NpyPart, most: int, folder: Path) -> NpyPart:
    """A part of no more than the first ``most`` rows of another one, with files in ``folder``."""
    with pq.ParquetFile(part.metadata) as file:
        table = pa.Table.from_batches([next(file.iter_batches(most))])
    paths = {kind: folder / f"{kind}-{most}.{'parquet' if kind == 'metadata' else 'npy'}" for kind in _KINDS}
    pq.write_table(table, paths["metadata"])
    for source, kind in ((part.img, "img"), (part.text, "text")):
        save_array(paths[kind], np.load(source, mmap_mode="r")[: table.num_rows])
    return replace(part, num_rows=table.num_rows, **paths)


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
