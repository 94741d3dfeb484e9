"""Choice of the prompts and rows that are sampled and measured; none was trained on if there are validation rows.

Rows are taken in the order of their uids. Uids are hashes, so this is a fixed random sample that does not depend on
the shards.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from pipeline.data.drawn import EVALUATION
from pipeline.data.shard_tables import read_groups, read_table
from pipeline.errors import DataError
from pipeline.retrieve.embedded import EmbeddedShards
from pipeline.retrieve.sample import read_rows
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import Object, Scene, trained_twins
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them
_ROW = "row"
_ROWS_AT_ONCE = 1 << 20
"""Rows whose columns are in memory together, if no shard has more: 100 bytes each, and a copy."""
_THREADS = 16  # an object store answers many requests at a time
Watch = Callable[[int, int], None]
"""Called with (shards whose rows were looked at, shards in all), every million rows or so."""


def unwatched(_done: int, _total: int, /) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, with the picture that it should give, if that is known."""

    text: str
    kind: str = ""
    """Which attributes make it new (drawn source), or empty."""
    scene: Scene | None = None
    """What the picture should show, for the pixel check (drawn source)."""
    row: "Row | None" = None
    """The picture whose caption it is (captions)."""


@dataclass(frozen=True)
class Row:
    """One embedded row."""

    uid: str
    key: str
    shard: str
    caption: str
    z_image: NDArray[np.float16]
    """(D,), length one."""
    z_text: NDArray[np.float16]
    """(D,), length one."""


@dataclass(frozen=True)
class Choice:
    """Rows of one split, in the order of their uids."""

    rows: tuple[Row, ...]
    captioned: tuple[Row, ...]
    """The first row of each caption."""
    split: str


@dataclass(frozen=True)
class _Shard:
    name: str
    start: int
    """The number of its first row through all shards."""
    num_rows: int

    @property
    def file(self) -> str:
        return f"{self.name}.parquet"


