"""What docs/formats.md leaves out of the files that a workspace holds."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq

from tests.tiny.command import ROOT


def missing_from_the_page(workspace: Path) -> list[str]:
    """Files, columns and top fields of finished steps that the step's section does not name, as ``step/file: name``."""
    parts = re.split(r"^## (.+)\n", (ROOT / "docs/formats.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = {step: text for names, text in zip(parts[1::2], parts[2::2], strict=True) for step in names.split(", ")}
    missing = set[str]()
    for manifest in workspace.glob("*/*/manifest.json"):
        step = manifest.parents[1].name
        words = set(re.findall(r"[\w.]+", sections["Every step"] + sections.get(step, "")))
        for path in manifest.parent.rglob("*"):
            if path.is_file():
                name = re.sub(r"\d{5}", "NNNNN", path.relative_to(manifest.parent).as_posix())
                names = [*_names(path), name.partition("/")[0]]
                missing |= {f"{step}/{name}: {word}" for word in names if word not in words}
    return sorted(missing)


def _names(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pq.read_schema(path).names
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        return list(content) if isinstance(content, dict) else list({name: None for row in content for name in row})
    if path.suffix == ".jsonl":
        return list({name for line in path.read_text(encoding="utf-8").splitlines() for name in json.loads(line)})
    return []
