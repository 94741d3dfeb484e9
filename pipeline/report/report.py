"""The report: one self-contained HTML page of a recipe's results so far, and the same numbers as text."""

import functools
import hashlib
import json
import platform
import shlex
import time
from pathlib import Path
from typing import Any, cast

import psutil
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.addresses import words_without_secrets
from pipeline.evaluate.order import VARIANTS
from pipeline.recipe.plan import Step, artifact_of
from pipeline.recipe.recipe import Recipe
from pipeline.report import sections
from pipeline.report.ablation import ablation_rows, order_rows, order_titles, order_verdict
from pipeline.report.filter import filter_of
from pipeline.report.sections import Done, Finished
from pipeline.report.tables import (
    failure_groups,
    measure_rows,
    novelty_groups,
    prompts_about,
    quality_groups,
    real_misjudged,
    rows_of,
    tiles_of,
)
from pipeline.retrieve.recall import lowest_recall, missed_target
from pipeline.workspace.disk import translate_os_errors
from pipeline.workspace.manifest import content_of
from pipeline.workspace.progress import byte_size, duration
from pipeline.workspace.store import Workspace

Json = dict[str, Any]

REPORT = "report.html"
_TEMPLATE = "report.html"
_HEAD_BYTES = 512
"""Of a page: what holds the mark of its results."""
_SOURCES = {
    "drawn": "pictures of shapes that the project draws itself",
    "list": "the pictures of a URL list",
    "folder": "the pictures of a folder",
    "shards": "shards of captioned pictures",
}
_NOVELTIES_ABOUT = (
    "What a new combination costs, in points: samples of prompts with a colour and shape, a background, or a pair of "
    "objects that training never shows together, beside samples of the same shapes, sizes and places in colours that "
    "it shows, with the 95 % interval of the difference. A prompt with two novelties counts in both columns."
)


def update_report(workspace: Workspace, steps: list[Step], recipe: Recipe, recipe_file: str) -> str:
    """Write the workspace's page unless it already shows the newest results of this recipe.

    Recipes that share a workspace share the page, and a command may end between its last result and the page: so every
    command that shows the page asks here.

    Returns:
        Where the page is.

    Raises:
        DataError: If an artifact's file is damaged; names it.
        StepError: If the page cannot be written.
    """
    path, done = workspace.local_root / REPORT, finished_steps(workspace, steps)
    mark = _results_mark(workspace, done, [step.name for step in steps], recipe, recipe_file)
    with translate_os_errors(str(path)):
        head = path.read_bytes()[:_HEAD_BYTES] if path.exists() else b""
    if mark.encode() not in head:
        write_report(workspace, steps, recipe, path, recipe_file)
    return workspace.publish(REPORT)


def write_report(workspace: Workspace, steps: list[Step], recipe: Recipe, path: Path, recipe_file: str = "") -> None:
    """Write the page; sections of unfinished steps are left out.

    Args:
        workspace: Holds the artifacts.
        steps: The plan.
        recipe: Gives the page its name and settings.
        path: The file to write.
        recipe_file: Name of the recipe for the commands at the end, quoted for a shell.

    Raises:
        DataError: If an artifact's file is damaged; names it.
        StepError: If the page cannot be written.
    """
    done, names = finished_steps(workspace, steps), [step.name for step in steps]
    view = build_view(done, names, recipe, recipe_file or shlex.quote(f"configs/{recipe.name}.toml"))
    view["results"] = _results_mark(workspace, done, names, recipe, recipe_file)
    view["ablation"] = _ablation_view(sections.ablation_of(sections.newest_ablation(workspace, done, recipe)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    cast("Any", environment.filters).update(_FILTERS)
    page = environment.get_template(_TEMPLATE).render(view)
    with translate_os_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".tmp-{path.name}")
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)


