"""Prints docs/benchmarks.md from ``results/``: ``python -m benchmarks.page > docs/benchmarks.md``."""

import ast
import json
import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FOLDER = Path(__file__).parent
MODULES = {
    "train_step": "train_step",
    "train_step_dalle2": "train_step_dalle2",
    "token_states": "token_states",
    "memory": "memory",
    "sharding": "sharding",
    "checkpoints": "checkpoints",
    "recovery": "recovery",
    "loop": "loop",
    "sampling": "sampling",
    "sampling_karlo": "sampling",
    "sampler_steps": "sampler_steps",
    "pairs": "pairs",
    "download": "download",
    "faults": "faults",
    "embed": "embed",
    "embeddings_io": "embeddings_io",
    "reader": "reader",
    "index": "index",
    "index_recall": "index",
    "index_memory": "index",
    "search": "search",
    "search_millions": "search",
    "serving": "serving",
    "serving_crowds": "serving_crowds",
    "serving_chain": "serving_chain",
    "serving_diffusers": "serving_diffusers",
    "serving_diffusers_gpu": "serving_diffusers",
    "refusals": "refusals",
    "gpu": "gpu",
    "gpu_memory": "gpu_memory",
    "ablations": "ablations",
    "combinations_demo": "combinations",
    "combinations_demo_hour": "combinations",
    "requests": "requests",
    "requests_sample": "requests",
    "overhead": "overhead",
    "forecast": "forecast",
    "emoji_search": "emoji",
    "emoji": "emoji",
}
"""Result file and the program that writes it."""
_HEAD = """# Benchmarks

Every measurement was made side by side in one run; its command repeats it, with the settings that stand in
brackets above its table. Ratios above 1 favour this project, shares of memory below 1; `low` and `high` are the
quartiles over the rounds. `holds` says whether a number keeps its floor: yes, no, or undecided, where its interval
reaches over the floor. Seconds are those of one busy machine; do not compare them with those of another. The page is
written by `make docs` from `benchmarks/results/`; what has no file there is "not measured yet", though docs/lab.md may
have single runs of it.
"""


@dataclass(frozen=True)
class _Bound:
    """What a column must keep to, in every table that has both columns."""

    values: tuple[str, ...]
    """The column; of several, the first that is not empty in a row."""
    limit: str
    """Column of the limit; a row without one has none."""
    keeps: Callable[[float, float], bool]
    """Whether a value keeps to a limit."""
    ends: tuple[str, ...] = ()
    """Columns with the ends of the interval that the value has over the rounds."""

    def verdict(self, row: Row) -> str:
        """Yes, no or undecided; empty if the row has no limit."""
        value = next((row[name] for name in self.values if row.get(name) is not None), None)
        if value is None or row.get(self.limit) is None:
            return ""
        values = [value, *(row[name] for name in self.ends if row.get(name) is not None)]
        kept = {self.keeps(one, row[self.limit]) for one in values}
        return "undecided" if len(kept) > 1 else "yes" if True in kept else "no"


_BOUNDS = (
    _Bound(("ratio", "ours"), "floor", operator.ge, ("low", "high")),
    _Bound(("over_target",), "floor", operator.ge),
    _Bound(("of_measured_peak",), "floor", operator.ge),
    _Bound(("of_diffusers_kept", "of_ddp", "of_smallest", "of_reference", "ratio", "off"), "at_most", operator.le),
    _Bound(("ratio",), "at_least", operator.ge),
    _Bound(("difference",), "least", operator.ge, ("low", "high")),
    _Bound(("ms_over_faiss",), "at_most", operator.le, ("low", "high")),
    _Bound(("share", "more_than_ray_s", "gb_for_100M_x_768", "ours"), "below", operator.lt),
    _Bound(("median_s",), "floor_s", operator.lt, ("most_s",)),
    _Bound(("hop_ms",), "floor_ms", operator.lt, ("low_ms", "high_ms")),
    _Bound(("above_bare_ms",), "above_bare_floor_ms", operator.lt),
    _Bound(("wall_ms",), "floor_ms", operator.lt, ("wall_ms_90",)),
    _Bound(("memory_mb",), "floor_mb", operator.lt),
)


