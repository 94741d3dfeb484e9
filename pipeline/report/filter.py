"""The report's section about the rows that are left out: how many for each reason, with examples."""

from typing import Any

from pipeline.report.sections import Done, inline_entry
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

STEPS = ("filter", "filter_embeddings")
EXAMPLES = "examples.json"
REASONS = {
    "short_caption": "caption too short",
    "long_caption": "caption too long",
    "language": "another language",
    "small_image": "picture too small",
    "aspect_ratio": "picture too long and narrow",
    "watermark": "watermark",
    "nsfw": "unsafe, by the list's score",
    "nsfw_tag": "unsafe, by the list's tag",
    "faces": "too many faces",
    "similarity": "caption does not fit, by the list's score",
    "aesthetic": "aesthetic score of the list too low",
    "corrupt": "picture cannot be decoded",
    "duplicate": "the same file again",
    "near_duplicate": "nearly the same picture",
    "clip_score": "caption does not fit the picture",
    "clip_score_share": "caption fits less than those of the best rows",
    "aesthetic_head": "aesthetic score too low",
    "nsfw_head": "unsafe",
    "semantic_duplicate": "CLIP sees the same picture",
}
"""Reasons for people; a missing value of the list, ``no_<reason>``, follows from them."""


def filter_of(done: Done) -> Json | None:
    """Rows that stay, and those left out by reason, with examples; None if no filter step is done.

    The first filter's rows are those that stay after the last one, and those that one of the reasons leaves out; a
    picture that the embed step between them cannot decode is one of the reasons.
    """
    steps = [done[name] for name in STEPS if name in done]
    if not steps:
        return None
    counts: dict[str, int] = {}
    examples: dict[str, list[Json]] = {}
    between = [done["embed"]] if len(steps) == 2 and "embed" in done else []
    for finished in (*steps, *between):
        for reason, count in finished.manifest.counts.items():
            counts[reason] = counts.get(reason, 0) + (count if reason not in {"in", "ok"} else 0)
    for finished in steps:
        for reason, entries in _examples(finished.artifact).items():
            examples.setdefault(reason, []).extend(entries)
    most = max(counts.values(), default=1)
    rows: list[Json] = [
        {
            "title": title_of(reason),
            "reason": reason,
            "count": count,
            "share": count / most,
            "examples": examples.get(reason, []),
        }
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]
    return {
        "total": steps[0].manifest.counts["in"],
        "ok": steps[-1].manifest.counts["ok"],
        "rows": rows,
    }


def title_of(reason: str) -> str:
    """The reason for people."""
    if reason.startswith("no_"):
        return f"no value for: {REASONS.get(reason[3:], reason[3:])}"
    return REASONS.get(reason, reason)


def _examples(artifact: Artifact) -> dict[str, list[Json]]:
    if not artifact.exists(EXAMPLES):
        return {}
    examples: dict[str, list[Json]] = artifact.read_json(EXAMPLES)["examples"]
    return {reason: [inline_entry(artifact, entry) for entry in entries] for reason, entries in examples.items()}