def _results_mark(workspace: Workspace, done: Done, step_names: list[str], recipe: Recipe, recipe_file: str) -> str:
    """16 hex digits that change with everything that the page shows; pairs that are forgotten change what is shown."""
    ablation = sections.newest_ablation(workspace, done, recipe)
    manifests = [*(finished.manifest for finished in done.values()), *([ablation.manifest] if ablation else [])]
    results = [(one.key, one.created, one.counts, one.metrics, content_of(one)) for one in manifests]
    shown = [recipe.name, recipe_file, step_names, results, sections.index_of(done), sections.recipe_changes(recipe)]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def finished_steps(workspace: Workspace, steps: list[Step]) -> Done:
    """The finished steps of a plan, by name, in its order."""
    done: Done = {}
    for step in steps:
        artifact = artifact_of(workspace, step)
        manifest = artifact.manifest()
        if manifest is not None:
            done[step.name] = Finished(step, artifact, manifest)
    return done


def build_view(done: Done, step_names: list[str], recipe: Recipe, recipe_file: str) -> Json:
    """The values that the template shows; pictures are ``data:`` URIs."""
    metrics: Json = {}
    if "evaluate" in done and done["evaluate"].artifact.exists("metrics.json"):
        metrics = done["evaluate"].artifact.read_json("metrics.json")
    training = sections.training_of(done, recipe)
    for network in training:
        network["svg"] = Markup(network["svg"])
    pictures = sections.pictures_of(done)
    return {
        "name": recipe.name,
        "lead": _lead(recipe),
        "facts": _facts(done, training),
        "tiles": tiles_of(metrics),
        "missing": _missing(done, step_names),
        "pictures": pictures,
        "has_checks": bool(metrics.get("pixel_check")),
        "samples_about": _samples_about(metrics, recipe),
        "rows": rows_of(metrics),
        "stages_about": _stages_about(recipe),
        "neighbours_about": _neighbours_about(metrics),
        "quality": quality_groups(metrics),
        "quality_about": _quality_about(metrics),
        "novelties_about": _NOVELTIES_ABOUT,
        "failures_about": failures_about(metrics),
        "novelties": novelty_groups(metrics),
        "failures": failure_groups((pictures or {}).get("failures", []), metrics),
        "measures": measure_rows(metrics),
        "training": training,
        "filter": filter_of(done),
        "pairs": sections.pairs_of(done, recipe.pairs.lists),
        "download": sections.download_of(done),
        "index": _index_view(sections.index_of(done)),
        "times": sections.times_of(done),
        "commands": next_commands(recipe, recipe_file, _example_prompt(pictures), set(done)),
        "footer": _footer(recipe),
        "changes": sections.recipe_changes(recipe),
        "artifacts": [(finished.title, finished.artifact.uri) for finished in done.values()],
        "versions": sorted(_versions(done).items()),
    }


def next_commands(recipe: Recipe, recipe_file: str, prompt: str, done: set[str]) -> list[tuple[str, str]]:
    """Commands to try after this run, each with its purpose."""
    words, file = shlex.quote(prompt), words_without_secrets(recipe_file)
    if "evaluate" not in done:
        return [
            ("show what is done, what remains and why", f"unclip plan {file}"),
            ("continue; finished work is kept", f"unclip run {file}"),
        ]
    steps = 2 * recipe.prior.train.total_steps  # a decoder's phases begin at steps that would have to change, too
    return [
        ("sample your own prompt", f"unclip sample {file} {words} -n 4 --seed 1 --out out"),
        ("find the training pictures nearest to a text", f"unclip search {file} {words} -k 10"),
        ("serve OpenAI's image API, neighbours and a page", f"unclip serve {file}"),
        (
            "show which steps a changed field would run again",
            f"unclip plan {file} --set prior.train.num_steps={steps}",
        ),
    ]


