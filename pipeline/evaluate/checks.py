"""The rates of the pixel check: by attribute, with ceiling and floor, and for held-out beside trained combinations."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.metrics import Rate, difference_of, rate_of
from pipeline.evaluate.prompts import PromptSet
from pipeline.shapes.check import GIVEN, condition_of, guess_levels
from pipeline.shapes.scene import NOVELTIES, Scene, novelties

Json = dict[str, Any]
Flags = dict[str, bool]

_GROUPS = {1: "one object", 2: "two objects"}


def pixel_check(rows: Sequence[Json], prompts: PromptSet) -> Json:
    """Rates by number of objects and attribute: generated, real (the ceiling) and guess (the floor).

    The guess is the rate of the same pictures checked against other prompts or, where that says nothing, the mean of
    ``guess_levels``. ``binding, given both shapes`` and the like are the rates of GIVEN: among the pictures
    alone in which the other attribute is correct.

    Args:
        rows: One for each prompt: ``prompt_number``, ``check``, ``check_shuffled`` and, if there is a real picture,
            ``check_real``.
        prompts: All prompts; those without a scene are left out.
    """
    tallies: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        scene = prompts.prompts[row["prompt_number"]].scene
        if scene is None:
            continue
        right, real = parse_flags(row["check"]) or {}, parse_flags(row.get("check_real")) or {}
        guesses = (parse_flags(row["check_shuffled"]) or {}) | guess_levels(right, scene)
        table = tallies.setdefault(group_of(scene), {name: {} for name in sorted(right)})
        for kind, flags, condition in (("generated", right, right), ("real", real, real), ("guess", guesses, right)):
            for name, value in _with_conditions(flags, condition, scene).items():
                table.setdefault(name, {}).setdefault(kind, []).append(value)
    return {
        group: {
            name: {kind: _rate(values) for kind, values in kinds.items()}
            for name, kinds in table.items()
            if "generated" in kinds
        }
        for group, table in tallies.items()
    }


def held_out_check(rows: Iterable[Json], prompts: PromptSet, trained_rows: Iterable[Json], trained: PromptSet) -> Json:
    """Held-out beside trained combinations, by number of objects, kind of novelty and attribute.

    A prompt with several novelties counts in each of their kinds, and so does its twin.

    Args:
        rows: One for each held-out prompt: ``prompt_number`` and ``check``.
        prompts: The held-out prompts.
        trained_rows: The same for ``trained``.
        trained: The twins of the first held-out prompts, each with the number of its own.

    Returns:
        group -> kind -> attribute -> ``held_out`` and ``trained`` (rates) and ``difference`` (a share, with interval);
        empty without trained prompts.
    """
    twins = _tally(trained_rows, trained, prompts)
    table: Json = {}
    for (group, kind), rates in _tally(rows, prompts, prompts).items():
        others = twins.get((group, kind), {})
        table.setdefault(group, {})[kind] = {
            name: {
                "held_out": rate.to_dict(),
                "trained": others[name].to_dict(),
                "difference": difference_of(rate, others[name]),
            }
            for name, rate in rates.items()
            if name in others
        }
    return {
        group: {kind: kinds[kind] for kind in NOVELTIES if kinds.get(kind)}
        for group, kinds in sorted(table.items())
        if any(kinds.values())
    }


def group_of(scene: Scene) -> str:
    """Name of the scenes with as many objects."""
    return _GROUPS[len(scene.objects)]


def flags_by_attribute(rows: Sequence[Json], prompts: PromptSet) -> dict[str, NDArray[np.bool_]]:
    """``"<objects>: <attribute>"`` -> the flags of the pictures that were checked for it, in the order of rows."""
    flags: dict[str, list[bool]] = {}
    for row in rows:
        scene = prompts.prompts[row["prompt_number"]].scene
        if scene is not None:
            for name, flag in (parse_flags(row["check"]) or {}).items():
                flags.setdefault(f"{group_of(scene)}: {name}", []).append(flag)
    return {name: np.array(values) for name, values in flags.items()}


def parse_flags(text: str | None) -> Flags | None:
    """The flags of a pixel check, from its column; None if there was no check."""
    return None if text is None else json.loads(text)


def _tally(rows: Iterable[Json], prompts: PromptSet, held_out: PromptSet) -> dict[tuple[str, str], dict[str, Rate]]:
    """Rates of generated pictures, by group and by what is new in the held-out prompt of the same number."""
    rates: dict[tuple[str, str], dict[str, Rate]] = {}
    for row in rows:
        number, flags = row["prompt_number"], parse_flags(row["check"])
        scene, new = prompts.prompts[number].scene, held_out.prompts[number].scene
        if scene is None or new is None or flags is None:
            continue
        for kind in novelties(new):
            own = rates.setdefault((group_of(scene), kind), {})
            for name, flag in _with_conditions(flags, flags, scene).items():
                own[name] = own.get(name, Rate(0, 0)) + rate_of([bool(flag)])
    return rates


def _with_conditions(values: Mapping[str, float], right: Flags, scene: Scene) -> dict[str, float]:
    """Values by attribute, with those of GIVEN again under a name of their own where ``right`` has the condition."""
    conditional = {
        f"{name}, given {condition}": values[name]
        for name, condition in GIVEN.items()
        if name in values and right[condition_of(name, scene)]
    }
    return {**values, **conditional}


def _rate(values: list[float]) -> Json:
    """The rate of flags with its interval, or the mean of probabilities."""
    if all(isinstance(value, bool) for value in values):
        return rate_of(bool(value) for value in values).to_dict()
    return {"rate": float(np.mean(values)), "total": len(values)}
