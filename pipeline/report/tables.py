"""``metrics.json`` as tables for people: each number with its name, interval, ceiling and floor."""

import math
from collections.abc import Callable
from typing import Any

from pipeline.recipe.steps import STEP_ROWS

Json = dict[str, Any]

NAMES = {
    "colour": "Colour",
    "both colours": "Both colours",
    "shape": "Shape",
    "both shapes": "Both shapes",
    "binding": "Colour on its shape",
    "binding, given both shapes": "Colour on its shape, given both shapes",
    "relation": "Relation",
    "relation, given which is which": "Relation, given which is which",
    "size": "Size",
    "sizes": "Both sizes",
    "background": "Background",
    "count": "Number of objects",
    "everything": "Everything",
}
"""Attributes of the pixel check as people read them, in the order of the tables."""
_COMPARED = ("colour", "shape", "size", "both colours", "both shapes", "binding", "relation", "sizes", "everything")
"""Attributes in the table of held-out and trained combinations."""
_LEAST_RANGE = 0.01
"""No bar is shown if floor and ceiling are nearer than this."""


def quality_groups(metrics: Json) -> list[Json]:
    """The pixel check, one table for each number of objects."""
    groups: list[Json] = []
    tables: Json = metrics.get("pixel_check", {})
    for title in sorted(tables):
        checks: Json = tables[title]
        rows: list[Json] = [
            {
                "name": NAMES.get(name, name),
                "generated": checks[name]["generated"],
                "real": checks[name].get("real"),
                "guess": checks[name].get("guess"),
            }
            for name in sorted(checks, key=rank)
            if checks[name]["generated"]["total"]
        ]
        for row in rows:
            rate = row["generated"]
            _, _, row["given"] = row["name"].partition(", ")
            row["of"] = f"{rate['hits']} of {rate['total']}" if row["given"] else ""
        if rows:
            total = rows[0]["generated"]["total"]
            groups.append({"title": f"{title.capitalize()}, {total} pictures", "rows": rows})
    return groups


def novelty_groups(metrics: Json) -> list[Json]:
    """Held-out beside trained combinations, one table for each number of objects: kinds are columns."""
    groups: list[Json] = []
    for title, kinds in sorted(metrics.get("held_out", {}).items()):
        first: Json = next(iter(kinds.values()))
        names = [name for name in sorted(first, key=rank) if name in _COMPARED]
        groups.append(
            {
                "title": f"{title.capitalize()}: new combinations",
                "kinds": [
                    {"name": kind, "total": checks["everything"]["held_out"]["total"]} for kind, checks in kinds.items()
                ],
                "rows": [
                    {
                        "name": NAMES[name],
                        "cells": [
                            {kind: checks[name][kind]["rate"] for kind in ("held_out", "trained")}
                            | checks[name]["difference"]
                            for checks in kinds.values()
                        ],
                    }
                    for name in names
                ],
            }
        )
    return groups


def failure_groups(groups: list[Json], metrics: Json) -> list[Json]:
    """Failed pictures with a heading for each group, and what is wrong with each picture in the words of the tables."""
    return [
        {
            "title": f"{group['title'].capitalize()}: {group['failed']} of {group['total']}{_of_real(group, metrics)}",
            "note": f"the first {len(group['pictures'])}" if len(group["pictures"]) < group["failed"] else "",
            "pictures": [
                picture | {"wrong": _fault_text(picture), "shows": picture.get("shows", "")}
                for picture in group["pictures"]
            ],
        }
        for group in groups
        if group["failed"]
    ]


def real_misjudged(metrics: Json) -> tuple[int, int]:
    """Real pictures of which CLIP prefers the negative, of how many; 0 of 0 if none was asked."""
    rate: Json = metrics.get("preference", {}).get("real") or {"hits": 0, "total": 0}
    return rate["total"] - rate["hits"], rate["total"]


def _of_real(group: Json, metrics: Json) -> str:
    """In how many real pictures CLIP does the same, where it is CLIP that judges."""
    misjudged, total = real_misjudged(metrics)
    is_judged = any("preferred" in picture for picture in group["pictures"])
    return f"; of real pictures {misjudged} of {total}" if is_judged and total else ""


def _fault_text(picture: Json) -> str:
    if "preferred" in picture:
        return f"CLIP prefers: {picture['preferred']}"
    return f"Wrong: {', '.join(NAMES[name].lower() for name in picture['wrong'])}"


