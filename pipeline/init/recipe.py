"""``unclip init``: look at a person's pairs and write a short recipe for them and for this machine."""

import os
import tomllib
from pathlib import Path

from pipeline.data.folders import PICTURE_SUFFIXES
from pipeline.data.lists import list_columns, list_files
from pipeline.data.pairs import PairsSummary, source_batches
from pipeline.errors import ConfigError, DataError
from pipeline.init.sizes import Tables, as_toml, cpu_tables, gpu_tables
from pipeline.recipe.recipe import parse_recipe
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
) -> str:
    """Write a recipe for a list of URLs and captions, or for a folder of pictures.

    Args:
        source: The list or the folder.
        out: Recipe file to write.
        url_column: Column of the URLs; empty: searched by name.
        caption_column: Column of the captions; empty: searched by name.
        force: Replace ``out`` if it is there.
        gpu: Whether this machine trains on a GPU; None: look for one.

    Returns:
        A summary of the pairs, for a person.

    Raises:
        ConfigError: If ``out`` exists or its folder does not, or a column is not found; names the existing ones.
        DataError: If the source cannot be read, or holds no pair.
        StepError: If ``out`` cannot be written.
    """
    target, path = Path(out), Path(source)
    if target.exists() and not force:
        raise ConfigError(f"{out} exists; choose another --out, or replace it with --force")
    if not path.exists():
        raise ConfigError(f"{source}: no such list or folder")
    for name in (source, out):
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ConfigError(f"{name!r}: this name is not UTF-8, but a recipe must be; rename the file")
    if not target.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {target.parent}; make it, or choose another --out")
    is_folder = path.is_dir() and any(file.suffix.lower() in PICTURE_SUFFIXES for file in path.rglob("*"))
    if is_folder:
        pairs = PairsConfig(source="folder", path=str(path))
    else:
        names = list_columns(list_files(path)[0])
        url = _find_column(names, url_column, _URL_COLUMNS, source, "--url-column")
        caption = _find_column(names, caption_column, _CAPTION_COLUMNS, source, "--caption-column")
        pairs = PairsConfig(source="list", path=str(path), url_column=url, caption_column=caption)
    num_pairs = sum(batch.num_rows for batch in source_batches(pairs, PairsSummary()))
    if num_pairs == 0:
        raise DataError(f"{source}: holds no pairs")
    on_gpu = Path("/proc/driver/nvidia/version").exists() if gpu is None else gpu
    machine = "one GPU" if on_gpu else f"{os.cpu_count()} CPU cores"
    header = f"{source}: {num_pairs} pairs, sized for {machine}. `unclip config {out}` prints every field."
    # A comment cannot hold a line end, but a file's name can.
    comment = "".join(letter if letter.isprintable() else "?" for letter in header)
    text = f"# {comment}\n" + as_toml(_tables(target.stem, pairs, num_pairs, on_gpu=on_gpu))
    parse_recipe(tomllib.loads(text), where=out)
    Artifact(str(target.parent.resolve())).write_bytes(target.name, text.encode())
    kind = "pictures in a folder" if is_folder else f"rows (url: {pairs.url_column}, caption: {pairs.caption_column})"
    return f"{num_pairs} {kind}; sized for {machine}"


def _find_column(names: list[str], requested: str, defaults: tuple[str, ...], source: str, option: str) -> str:
    by_lower = {name.lower(): name for name in reversed(names)}
    for candidate in (requested,) if requested else defaults:
        if candidate in names:
            return candidate
        if candidate.lower() in by_lower:
            return by_lower[candidate.lower()]
    what = f"no column {requested}" if requested else f"none of the columns {', '.join(defaults)}"
    raise ConfigError(f"{source}: {what}; it has {', '.join(names) or 'none'}: name one with {option}")


def _tables(name: str, pairs: PairsConfig, num_pairs: int, *, on_gpu: bool) -> Tables:
    validation_prob = 0.02 if num_pairs >= 1000 else 0.1
    columns = {"url_column": pairs.url_column, "caption_column": pairs.caption_column} if pairs.source == "list" else {}
    section = {"source": pairs.source, "path": pairs.path} | columns | {"validation_prob": validation_prob}
    sized = gpu_tables(num_pairs) if on_gpu else cpu_tables(num_pairs, validation_prob)
    return {"name": name, "workspace": f"workspace/{name}", "pairs": section} | sized
