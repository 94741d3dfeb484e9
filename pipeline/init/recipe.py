"""``unclip init``: look at a person's pairs and write a short recipe for them and for this machine."""

import os
import tomllib
from pathlib import Path

from pipeline.data.folders import PICTURE_SUFFIXES
from pipeline.data.lists import list_columns, list_files
from pipeline.data.pairs import PairsSummary, source_batches
from pipeline.errors import ConfigError, DataError
from pipeline.init.fit import Fit, Watch, fit
from pipeline.init.sizes import (
    CPU_SIZES,
    GPU_SIZES,
    MOST_CPU_STEPS,
    MOST_GPU_STEPS,
    Size,
    Tables,
    as_toml,
    cpu_tables,
    default_steps,
    gpu_tables,
)
from pipeline.recipe.estimate import save_times
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.sections import PairsConfig
from pipeline.workspace.store import Artifact

_URL_COLUMNS = ("url", "image_url", "img_url", "link", "image", "src")
_CAPTION_COLUMNS = ("caption", "text", "title", "description", "alt_text", "alt", "prompt", "top_caption")


def write_recipe(
    source: str,
    out: str,
    *,
    url_column: str = "",
    caption_column: str = "",
    force: bool = False,
    gpu: bool | None = None,
    minutes: float | None = None,
    watch: Watch = lambda _what: None,
) -> str:
    """Write a recipe for a list of URLs and captions, or for a folder of pictures.

    Args:
        source: The list or the folder.
        out: Recipe file to write.
        url_column: Column of the URLs; empty: searched by name.
        caption_column: Column of the captions; empty: searched by name.
        force: Replace ``out`` if it is there.
        gpu: Whether this machine trains on a GPU; None: look for one.
        minutes: Time that the whole run may take on this machine, which is measured; None: it depends on the pairs.
        watch: Called with what is measured next.

    Returns:
        A summary of the pairs, for a person.

    Raises:
        ConfigError: If ``out`` exists or its folder does not, or a column is not found (it names the existing ones), or
            the minutes are too few for anything useful.
        DataError: If the source cannot be read, or holds no pair.
        StepError: If ``out`` cannot be written.
    """
    target = Path(out)
    _require_free(target, source, force=force)
    pairs, kind = _look_at(source, url_column, caption_column)
    num_pairs = sum(batch.num_rows for batch in source_batches(pairs, PairsSummary()))
    if num_pairs == 0:
        raise DataError(f"{source}: holds no pairs")
    on_gpu = Path("/proc/driver/nvidia/version").exists() if gpu is None else gpu
    machine = "one GPU" if on_gpu else f"{os.cpu_count()} CPU cores"
    sized_for = machine if minutes is None else f"{machine} and {minutes:g} minutes"
    # A comment cannot hold a line end, but a file's name can.
    header = f"{source}: {num_pairs} pairs, sized for {sized_for}. `unclip config {out}` prints every field."
    comment = "".join(letter if letter.isprintable() else "?" for letter in header)

    def text(size: Size, steps: int) -> str:
        return f"# {comment}\n" + as_toml(_tables(target.stem, pairs, num_pairs, size, steps))

    def recipe(size: Size, steps: int) -> Recipe:
        return parse_recipe(tomllib.loads(text(size, steps)), where=out)

    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    chosen = Fit(sizes[0], default_steps(num_pairs, gpu=on_gpu))
    if minutes is not None:
        from pipeline.timing.measure import measure

        most_steps = MOST_GPU_STEPS if on_gpu else MOST_CPU_STEPS
        chosen = fit(recipe, sizes, most_steps, minutes, lambda candidate: measure(candidate, {}, watch))
    checked = recipe(chosen.size, chosen.steps)
    Artifact(str(target.parent.resolve())).write_bytes(target.name, text(chosen.size, chosen.steps).encode())
    if chosen.times:
        save_times(checked, chosen.times, chosen.crowding)
    return f"{num_pairs} {kind}; sized for {sized_for}: {chosen.size.text}, {chosen.steps} steps"


def _require_free(target: Path, source: str, *, force: bool) -> None:
    """Refuse a recipe file that cannot be written."""
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; choose another --out, or replace it with --force")
    for name in (source, str(target)):
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ConfigError(f"{name!r}: this name is not UTF-8, but a recipe must be; rename the file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it, or choose another --out")


def _look_at(source: str, url_column: str, caption_column: str) -> tuple[PairsConfig, str]:
    """The pairs section of a source, and what it holds, for a person."""
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"{source}: no such list or folder")
    if path.is_dir() and any(file.suffix.lower() in PICTURE_SUFFIXES for file in path.rglob("*")):
        return PairsConfig(source="folder", path=str(path)), "pictures in a folder"
    names = list_columns(list_files(path)[0])
    url = _find_column(names, url_column, _URL_COLUMNS, source, "--url-column")
    caption = _find_column(names, caption_column, _CAPTION_COLUMNS, source, "--caption-column")
    pairs = PairsConfig(source="list", path=str(path), url_column=url, caption_column=caption)
    return pairs, f"rows (url: {url}, caption: {caption})"


def _find_column(names: list[str], requested: str, defaults: tuple[str, ...], source: str, option: str) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    for candidate in (requested,) if requested else defaults:
        if candidate in names:
            return candidate
        if candidate.lower() in by_lower:
            return by_lower[candidate.lower()]
    what = f"no column {requested}" if requested else f"none of the columns {', '.join(defaults)}"
    raise ConfigError(f"{source}: {what}; it has {', '.join(names) or 'none'}: name one with {option}")


def _tables(name: str, pairs: PairsConfig, num_pairs: int, size: Size, steps: int) -> Tables:
    validation_prob = 0.02 if num_pairs >= 1000 else 0.1
    columns = {"url_column": pairs.url_column, "caption_column": pairs.caption_column} if pairs.source == "list" else {}
    section = {"source": pairs.source, "path": pairs.path} | columns | {"validation_prob": validation_prob}
    on_gpu = size in GPU_SIZES
    sized = gpu_tables(num_pairs, steps) if on_gpu else cpu_tables(num_pairs, validation_prob, size, steps)
    return {"name": name, "workspace": f"workspace/{name}", "pairs": section} | sized