def tiles_of(metrics: Json) -> list[Json]:
    """The four numbers at the top of the page."""
    checks: Json = metrics.get("pixel_check", {})
    tiles: list[Json] = []
    for group, name, label in (
        ("one object", "everything", "One object: everything"),
        ("two objects", "both colours", "Two objects: both colours"),
        ("two objects", "both shapes", "Two objects: both shapes"),
        ("two objects", "everything", "Two objects: everything"),
    ):
        rates: Json | None = checks.get(group, {}).get(name)
        if rates and rates["generated"]["total"]:
            note = f"real {_whole(rates.get('real'))}, guessed {_whole(rates.get('guess'))}"
            tiles.append(
                {"label": label, "value": f"{100 * rates['generated']['rate']:.1f}", "unit": "%", "note": note}
            )
    if tiles:
        return tiles
    for row in measure_rows(metrics)[:4]:
        note = ", ".join(f"{kind} {row[kind]}" for kind in ("ceiling", "floor") if row[kind])
        tiles.append({"label": row["name"], "value": row["value"], "unit": "", "note": note})
    return tiles


def prompts_about(metrics: Json) -> str:
    """What was sampled, as a sentence; empty where the metrics do not say."""
    count, in_file = metrics.get("num_prompts", 0), metrics.get("num_prompts_in_file", 0)
    cut = f": the first {count:,} of {in_file:,}, by evaluate.num_prompts" if in_file > count else ""
    return {
        "drawn": "Prompts whose combination of colour, shape and background, or of two objects, was never trained on.",
        "captions": "Captions of validation pictures, which were never trained on.",
        "training captions": "Captions of training pictures: there are no validation rows, so these were trained on.",
        "file": f"Prompts from your own file{cut}.",
    }.get(metrics.get("prompts", ""), "")


def rows_of(metrics: Json) -> str:
    """The rows on which each network was measured: validation, or training where there are no others."""
    return metrics.get("rows", "validation")


def measure_rows(metrics: Json) -> list[Json]:
    """The measures that need no scenes, each with its floor and its ceiling."""
    rows = [
        _row(
            metrics,
            "clip_score",
            ("generated", "real", "shuffled"),
            "CLIP score",
            "Cosine of a sample with its own prompt; ceiling: the real picture; floor: another prompt.",
        ),
        _row(
            metrics,
            "r_precision",
            ("generated", "real", "chance"),
            "R-precision",
            "Share of samples nearest to their own prompt, of all prompts; ceiling: the real picture; floor: chance.",
            percent=True,
        ),
        _row(
            metrics,
            "preference",
            ("generated", "real", "chance"),
            "Caption preferred",
            f"Share of samples that CLIP finds nearer to their caption than to the same words in another order; "
            f"ceiling: real pictures; floor: chance.{_without_negative(metrics)}",
            percent=True,
        ),
        _row(
            metrics,
            "frechet_clip",
            ("generated", "real", ""),
            "Frechet distance, CLIP features",
            "Samples against real pictures, lower is better; ceiling: two equal sets of real pictures.",
            ranged=False,
        ),
        _row(
            metrics,
            "frechet_features",
            ("generated", "", ""),
            "Frechet distance, own features",
            "The same on features of evaluate.features_path; with the usual Inception, the FID of this many pictures.",
            ranged=False,
        ),
        _row(
            metrics,
            "cmmd",
            ("generated", "real", ""),
            "CMMD",
            "Kernel distance on CLIP embeddings, times 1000, lower is better; ceiling: two sets of real pictures.",
            ranged=False,
        ),
        _row(
            metrics,
            "precision",
            ("generated", "real", ""),
            "Precision",
            "Share of samples among the real pictures' nearest neighbours in the CLIP space: how real they are.",
            percent=True,
        ),
        _row(
            metrics,
            "recall",
            ("generated", "real", ""),
            "Recall",
            "Share of real pictures among the samples' nearest neighbours in the CLIP space: how varied these are.",
            percent=True,
        ),
        *_prior(metrics, "prior", "Prior"),
        *_prior(metrics, "prior_2", "Prior 2"),
        _row(
            metrics,
            "decoder",
            ("reconstruction", "", "unrelated"),
            "Decoder: similarity of reconstructions",
            "Sampled from a true z_image and embedded by CLIP again; floor: another picture's z_image.",
        ),
        *(row for number in (1, 2) for row in _upsampler(metrics, number)),
        *(
            _row(
                metrics,
                "bits_per_dim",
                (name, "", ""),
                f"{STEP_ROWS[name].title}: bits per dimension",
                f"Bound on -log2 of the probability of a {rows_of(metrics)} picture, per pixel and colour; lower is "
                "better.",
                ranged=False,
            )
            for name in metrics.get("bits_per_dim", {})
        ),
        _row(
            metrics,
            "memorisation",
            ("generated", "real", ""),
            "Nearest training picture",
            f"Similarity of each sample to its nearest training picture; {_unseen_about(metrics)}.",
            ranged=False,
        ),
        _row(
            {"memorised": {"generated": metrics.get("memorisation", {}).get("closer_than_real")}},
            "memorised",
            ("generated", "", ""),
            "Memorisation rate",
            "Share of samples closer to a training picture than 95 % of real, unseen pictures are; of real ones 5 %.",
            percent=True,
        ),
    ]
    return [row for row in rows if row is not None]