@dataclass(frozen=True)
class PromptSet:
    """All prompts of an evaluation, and where they come from."""

    prompts: tuple[Prompt, ...]
    source: str
    """``drawn``, ``captions`` (of validation rows), ``training captions`` (there are no validation rows), ``file``;
    ``trained`` for the twins of drawn prompts, of combinations that training shows."""
    num_in_file: int = 0
    """Prompts in the file, of which these are the first; 0: there is no file."""

    @cached_property
    def partners(self) -> tuple[int | None, ...]:
        """Another prompt for each, for the floor: the next one with as many objects; None if there is no other."""
        groups: dict[int, list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            groups.setdefault(len(prompt.scene.objects) if prompt.scene else 0, []).append(number)
        partners: dict[int, int | None] = {}
        for group in groups.values():
            for number, other in zip(group, group[1:] + group[:1], strict=True):
                partners[number] = None if other == number else other
        return tuple(partners[number] for number in range(len(self.prompts)))


def choose_prompts(
    path: str, pairs: Artifact, embed: Artifact, num_prompts: int, held_out: Choice | None = None
) -> PromptSet:
    """Choose the prompts to sample: from a file, else from the drawn source, else validation captions.

    Args:
        path: Text file with one prompt on each line; or empty.
        pairs: The pairs step.
        embed: The embed step.
        num_prompts: Most prompts; if there are fewer, all are taken. A caption is taken once, and an empty one only
            if there is no other.
        held_out: Its ``held_out_rows``, as many; None: they are read if the prompts are captions.

    Raises:
        DataError: If there is no prompt, or a file breaks its schema.
    """
    if path:
        texts = _read_lines(path)
        return PromptSet(tuple(Prompt(text) for text in texts[:num_prompts]), "file", len(texts))
    if pairs.exists(EVALUATION):
        return PromptSet(tuple(_read_scenes(pairs)[:num_prompts]), "drawn")
    held_out = held_out or held_out_rows(embed, num_prompts)
    prompts = tuple(Prompt(row.caption, row=row) for row in held_out.captioned or held_out.rows[:1])
    return PromptSet(prompts, "captions" if held_out.split == "validation" else "training captions")


def trained_prompts(prompts: Sequence[Prompt], seed: int) -> PromptSet:
    """The ``trained_twins`` of drawn prompts, in their order, to measure what a new combination costs."""
    scenes = trained_twins([prompt.scene for prompt in prompts if prompt.scene is not None], seed)
    return PromptSet(tuple(Prompt(canonical_caption(scene), scene=scene) for scene in scenes), "trained")


def held_out_rows(embed: Artifact, num_rows: int, watch: Watch = unwatched) -> Choice:
    """Validation rows, or training rows if there are no validation rows.

    Args:
        embed: The embed step.
        num_rows: Most rows.
        watch: See ``Watch``.

    Raises:
        DataError: If nothing is embedded, or a shard is damaged.
    """
    for split in ("validation", "train"):
        choice = choose_rows(embed, num_rows, split, watch)
        if choice.rows:
            return choice
    raise DataError(f"{embed.uri}: no rows: nothing was downloaded, or no picture could be read")


def choose_rows(embed: Artifact, num_rows: int, split: str, watch: Watch = unwatched) -> Choice:
    """The rows of a split whose uids come first, and the first row of each caption, at most ``num_rows`` of each."""

    def select(rows: pa.Table) -> pa.Table:
        return rows.take(pa.array(np.union1d(np.arange(min(num_rows, len(rows))), _of_captions(rows, num_rows))))

    places = _first_places(embed, split, ("key", "caption"), select, watch)
    if not places.num_rows:
        return Choice((), (), split)
    embedded, numbers = EmbeddedShards.open([embed]), places[_ROW].to_numpy()
    order = np.argsort(numbers)
    vectors = read_rows(embedded, dict.fromkeys(("z_image", "z_text"), numbers[order]))
    halves = {name: np.empty_like(values, np.float16) for name, values in vectors.items()}
    for name, values in vectors.items():
        halves[name][order] = values
    shards = [embedded.shards[shard][1] for shard in embedded.shard_of(numbers).tolist()]
    texts = (places[name].to_pylist() for name in ("uid", "key", "caption"))
    rows = [
        Row(uid, key, shard, caption, z_image, z_text)
        for uid, key, caption, shard, z_image, z_text in zip(*texts, shards, *halves.values(), strict=True)
    ]
    return Choice(tuple(rows[:num_rows]), tuple(rows[place] for place in _of_captions(places, num_rows)), split)


def first_images(embed: Artifact, num_rows: int, split: str, watch: Watch = unwatched) -> NDArray[np.float32]:
    """z_image of the ``num_rows`` rows of a split whose uids come first, (N, D), of length one, in their order."""
    numbers = _first_places(embed, split, (), lambda rows: rows.slice(0, num_rows), watch)[_ROW].to_numpy()
    if not len(numbers):
        return np.zeros((0, 0), np.float32)
    order = np.argsort(numbers)
    vectors = read_rows(EmbeddedShards.open([embed]), {"z_image": numbers[order]})["z_image"]
    return vectors[np.argsort(order)]


def _first_places(
    embed: Artifact, split: str, columns: Sequence[str], select: Callable[[pa.Table], pa.Table], watch: Watch
) -> pa.Table:
    """Columns of some rows of a split, in the order of their uids, and their numbers through all shards.

    Of each shard these columns alone are fetched, once; in memory are those of ``_ROWS_AT_ONCE`` rows.

    Args:
        embed: The embed step.
        split: The split.
        columns: Further columns of strings; null becomes empty.
        select: Chooses among rows in the order of their uids; what it leaves out of some rows is not in the result.
        watch: See ``Watch``.
    """
    names = ("uid", *columns)
    chosen = pa.schema([*((name, pa.large_string()) for name in names), (_ROW, pa.int64())]).empty_table()
    for parts in _read_runs(embed, split, names, watch):
        rows = pa.concat_tables([chosen, *parts])
        chosen = select(rows.sort_by([("uid", "ascending"), (_ROW, "ascending")]).combine_chunks())
    return chosen


def _read_runs(embed: Artifact, split: str, names: Sequence[str], watch: Watch) -> Iterator[list[pa.Table]]:
    """Columns of strings of all rows of a split, with their numbers: of as many shards together as rows allow.

    A shard may have any number of rows: an imported part has a million, and its captions 100 MB. A larger one is read
    by its row groups.
    """
    shards = list[_Shard]()
    start = 0
    for name, record in embed.shard_records().items():
        if not record.splits or record.splits.get(split):
            shards.append(_Shard(name, start, record.counts["ok"]))
        start += record.counts["ok"]

    def of_split(rows: pa.Table, start: int) -> pa.Table:
        texts = {name: pc.fill_null(rows[name].cast(pa.large_string()), "") for name in names}
        numbers = pa.array(np.arange(start, start + rows.num_rows))
        return pa.table(texts | {_ROW: numbers}).filter(pc.equal(rows["split"], split))

    def read(shard: _Shard) -> pa.Table:
        return of_split(read_table(embed.ranged(shard.file), ["split", *names], use_threads=False), shard.start)

    num_read = 0
    with ThreadPoolExecutor(_THREADS) as threads:
        for run in _runs_of(shards):
            if run[0].num_rows > _ROWS_AT_ONCE:
                start = run[0].start
                for rows in read_groups(embed.ranged(run[0].file), ["split", *names]):
                    yield [of_split(rows, start)]
                    start += rows.num_rows
            else:
                yield list(threads.map(read, run))
            num_read += len(run)
            watch(num_read, len(shards))


def _runs_of(shards: Sequence[_Shard]) -> Iterator[list[_Shard]]:
    """Consecutive shards whose rows are not too many together; one at least."""
    run, num_rows = list[_Shard](), 0
    for shard in shards:
        if run and num_rows + shard.num_rows > _ROWS_AT_ONCE:
            yield run
            run, num_rows = [], 0
        run.append(shard)
        num_rows += shard.num_rows
    if run:
        yield run


def _of_captions(rows: pa.Table, count: int) -> NDArray[np.int64]:
    """The places of the first row of each caption, ascending, at most ``count``; rows without a caption are none."""
    captions = pa.concat_arrays([pa.array([], pa.large_string()), *rows["caption"].chunks])
    has_text = np.flatnonzero(pc.not_equal(pc.utf8_trim_whitespace(captions), "").to_numpy(zero_copy_only=False))
    codes = captions.dictionary_encode().indices.to_numpy()
    _, firsts = np.unique(codes[has_text], return_index=True)
    return has_text[np.sort(firsts)][:count]


def _read_scenes(pairs: Artifact) -> list[Prompt]:
    path = pairs.path(EVALUATION)
    table = read_table(path, ["prompt", "kind", "scene"])
    prompts: list[Prompt] = []
    for number, row in enumerate(table.to_pylist()):
        try:
            scene = parse_scene(json.loads(row["scene"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: row {number}: column scene is not a scene ({error})") from None
        prompts.append(Prompt(row["prompt"], row["kind"], scene))
    if not prompts:
        raise DataError(f"{path}: no prompts")
    return prompts


def parse_scene(data: dict[str, Any]) -> Scene:
    """A scene from its JSON form (``dataclasses.asdict``)."""
    return Scene(tuple(Object(**item) for item in data["objects"]), data["background"], data.get("relation"))


def _read_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"evaluate.prompts_path {path}: cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"evaluate.prompts_path {path}: no prompts; write one on each line")
    return lines
