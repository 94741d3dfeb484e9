"""What a new combination costs: held-out prompts beside their trained twins, by what is new in them.

    unclip run configs/demo.toml
    python -m benchmarks.combinations [configs/demo.toml] [--set workspace=DIR] [--sets 3] [--jobs 2]

As the report's table of held-out and trained combinations, with several sets of 280 prompts in place of the 240 of
`unclip evaluate`, and a picture of each. A twin has the shapes, sizes, places and relation of its prompt, in colours
and on a background that training shows with them. A prompt with two novelties counts in both kinds.
Required: `difference`, in points, is -7 or more, with an interval of 95 % between `low` and `high`.
"""

import argparse
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import publish
from pipeline.evaluate.checks import held_out_check
from pipeline.evaluate.parts import check_pixels, picture_seed
from pipeline.evaluate.prompts import Prompt, PromptSet, trained_prompts
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes

Json = dict[str, Any]
_PROMPTS_A_SET = 280
_BATCH = 40
_MOST_LOST = -7.0
SHOWN = {
    "one object": ("colour", "shape", "size", "everything"),
    "two objects": ("both colours", "both shapes", "binding", "relation", "everything"),
}


def prompts_of(num_sets: int, seed: int) -> tuple[PromptSet, PromptSet]:
    """Held-out prompts and their twins."""
    scenes = [each for number in range(num_sets) for each in evaluation_scenes(_PROMPTS_A_SET, seed + number)]
    prompts = [Prompt(canonical_caption(each.scene), each.kind, each.scene) for each in scenes]
    return PromptSet(tuple(prompts), "drawn"), trained_prompts(prompts, seed)


def sample_and_check(first: int, prompts: PromptSet, path: str, changes: Sequence[str], num_threads: int) -> list[Json]:
    """Rows of ``held_out_check`` for a picture of each of some prompts, from ``first`` on."""
    torch.set_num_threads(num_threads)
    recipe = load_recipe(path, changes)
    cascade = load_cascade(finished_artifacts(recipe, CASCADE_STEPS), "cpu", network_configs(recipe))
    numbers = range(first, min(first + _BATCH, len(prompts.prompts)))
    seeds = [picture_seed(recipe.seed, number, 0) for number in numbers]
    pictures = cascade.sample([prompts.prompts[number].text for number in numbers], seeds).images.numpy()
    return [
        {"prompt_number": number} | check_pixels(prompts, number, picture)
        for number, picture in zip(numbers, pictures, strict=True)
    ]


def run(path: str, changes: Sequence[str], num_sets: int, num_jobs: int) -> list[Json]:
    """A row for each number of objects, kind of novelty and attribute."""
    held_out, trained = prompts_of(num_sets, load_recipe(path, changes).seed)
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_jobs)
    rows: list[list[Json]] = []
    with ProcessPoolExecutor(num_jobs, multiprocessing.get_context("spawn")) as pool:
        for prompts in (held_out, trained):
            work = partial(sample_and_check, prompts=prompts, path=path, changes=changes, num_threads=num_threads)
            rows.append([row for part in pool.map(work, range(0, len(prompts.prompts), _BATCH)) for row in part])
    table = held_out_check(rows[0], held_out, rows[1], trained)
    return [
        {
            "objects": group,
            "new": kind.removeprefix("new "),
            "right": name,
            "prompts": checks[name]["held_out"]["total"],
            "held_out": round(100 * checks[name]["held_out"]["rate"], 1),
            "trained": round(100 * checks[name]["trained"]["rate"], 1),
            **{end: round(100 * checks[name]["difference"][end], 1) for end in ("difference", "low", "high")},
            "least": _MOST_LOST,
        }
        for group, kinds in table.items()
        for kind, checks in kinds.items()
        for name in SHOWN[group]
    ]


def main() -> None:
    """Sample, check, print a table and write the results, under the recipe's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(Path(__file__).parents[1] / "configs" / "demo.toml"))
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="NAME=VALUE")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    rows = run(args.recipe, args.changes, args.sets, args.jobs)
    name = f"combinations_{load_recipe(args.recipe, args.changes).name}".replace("-", "_")
    publish(name, rows, {"recipe": Path(args.recipe).name, "prompts": args.sets * _PROMPTS_A_SET})


if __name__ == "__main__":
    main()
