"""``ablation.json`` as tables for people: the numbers of the variants, and whether the paper's order holds."""

from itertools import pairwise
from typing import Any

from pipeline.evaluate.order import HOLDS, OPEN, PAPER_ORDER, REVERSED, VARIANTS
from pipeline.report.tables import NAMES, prompts_about, rank

Json = dict[str, Any]

_MEASURES = {"frechet_clip": "Frechet distance", "clip_score": "CLIP score", "r_precision": "R-precision"}
_ORDER = [VARIANTS[name].removesuffix(" as z_image") for name in PAPER_ORDER]


def ablation_rows(result: Json) -> list[Json]:
    """One row for each measure: its name, a text for each variant, and what can be guessed by the prior's."""
    variants: Json = {name: result["variants"][name] for name in VARIANTS if name in result["variants"]}
    rows: list[Json] = []
    for key, name in _MEASURES.items():
        if all(key in numbers for numbers in variants.values()):
            texts = {variant: _measure_text(key, numbers[key]) for variant, numbers in variants.items()}
            rows.append({"name": name, "texts": texts, "guess": ""})
    tables: Json = variants["prior"].get("pixel_check", {})
    for group in sorted(tables):
        for attribute in sorted(tables[group], key=rank):
            rates = {variant: numbers["pixel_check"][group].get(attribute) for variant, numbers in variants.items()}
            texts = {variant: _percent(rate["generated"]) if rate else "" for variant, rate in rates.items()}
            guess = _percent(tables[group][attribute]["guess"]) if "guess" in tables[group][attribute] else ""
            rows.append({"name": _name(f"{group}: {attribute}"), "texts": texts, "guess": guess})
    return rows


def order_rows(result: Json) -> list[Json]:
    """One row for each measure: the two comparisons of the paper's order, as texts with their verdicts."""
    return [
        {
            "name": _name(measure),
            "cells": [{"text": _difference_text(measure, cell), "verdict": cell["verdict"]} for cell in cells],
        }
        for measure, cells in _comparisons(result)
    ]


_FEW = 5
"""Most measures that a sentence names."""


def order_titles() -> list[str]:
    """The two comparisons of the paper's order."""
    return [f"{first} over {second}" for first, second in pairwise(_ORDER)]


def order_verdict(result: Json) -> list[str]:
    """Sentences: by which measures the paper's order holds, which leave it open, and which reverse it and how far."""
    named: dict[str, list[str]] = {HOLDS: [], OPEN: []}
    reversals: list[str] = []
    for measure, cells in _comparisons(result):
        verdicts = {cell["verdict"] for cell in cells}
        for title, cell in zip(order_titles(), cells, strict=True):
            if cell["verdict"] == REVERSED:
                reversals.append(f"{_name(measure)} reverses {title}: {_difference_text(measure, cell)}.")
        if REVERSED not in verdicts:
            named[HOLDS if verdicts == {HOLDS} else OPEN].append(_name(measure))
    head = f"The paper's order is {' over '.join(_ORDER)}."
    holds = f"It holds by {', '.join(named[HOLDS])}." if named[HOLDS] else "No measure shows the whole order."
    measures = ", ".join(named[OPEN])
    if len(named[OPEN]) > _FEW:
        measures = f"{len(named[OPEN])} measures, whose intervals more prompts (-n) would narrow"
    left = f"{result['num_prompts']} prompts leave it open by {measures}." if measures else ""
    return [text for text in (head, holds, *reversals, left) if text]


def format_ablation(result: Json) -> str:
    """Both tables and the verdict, for a terminal."""
    variants = [name for name in VARIANTS if name in result["variants"]]
    lines = [
        f"{'in place of z_image':<42}" + "".join(f"{VARIANTS[name]:>19}" for name in variants) + f"{'guessed':>10}"
    ]
    for row in ablation_rows(result):
        cells = "".join(f"{row['texts'][name]:>19}" for name in variants)
        lines.append(f"  {row['name']:<40}{cells}{row['guess']:>10}".rstrip())
    lines += ["", f"{'better by (95 %, bootstrap over prompts)':<42}" + "".join(f"{t:>40}" for t in order_titles())]
    for row in order_rows(result):
        cells = "".join(f"{cell['text'] + ' ' + cell['verdict']:>40}" for cell in row["cells"])
        lines.append(f"  {row['name']:<40}{cells}")
    about = prompts_about(result)
    return "\n".join([*lines, "", *([about] if about else []), *order_verdict(result)])


def _comparisons(result: Json) -> list[tuple[str, list[Json]]]:
    """Each measure with its two comparisons, in the order of the tables."""
    names = list(_MEASURES)

    def place(measure: str) -> tuple[int, str, tuple[int, str]]:
        group, _, attribute = measure.rpartition(": ")
        return (names.index(measure) if measure in names else len(names), group, rank(attribute))

    keys = [f"{first} over {second}" for first, second in pairwise(PAPER_ORDER)]
    return [(name, [result["order"][name][key] for key in keys]) for name in sorted(result["order"], key=place)]


def _name(measure: str) -> str:
    group, _, attribute = measure.rpartition(": ")
    return f"{group.capitalize()}: {NAMES[attribute].lower()}" if group else _MEASURES[measure]


def _measure_text(key: str, value: Any) -> str:
    if key == "r_precision":
        return _percent(value)
    return f"{value['mean']:.3f}" if key == "clip_score" else f"{value:.4f}"


def _difference_text(measure: str, cell: Json) -> str:
    scale, digits = (1, 4) if measure == "frechet_clip" else (1, 3) if measure == "clip_score" else (100, 1)
    difference, low, high = (f"{scale * cell[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    return f"{difference} ({low} to {high})"


def _percent(rate: Json) -> str:
    return f"{100 * rate['rate']:.1f}%"