def short_count(count: float) -> str:
    """A count for people: 950, 1.8M, 3.5B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


def format_metrics(metrics: Json) -> str:
    """The quality tables as plain text, for a terminal."""
    lines: list[str] = []
    for group in quality_groups(metrics):
        lines.append(f"{group['title']:52}{'samples':>9} {'95 %':>11} {'real':>9} {'guessed':>9}")
        for row in group["rows"]:
            rate = row["generated"]
            others = [f"{100 * row[kind]['rate']:8.1f}%" if row[kind] else " " * 9 for kind in ("real", "guess")]
            interval = f"{100 * rate['low']:.1f}-{100 * rate['high']:.1f}"
            name = f"{row['name']} ({row['of']})" if row["of"] else row["name"]
            lines.append(f"  {name:50}{100 * rate['rate']:8.1f}% {interval:>11} {others[0]} {others[1]}")
        lines.append("")
    for group in novelty_groups(metrics):
        kinds = [f"{kind['name']} ({kind['total']})" for kind in group["kinds"]]
        lines.append(f"{group['title']:52}{''.join(f'{kind:>42}' for kind in kinds)}")
        lines += [f"  {row['name']:50}{''.join(map(_compared, row['cells']))}" for row in group["rows"]]
        lines.append("")
    if about := prompts_about(metrics):
        lines += [about, ""]
    rows = measure_rows(metrics)
    if rows:
        lines.append(f"{'measure':52}{'samples':>12}{'95 %':>16}{'ceiling':>12}{'floor':>12}")
        lines += [
            f"  {row['name']:50}{row['value']:>12}{row['interval']:>16}{row['ceiling']:>12}{row['floor']:>12}"
            for row in rows
        ]
    return "\n".join(lines).rstrip()


def _compared(cell: Json) -> str:
    rates = f"{100 * cell['held_out']:.1f}%, trained {100 * cell['trained']:.1f}%"
    return f"{rates:>24}{_points(cell):>18}"


def _points(cell: Json) -> str:
    """A difference in points with its interval: -3 (-9 to +3)."""
    difference, low, high = (f"{100 * cell[name]:+.0f}" for name in ("difference", "low", "high"))
    return f"{difference} ({low} to {high})"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _whole(rate: float) -> str:
    return f"{100 * rate:.0f}"


def _share(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


_FILTERS: dict[str, Any] = {
    "percent": _percent,
    "points": _points,
    "whole": _whole,
    "share": _share,
    "duration": functools.partial(duration, exact=True),
    "short": short_count,
    "size": byte_size,
}


def _lead(recipe: Recipe) -> str:
    sides = [model.image_px for model in (recipe.decoder.model, *recipe.upsamplers().values())]
    larger = f", and upsamplers enlarge it to {' and '.join(map(str, sides[1:]))} px" if sides[1:] else ""
    clip = "a CLIP trained here" if recipe.clip.source == "train" else f"a frozen CLIP ({recipe.clip.name})"
    return (
        f"A model in the manner of DALL-E 2, trained on {_SOURCES[recipe.pairs.source]}. {clip[0].upper()}{clip[1:]} "
        f"reads the caption, a prior samples the embedding of a picture, a decoder samples that picture at "
        f"{sides[0]} px{larger}."
    )


def _facts(done: Done, training: list[Json]) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    times = sections.times_of(done)
    if times:
        facts.append((duration(times["total_s"], exact=True), "from an empty folder"))
    if "download" in done:
        facts.append((f"{done['download'].manifest.counts.get('ok', 0):,}", "pictures"))
    numbers = [network["num_parameters"] for network in training if not network["begins_another"]]
    if sum(numbers):
        facts.append((short_count(sum(numbers)), f"parameters in {len(numbers)} networks"))
    if done:
        newest = max(finished.manifest.created for finished in done.values())
        facts.append((time.strftime("%d %B %Y, %H:%M", time.localtime(newest)).lstrip("0"), ""))
    return facts


def _missing(done: Done, step_names: list[str]) -> str:
    unfinished = [name for name in step_names if name not in done]
    if not unfinished:
        return ""
    return (
        f"{len(done)} of {len(step_names)} steps are done; sections that need {', '.join(unfinished)} are left out "
        f"until {'it has' if len(unfinished) == 1 else 'they have'} run."
    )


def _samples_about(metrics: Json, recipe: Recipe) -> str:
    about = f"{recipe.evaluate.num_images_per_shown} seeds each, not picked. Click a picture to enlarge it."
    return f"{prompts_about(metrics)} {about}".lstrip()


def _stages_about(recipe: Recipe) -> str:
    if not recipe.upsamplers():
        return "The decoder's picture is the final one: this recipe has no upsamplers."
    return "The decoder places the objects; the upsamplers, which do not read the caption, sharpen the picture."


def _quality_about(metrics: Json) -> str:
    return (
        f"The check finds objects by colour and classifies them by outline, without a network, in samples of "
        f"{metrics.get('num_prompts', 0)} prompts that were not trained on. Real pictures of the same scenes are the "
        "ceiling. The floor, guessed, is chance: the same samples checked against other prompts and, for attributes "
        "that tie objects together, the same colours and shapes in random order, place and size. A row with "
        "\u201cgiven\u201d counts only the samples in which the other attribute is right: how well objects are drawn "
        "does not bound it. \u201cWhich is which\u201d is right with both colours, or both shapes where the colours "
        "are equal."
    )


def failures_about(metrics: Json) -> str:
    """What the pictures of the failures are, and how far that is their fault."""
    if "pixel_check" in metrics:
        return (
            "Samples in which the pixel check misses something, in the order of their prompts: what is wrong, and what "
            "the check finds (\u201c?\u201d where no name fits)."
        )
    about = "Samples that CLIP finds nearer to the same words in another order than to their caption."
    misjudged, total = real_misjudged(metrics)
    if not total:
        return about
    return (
        f"{about} It does so with {100 * misjudged / total:.0f} % of the real pictures too, so a picture is not wrong "
        "for that alone."
    )


def _neighbours_about(metrics: Json) -> str:
    memorisation = metrics.get("memorisation") or {}
    text = "Each sample and the training pictures nearest to it in the CLIP space, with their cosine similarity."
    if "closer_than_real" not in memorisation:
        return text
    return (
        f"{text} {100 * memorisation['closer_than_real']['rate']:.1f} % of the samples lie closer to a training "
        f"picture than 95 % of real, unseen pictures do; 5 % would be expected of real ones."
    )


def _ablation_view(result: Json | None) -> Json | None:
    if result is None:
        return None
    return {
        "shown": result["shown"],
        "variants": {name: label for name, label in VARIANTS.items() if name in result["variants"]},
        "rows": ablation_rows(result),
        "titles": order_titles(),
        "order": order_rows(result),
        "verdict": order_verdict(result),
        "num_prompts": result["num_prompts"],
        "prompts_about": prompts_about(result),
    }


def _index_view(index: Json | None) -> Json | None:
    if index is None:
        return None
    segments: list[Json] = index["segments"]
    num_rows = sum(segment["num_rows"] for segment in segments)
    kinds = " and ".join(sorted({segment[f"{side}_kind"] for segment in segments for side in ("image", "text")}))
    rows = f"{num_rows:,} rows" + (", those deleted since included" if index["has_deleted"] else "")
    of_each = f" of {len(segments)} segments" if len(segments) > 1 else ""
    missed = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in map(missed_target, segments) if sentence]
    lowest = lowest_recall(segments)
    if lowest is None:
        return {"value": f"{num_rows:,}", "label": "rows", "note": f"{kinds} index, too few rows to measure recall."}
    measured = f"measured against exact search by picture and by caption{of_each}; the lowest of these."
    return {
        "value": f"{100 * lowest[0]:.1f} %",
        "label": f"recall at {lowest[1]}",
        "note": " ".join([f"{kinds} index of {rows}, {measured}", *missed]),
    }


def _example_prompt(pictures: Json | None) -> str:
    shown = (pictures or {}).get("shown") or [{"prompt": "a large red star on a white background"}]
    return str(shown[0]["prompt"])


def _versions(done: Done) -> dict[str, str]:
    return {name: number for finished in done.values() for name, number in finished.manifest.versions.items()}


def _footer(recipe: Recipe) -> str:
    devices = {section.resources.accelerator for section in recipe.trained().values()}
    memory = psutil.virtual_memory().total / 2**30
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return (
        f"Seed {recipe.seed}. Networks on {' and '.join(sorted(devices))}. Written on {platform.system()} "
        f"{platform.machine()}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}."
    )
