"""The URL list of the demo: good pictures, and a few URLs that fail in each way that a real list does.

A good URL is BASE/{seed}/{image_px}/{index}.png and a faulty one BASE/faulty/{kind}/{index}.png; ``server.py`` answers
both from the URL alone. The list is a function of the arguments, so that it can be written again, byte for byte.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError
from pipeline.shapes.captions import training_caption
from pipeline.shapes.scene import Scene, training_scene

FAULTS: dict[str, str] = {
    "missing": "404, a dead link",
    "slow": "accepts the request and says nothing for half a minute",
    "corrupt": "a JPEG cut off in its header",
    "html": "200, a page of text with the name of a picture",
    "broken": "500, a server in trouble",
    "refused": "nobody listens at the address (port 1)",
    "drip": "sends four bytes a second, which outwits a timeout per read, and hangs up unfinished after 20 s",
}
"""Kinds of faulty URLs, and what each does."""
MIN_IMAGE_PX, MAX_IMAGE_PX = 16, 1024

_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("index", pa.int64()),
        ("num_objects", pa.int8()),
        *((f"{name}_{i}", pa.string()) for i in (1, 2) for name in ("size", "colour", "shape")),
        ("relation", pa.string()),
        ("background", pa.string()),
    ]
)


def training_pairs(num_pairs: int, seed: int) -> Iterator[tuple[int, Scene, str]]:
    """Yield (index, scene, caption) of training pairs 0 .. num_pairs - 1, each a function of (seed, index) alone."""
    for index in range(num_pairs):
        scene = training_scene(seed, index)
        yield index, scene, training_caption(scene, seed, index)


def url_table(
    base_url: str, num_pairs: int, seed: int, image_px: int = 128, faults: Mapping[str, int] | None = None
) -> pa.Table:
    """List the URLs and captions of training pairs, with faulty URLs strewn among them.

    Args:
        base_url: Where the pictures will be served, such as "http://127.0.0.1:8765".
        num_pairs: How many good pairs; >= 1.
        seed: Seed of the pairs, and of the places of the faulty URLs.
        image_px: Side of the pictures, in pixels, from 16 to 1024.
        faults: Kind (a key of FAULTS) -> how many besides the good pairs.

    Returns:
        Rows with url, caption, index of the pair and its attributes (those of a second object are null where there is
        none); the pairs' indices are 0 .. num_pairs - 1, and those of the faulty rows, which have captions too, follow.

    Raises:
        ConfigError: If a kind is unknown or a number is out of range.
    """
    faults = faults or {}
    _refuse_bad_numbers(num_pairs, image_px, faults)
    kinds = [kind for kind, count in faults.items() for _ in range(count)]
    num_rows = num_pairs + len(kinds)
    rng = np.random.default_rng((seed, 2))
    faulty_places = set(rng.choice(num_rows, size=len(kinds), replace=False).tolist())
    good, faulty = iter(range(num_pairs)), iter(range(num_pairs, num_rows))
    rows: list[dict[str, str | int | None]] = []
    for place in range(num_rows):
        if place in faulty_places:
            index = next(faulty)
            url = _faulty_url(base_url, kinds[index - num_pairs], index)
        else:
            index = next(good)
            url = f"{base_url}/{seed}/{image_px}/{index}.png"
        rows.append({"url": url, "index": index, **_columns(seed, index)})
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def write_url_list(
    path: Path, base_url: str, num_pairs: int, seed: int, image_px: int = 128,
    faults: Mapping[str, int] | None = None,
) -> int:  # fmt: skip
    """Write ``url_table`` as Parquet and return its number of rows."""
    table = url_table(base_url, num_pairs, seed, image_px, faults)
    pq.write_table(table, path)
    return table.num_rows


def _refuse_bad_numbers(num_pairs: int, image_px: int, faults: Mapping[str, int]) -> None:
    if num_pairs < 1:
        raise ConfigError(f"pairs: num_pairs must be at least 1, not {num_pairs}")
    if not MIN_IMAGE_PX <= image_px <= MAX_IMAGE_PX:
        raise ConfigError(f"pairs: image_px must be from {MIN_IMAGE_PX} to {MAX_IMAGE_PX}, not {image_px}")
    for kind, count in faults.items():
        if kind not in FAULTS:
            raise ConfigError(f"pairs: unknown kind of faulty URL {kind!r}; choose from {', '.join(FAULTS)}")
        if count < 0:
            raise ConfigError(f"pairs: the number of {kind!r} URLs must not be negative, as {count} is")


def _faulty_url(base_url: str, kind: str, index: int) -> str:
    host = "http://127.0.0.1:1" if kind == "refused" else base_url
    return f"{host}/faulty/{kind}/{index}.png"


def _columns(seed: int, index: int) -> dict[str, str | int | None]:
    scene = training_scene(seed, index)
    columns: dict[str, str | int | None] = {
        "caption": training_caption(scene, seed, index),
        "num_objects": len(scene.objects),
        "relation": scene.relation,
        "background": scene.background,
    }
    for i, item in enumerate(scene.objects, start=1):
        columns |= {f"size_{i}": item.size, f"colour_{i}": item.colour, f"shape_{i}": item.shape}
    return columns
