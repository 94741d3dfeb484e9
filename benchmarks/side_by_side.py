"""Times two programs alternately in one process, and writes the table and the JSON file of every benchmark."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Times of ours and theirs, measured alternately."""

    name: str
    ours_s: float
    """Median time of ours, in seconds."""
    theirs_s: float
    """Median time of theirs, in seconds."""
    ratio: float
    """Median of theirs / ours over the rounds: above 1, ours is quicker."""
    low: float
    """Lower quartile of that ratio."""
    high: float
    """Upper quartile of that ratio."""
    floor: float
    """The required ratio."""
    rounds: int


def compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, floor: float
) -> Comparison:
    """Time both alternately, after one warm-up call of each; the order changes every round."""
    ours()
    theirs()
    times: list[tuple[float, float]] = []
    for number in range(rounds):
        pair = [0.0, 0.0]
        for who in ((0, 1), (1, 0))[number % 2]:
            start_s = time.perf_counter()
            (ours, theirs)[who]()
            pair[who] = time.perf_counter() - start_s
        times.append((pair[0], pair[1]))
    return summarise(name, times, floor=floor)


def summarise(name: str, times: Sequence[tuple[float, float]], *, floor: float) -> Comparison:
    """What the times of ours and theirs, a pair for each round, say."""
    ratios = [b / a for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4) if len(times) > 1 else (ratios[0],) * 3
    return Comparison(
        name=name,
        ours_s=statistics.median(a for a, _ in times),
        theirs_s=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        floor=floor,
        rounds=len(times),
    )


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of one kind as text, a column for each key."""
    names = list(rows[0])
    cells = [names, *([f"{row[n]:.4g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def publish(name: str, rows: Sequence[Comparison | dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Print the table, write ``results/<name>.json`` and return its path."""
    tables = [asdict(row) if isinstance(row, Comparison) else row for row in rows]
    print_table(tables)
    document = {
        "benchmark": name,
        "settings": settings,
        "rows": tables,
        "machine": {"processor": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads()},
        "versions": {
            package: number for package in ("torch", "diffusers", "dalle2-pytorch") if (number := _version(package))
        },
        "created_s": int(time.time()),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