def rank(name: str) -> tuple[int, str]:
    """Place of an attribute in the tables."""
    names = list(NAMES)
    return (names.index(name) if name in names else len(names), name)


def _row(
    metrics: Json,
    key: str,
    kinds: tuple[str, str, str],
    name: str,
    why: str,
    *,
    percent: bool = False,
    ranged: bool = True,
) -> Json | None:
    measured = metrics.get(key, {})
    value, ceiling, floor = (_number(measured.get(kind)) for kind in kinds)
    if value is None:
        return None
    place = None
    if ranged and ceiling is not None and floor is not None and ceiling > floor + _LEAST_RANGE:
        place = (value - floor) / (ceiling - floor)
    texts = ["" if number is None else _text(number, percent=percent) for number in (value, ceiling, floor)]
    ends = [measured[kinds[0]].get(end) for end in ("low", "high")] if isinstance(measured[kinds[0]], dict) else []
    interval = (
        " - ".join(_text(end, percent=percent).removesuffix(" %") for end in ends) if ends and None not in ends else ""
    )
    row = {"name": name, "why": why, "value": texts[0], "ceiling": texts[1], "floor": texts[2], "place": place}
    return row | {"interval": interval}


def _without_negative(metrics: Json) -> str:
    """How many captions cannot be reordered, as a sentence."""
    rate: Json | None = metrics.get("preference", {}).get("generated")
    return f" {rate['without_negative']} captions have no such order." if rate and rate["without_negative"] else ""


def _unseen_about(metrics: Json) -> str:
    if "real" in metrics.get("memorisation", {}):
        return "ceiling: the same for real, unseen pictures"
    return "no ceiling: there are no validation rows, so no real picture is unseen"


def _prior(metrics: Json, key: str, title: str) -> list[Json | None]:
    kind = metrics.get(key, {}).get("kind", "")
    title = f"{title} ({kind})" if kind else title
    return [
        _row(
            metrics,
            key,
            ("z_image", "", "unrelated_image"),
            f"{title}: to z_image",
            f"Cosine to the true z_image of {rows_of(metrics)} captions; floor: the z_image of another picture.",
        ),
        _row(
            metrics,
            key,
            ("z_text", "true_z_text", "unrelated_text"),
            f"{title}: to z_text",
            "Cosine to z_text; ceiling: the true z_image with its own caption; floor: another caption.",
        ),
    ]


def _upsampler(metrics: Json, number: int) -> list[Json]:
    """Similarity to the real picture, and sharpness; the floor is bicubic enlargement."""
    measured = metrics.get(f"upsampler_{number}", {})
    about = f"{rows_of(metrics).capitalize()} pictures shrunk and enlarged again; floor: bicubic enlargement."
    rows: list[Json] = []
    for key, name, why in (
        ("psnr_db", "PSNR", about),
        ("ssim", "SSIM", about),
        ("sharpness", "sharpness", "Variance of the Laplacian, in grey levels squared; ceiling: the real pictures."),
    ):
        value, bicubic = _number(measured.get(key)), _number(measured.get(f"bicubic_{key}"))
        if value is None or bicubic is None:
            continue
        real = _number(measured.get(f"real_{key}"))
        texts = ["" if one is None else _UPSAMPLER_TEXTS[key](one) for one in (value, real, bicubic)]
        row = {"name": f"Upsampler {number}: {name}", "why": why, "value": texts[0], "ceiling": texts[1]}
        rows.append(row | {"floor": texts[2], "place": None, "interval": ""})
    return rows


_UPSAMPLER_TEXTS: dict[str, Callable[[float], str]] = {
    "psnr_db": "{:.1f} dB".format,
    "ssim": "{:.3f}".format,
    "sharpness": "{:.0f}".format,
}


def _whole(rate: Json | None) -> str:
    return f"{100 * rate['rate']:.0f} %" if rate else "-"


def _number(value: Any) -> float | None:
    """The number itself, or that of a rate or a mean."""
    if isinstance(value, dict):
        value = value.get("rate", value.get("mean"))
    return None if value is None or not math.isfinite(value) else float(value)


def _text(number: float, *, percent: bool) -> str:
    if percent:
        return f"{100 * number:.1f} %"
    return f"{number:.3f}" if abs(number) >= 0.01 or number == 0 else f"{number:.2g}"
