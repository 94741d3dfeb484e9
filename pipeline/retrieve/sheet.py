"""A contact sheet: the results of a search as one HTML page that needs no other file and no network."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from pipeline.errors import DataError, StepError
from pipeline.pictures.frame import thumbnail
from pipeline.pictures.read import decode, read_file
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.queries import Query
from pipeline.retrieve.retriever import Results
from pipeline.retrieve.search import Searcher, SearchOptions
from pipeline.workspace.disk import translate_os_errors

_LARGEST_PX = 512
_SHOWN_AS_STORED_BYTES = 80_000
_QUERY_PX = 160
_THREADS = 8
"""Pictures of an object store take some requests each: of 40 one after another, seconds."""
_SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"RIFF": "webp"}
"""First bytes of the stored formats that every browser shows."""


@dataclass(frozen=True)
class SheetText:
    """What a page says beside its results."""

    name: str
    """Name of the recipe."""
    command: str
    """A command that searches by the uid that follows it."""


def write_sheet(
    path: Path,
    text: SheetText,
    queries: Sequence[Query],
    options: SearchOptions,
    results: Results,
    searcher: Searcher,
) -> list[str]:
    """Write the page of a search.

    Args:
        path: HTML file to write.
        text: What to say beside the results.
        queries: What was searched for.
        options: How it was searched for.
        results: The neighbours.
        searcher: Where they come from, with their pictures.

    Returns:
        For each picture that cannot be read, why; its place on the page says so.

    Raises:
        StepError: If the file cannot be written.
    """

    def read(neighbour: Neighbour) -> tuple[dict[str, Any], list[str]]:
        try:
            data = searcher.retriever.picture(neighbour)
            return _picture(data, f"shard {neighbour.shard}: key {neighbour.key}: uid {neighbour.uid}"), []
        except (DataError, StepError) as error:  # it is damaged, or its store does not answer
            return {}, [str(error)]

    with ThreadPoolExecutor(_THREADS) as threads:
        pictures = list(threads.map(read, results.neighbours))
    tiles, problems = list[dict[str, Any]](), list[str]()
    scores = [neighbour.similarity for neighbour in results.neighbours]
    for rank, (neighbour, (picture, problem)) in enumerate(zip(results.neighbours, pictures, strict=True), 1):
        level = _level(neighbour.similarity, scores)
        tiles.append(_tile(neighbour) | {"rank": rank, "level": level} | picture)
        problems += problem
    view = {
        "name": text.name,
        "command": text.command,
        "queries": [_query(query) for query in queries],
        "facts": _facts(options, results, searcher.retriever.index.num_rows),
        "shortage": results.shortage(options.k),
        "tiles": tiles,
    }
    environment = Environment(
        loader=PackageLoader("pipeline.retrieve", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("sheet.html").render(view)
    with translate_os_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".tmp-{path.name}")
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(path)
    return problems


def _facts(options: SearchOptions, results: Results, num_rows: int) -> list[str]:
    things = "pictures" if options.modality == "image" else "captions"
    facts = [f"{len(results.neighbours):,} nearest of {num_rows:,} {things}"]
    if options.where:
        facts.append(f"where {options.where}")
    if options.distinct is not None:
        facts.append(f"near-duplicates from {options.distinct:g} left out")
    return facts


def _tile(neighbour: Neighbour) -> dict[str, Any]:
    try:
        parts = urlsplit(neighbour.url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    is_link = parts.scheme in {"http", "https"}  # anything else, such as javascript:, is shown and cannot be clicked
    return {
        "caption": neighbour.caption,
        "score": f"{neighbour.similarity:.3f}",
        "url": neighbour.url,
        "place": host if is_link else neighbour.url,
        "is_link": is_link,
        "uid": neighbour.uid,
        "key": neighbour.key,
        "src": "",
        "aspect": 1.0,
    }


def _picture(data: bytes, where: str) -> dict[str, Any]:
    """Source and aspect ratio: the stored file if it is small and every browser shows it, else a small copy."""
    image = decode(data, where=where)
    kind = next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), "")
    if not kind or len(data) > _SHOWN_AS_STORED_BYTES:
        data, kind = _small_copy(image, _LARGEST_PX), "jpeg"
    return {"src": _uri(data, kind), "aspect": round(image.width / image.height, 4)}


def _query(query: Query) -> dict[str, Any]:
    source = _uri(_small_copy(read_file(query.value), _QUERY_PX), "jpeg") if query.kind == "image" else ""
    name = Path(query.value).name if query.kind in {"image", "embedding"} else query.value
    return {"kind": query.kind, "name": name, "weight": query.weight, "src": source}


def _small_copy(image: Image.Image, largest_px: int) -> bytes:
    buffer = io.BytesIO()
    thumbnail(image, largest_px).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _level(score: float, scores: Sequence[float]) -> int:
    """Where a similarity lies between the lowest and the highest, in percent."""
    lowest, highest = min(scores), max(scores)
    return round(100 * (score - lowest) / (highest - lowest)) if highest > lowest else 100