def main() -> None:
    """Print the page."""
    parts = [_HEAD]
    last_module = ""
    for name, module in MODULES.items():
        if module != last_module:
            docstring = ast.get_docstring(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))) or ""
            title, _, rest = docstring.partition("\n")
            body = rest.strip("\n")  # its first lines are indented: a block of code in Markdown too
            parts.append(f"## {title.rstrip('.')}\n\n{body}\n")
            last_module = module
        path = FOLDER / "results" / f"{name}.json"
        if not path.exists():
            parts.append(f"`{name}`: not measured yet.\n")
            continue
        document = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"{measured_with(document)}:\n\n{_table(rows_of(name, document))}\n")
    print("\n".join(parts), end="")


def measured_with(document: dict[str, Any]) -> str:
    """The day, versions, threads, device and settings of a measurement, as far as its results name them."""
    versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
    created_s, device = document.get("created_s"), document["settings"].get("device")
    day = f" on {datetime.fromtimestamp(created_s, UTC):%Y-%m-%d}" if created_s else ""
    threads = f"{document['machine']['threads']} thread(s)"
    settings = "; ".join(
        text if name == "note" else f"{name} {text}"
        for name, value in document["settings"].items()
        if name not in {"device", "name", "threads"} and (text := _setting(value))
    )
    on = f", on {device}" if device else ""
    return f"Measured{day} with {versions}, {threads}{on}{f' ({settings})' if settings else ''}"


def _setting(value: Any) -> str:
    """A setting in words; empty if it is off, or holds measurements."""
    if value is False or isinstance(value, dict):
        return ""
    if isinstance(value, list):
        return "" if any(isinstance(one, float | dict) for one in value) else ", ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rows_of(name: str, document: dict[str, Any]) -> list[Row]:
    """The rows of a table; `holds` comes last in a table with limits."""
    rows: list[Row] = _LIMITS.get(name, lambda rows: rows)(document["rows"])
    verdicts = [[bound.verdict(row) for bound in _BOUNDS] for row in rows]
    if not any(map(any, verdicts)):
        return rows
    return [row | {"holds": _together(own)} for row, own in zip(rows, verdicts, strict=True)]


def _together(verdicts: list[str]) -> str:
    """The worst verdict of a row."""
    return next((one for one in ("no", "undecided", "yes") if one in verdicts), "")


def _download_limits(rows: list[Row]) -> list[Row]:
    """The ratio of the medians, with its quartiles over the rounds."""
    limited: list[Row] = []
    for row in rows:
        low, high, floor = None, None, None
        if row["round"] == "median":
            ratios = [one["ratio"] for one in rows if one["pictures"] == row["pictures"] and one["round"] != "median"]
            low, _, high = statistics.quantiles(ratios, n=4)
            floor = 1.5
        limited.append(row | {"low": low, "high": high, "floor": floor})
    return limited


def _sampler_limits(rows: list[Row]) -> list[Row]:
    """The best of at most 25 steps."""
    best = min((row for row in rows if row["steps"] <= 25), key=lambda row: row["of_reference"])
    return [row | {"at_most": 1.02 if row is best else None} for row in rows]


def _gpu_limits(rows: list[Row]) -> list[Row]:
    return [row | {"floor": {"decoder": 0.45, "prior": 0.5}[row["network"]]} for row in rows]


def _gpu_memory_limits(rows: list[Row]) -> list[Row]:
    return [row | {"at_least": 0.9, "at_most": 1.1} for row in rows]


_LIMITS: dict[str, Callable[[list[Row]], list[Row]]] = {
    "download": _download_limits,
    "sampler_steps": _sampler_limits,
    "gpu": _gpu_limits,
    "gpu_memory": _gpu_memory_limits,
}
"""Adds the floors that a module's text names to rows that do not have them."""


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(name, row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no" if name in {"holds", "equal"} else ""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
