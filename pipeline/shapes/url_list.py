"""The URL list of the demo: good pictures, and a few faulty URLs of each kind that real lists contain.

A good URL is BASE/{seed}/{image_px}/{index}.png and a faulty one BASE/faulty/{kind}/{index}.png; ``server.py`` answers
both from the URL alone. The same arguments always give the same list.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.shapes.captions import training_caption
from pipeline.shapes.scene import training_scene

FAULTS: dict[str, str] = {
    "missing": "404, a dead link",
    "slow": "accepts the request and sends nothing for half a minute",
    "corrupt": "a JPEG that is cut off in its header",
    "html": "200, a page of text under the name of a picture",
    "broken": "500, a server error",
    "refused": "no server listens at the address (port 1)",
    "drip": "sends four bytes a second, so that no single read times out, and hangs up unfinished after 20 s",
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


def url_table(
    base_url: str, num_pairs: int, seed: int, image_px: int = 128, faults: Mapping[str, int] | None = None
) -> pa.Table:
    """List the URLs and captions of training pairs, with faulty URLs at random positions among them.

    Args:
        base_url: Address of the picture server, such as "http://127.0.0.1:8765".
        num_pairs: Number of good pairs; >= 1.
        seed: Seed of the pairs, and of the positions of the faulty URLs.
        image_px: Side of the pictures, in pixels, from 16 to 1024.
        faults: Kind (a key of FAULTS) -> number of faulty URLs, which are added to the good pairs.

    Returns:
        Rows with url, caption, index of the pair and its attributes (null for a second object that does not exist).
        Good pairs have the indices 0 .. num_pairs - 1, faulty rows the following ones; faulty rows have captions too.

    Raises:
        ConfigError: If a kind is unknown or a number is out of range.
    """
    faults = faults or {}
    _refuse_bad_numbers(num_pairs, image_px, faults)
    kinds = [kind for kind, count in faults.items() for _ in range(count)]
    num_rows = num_pairs + len(kinds)
    rng = np.random.default_rng((seed, 2))
    faulty_positions = set(rng.choice(num_rows, size=len(kinds), replace=False).tolist())
    good, faulty = iter(range(num_pairs)), iter(range(num_pairs, num_rows))
    rows: list[dict[str, str | int | None]] = []
    for position in range(num_rows):
        if position in faulty_positions:
            index = next(faulty)
            url = _faulty_url(base_url, kinds[index - num_pairs], index)
        else:
            index = next(good)
            url = f"{base_url}/{seed}/{image_px}/{index}.png"
        rows.append({"url": url, "index": index, **_columns(seed, index)})
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _refuse_bad_numbers(num_pairs: int, image_px: int, faults: Mapping[str, int]) -> None:
    if num_pairs < 1:
        raise ConfigError(f"pairs: num_pairs must be at least 1, not {num_pairs}")
    if not MIN_IMAGE_PX <= image_px <= MAX_IMAGE_PX:
        raise ConfigError(f"pairs: image_px must be from {MIN_IMAGE_PX} to {MAX_IMAGE_PX}, not {image_px}")
    for kind, count in faults.items():
        if kind not in FAULTS:
            raise ConfigError(f"pairs: unknown kind of faulty URL {kind!r}; choose from {', '.join(FAULTS)}")
        if count < 0:
            raise ConfigError(f"pairs: the number of {kind!r} URLs must not be negative, but is {count}")


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
