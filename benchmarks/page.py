"""Prints docs/benchmarks.md from ``results/``: ``python -m benchmarks.page > docs/benchmarks.md``."""

import ast
import json
from pathlib import Path
from typing import Any

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
    "requests": "requests",
    "requests_sample": "requests",
    "overhead": "overhead",
    "emoji_search": "emoji",
    "emoji": "emoji",
}
"""Result file and the program that writes it."""
_HEAD = """# Benchmarks

Every measurement was made side by side in one run; its command repeats it. Ratios above 1 favour this
project, shares of memory below 1; `low` and `high` are the quartiles over the rounds. Seconds are those of one busy
machine; do not compare them with those of another. The page is written by `make docs` from `benchmarks/results/`.
"""


def main() -> None:
    """Print the page."""
    parts = [_HEAD]
    last_module = ""
    for name, module in MODULES.items():
        path = FOLDER / "results" / f"{name}.json"
        if not path.exists():
            continue
        if module != last_module:
            docstring = ast.get_docstring(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))) or ""
            title, _, rest = docstring.partition("\n")
            body = rest.strip("\n")  # its first lines are indented: a block of code in Markdown too
            parts.append(f"## {title.rstrip('.')}\n\n{body}\n")
            last_module = module
        document = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"{measured_with(document)}:\n\n{_table(document['rows'])}\n")
    print("\n".join(parts), end="")


def measured_with(document: dict[str, Any]) -> str:
    """The versions, the threads and, where the results name it, the device of a measurement."""
    versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
    device = document["settings"].get("device")
    threads = f"{document['machine']['threads']} thread(s)"
    return f"Measured with {versions}, {threads}{f', on {device}' if device else ''}"


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
