"""What each part of the demo's decoder is worth: every recipe in configs/ablations beside the demo, with several seeds.

    unclip run configs/demo.toml
    python -m benchmarks.ablations [adapter plain ...] [--share 0.5] [--seeds 3] [--jobs 2] [--device cuda]
    python -m benchmarks.ablations --seconds 400

Data, CLIP, prior and upsamplers are the demo's own. Each recipe trains what it changes, which is the decoder and, with
hard negatives, CLIP and prior; then it samples the 240 held-out prompts and checks their pixels. The first row is the
demo itself. A row takes about half an hour of two cores, as `unclip run configs/ablations/NAME.toml` does, and half of
them with half of the samples. No Ray runs. A recipe without a row was not measured.

Rows of earlier calls stay. Compare only rows in which `share`, `seconds`, `prompts`, `device` and `demo_key` are equal:
the last one changes with the demo's settings and with the versions of its steps, `recipe_key` with those of the row's
own recipe. Rows without a `demo_key` are of the demo as it was, with 2,200 steps of the decoder, of which they took
half.

All recipes but first-decoder, which has 320,000 small samples and 128,000 others for the demo's 218,000, see the same
number of samples, or the same share of them, and not the same time of a processor: one attention is a tenth faster than
the demo, and batches of 32 are twice as many steps of the optimizer. With `--seconds` each decoder gets as many steps
as its own step, which is timed first, allows in so many seconds of processor time (on a GPU seconds); a first decoder
and the decoder get half of them each. `steps` are those of both, and `train_s` is the mean time of a row's trainings,
to read the rates by; results that are older than a column lack it.

Rates are in per cent: the mean over the seeds, and after `+-` half of the distance between the lowest and the highest,
if there are several.
A rate of 120 pictures of one seed has an interval of up to nine points on each side.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import RESULTS, publish
from pipeline.data.embed import Embedder
from pipeline.data.selection import selection_of
from pipeline.data.shard_tables import split_counts
from pipeline.data.vectors import write_embeddings
from pipeline.evaluate.checks import pixel_check
from pipeline.evaluate.parts import check_pixels, picture_seed
from pipeline.evaluate.prompts import choose_prompts
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.networks.clip import clip_folder
from pipeline.recipe.plan import Step, artifact_of, finished_artifacts, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.timing.trainings import RehearsedTraining
from pipeline.train.assemble import TrainJob
from pipeline.train.job import run_job
from pipeline.workspace.manifest import ShardRecord
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]
DEMO = Path(__file__).parents[1] / "configs" / "demo.toml"
ABLATIONS = DEMO.parent / "ablations"
SHOWN = {
    "one object": ("colour", "shape", "size", "everything"),
    "two objects": ("both colours", "both shapes", "binding", "binding, given both shapes", "relation", "everything"),
}
"""Attributes of the table, by number of objects."""
_SETTINGS = ("share", "seconds", "prompts", "device", "demo_key", "recipe_key")
"""Fields of a run that say how it was made: a row is of runs that agree in all of them."""
_BATCH = 48
_FIRST_STEPS, _TIMED_STEPS = 3, 20
"""The first steps reserve memory."""


@dataclass(frozen=True)
class Setting:
    """How the rows are made."""

    device: str
    num_threads: int
    """Threads of a training."""
    num_prompts: int
    share: float = 1.0
    """Share of the decoders' steps that the recipe says."""
    seconds: float = 0.0
    """Processor time of the decoders' trainings; 0: as long as their steps take."""


def train_and_check(path: Path, seed: int, setting: Setting) -> Json:
    """Train what a recipe changes in the demo, sample its held-out prompts and check them.

    Returns:
        ``recipe``, ``seed``, ``steps`` of both decoders, ``train_s`` and ``pixel_check``.
    """
    torch.set_num_threads(setting.num_threads)
    demo, recipe = load_recipe(DEMO), load_recipe(path)
    steps = {name: round(setting.share * recipe.trained()[name].train.num_steps) for name in _decoders(recipe)}
    recipe, seconds = with_steps(path, steps), setting.seconds / len(steps)
    same = {step.name: step.key for step in make_plan(demo)}
    inputs = dict(finished_artifacts(demo, ("pairs", "download", "embed", "first_decoder", *CASCADE_STEPS)))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for step in make_plan(recipe):
            if step.name in inputs and (step.key != same[step.name] or step.name in steps):
                output = artifact_of(Workspace(folder), step)
                if step.name == "embed":
                    _embed(recipe, inputs, output)
                else:
                    job = _job(replace(recipe, seed=seed), step, inputs, output, setting)
                    if step.name in steps and seconds:
                        steps[step.name] = steps_within(seconds, job)
                        recipe = with_steps(path, steps)
                        job = replace(job, recipe=replace(recipe, seed=seed))
                    run_job(job, lambda *_: None)
                output.commit(manifest_of(step, output))
                inputs[step.name] = output
        train_s = time.monotonic() - start
        run = {"recipe": path.stem, "seed": seed, "steps": sum(steps.values()), "train_s": train_s}
        return run | _check(recipe, inputs, setting)


def _decoders(recipe: Recipe) -> list[str]:
    return [name for name in ("first_decoder", "decoder") if name in recipe.trained()]


def with_steps(path: Path, steps: Mapping[str, int]) -> Recipe:
    """A recipe whose decoders one worker trains for so many steps."""
    recipe = load_recipe(path)
    return replace(recipe, **{name: _shortened(recipe.trained()[name], number) for name, number in steps.items()})


def _shortened(section: Any, num_steps: int) -> Any:
    """The section of a training of so many steps, whose phases begin at the same shares of them."""
    train = section.train
    phases = (replace(phase, from_step=round(phase.from_step * num_steps / train.num_steps)) for phase in train.phases)
    train = replace(train, num_steps=num_steps, phases=tuple(phases))
    return replace(section, train=train, resources=replace(section.resources, num_workers=1))


def steps_within(seconds: float, job: TrainJob) -> int:
    """Steps of a training that take so many seconds of processor time, or on a GPU of time; one at least."""
    training = RehearsedTraining(job)
    now = time.process_time if job.device.type == "cpu" else training.clock.now
    for _ in range(_FIRST_STEPS):
        training.take_step()
    start = now()
    for _ in range(_TIMED_STEPS):
        training.take_step()
    return max(1, round(seconds / ((now() - start) / _TIMED_STEPS)))


def _job(recipe: Recipe, step: Step, inputs: Mapping[str, Artifact], output: Artifact, setting: Setting) -> TrainJob:
    device = torch.device(setting.device)
    own = {name: inputs[name] for name in step.inputs}
    return TrainJob(step.name, recipe, own, output, step.key, device, num_threads=setting.num_threads)


def _embed(recipe: Recipe, inputs: Mapping[str, Artifact], output: Artifact) -> None:
    embedder, download = (
        Embedder(clip_folder(inputs["clip"]), recipe.embed, None, selection_of(inputs)),
        inputs["download"],
    )
    for shard in download.shard_records():
        result = embedder(download.path(f"{shard}.tar"), download.path(f"{shard}.parquet"), shard)
        name = f"{shard}.parquet"
        with output.write(name) as path:
            write_embeddings([result.table], path, result.table.schema)
        files, splits = {name: output.describe(name)}, split_counts(output.path(name))
        output.commit_shard(ShardRecord(shard=shard, counts=dict(result.counts), files=files, splits=splits))


def _check(recipe: Recipe, inputs: Mapping[str, Artifact], setting: Setting) -> Json:
    prompts = choose_prompts("", inputs["pairs"], inputs["embed"], setting.num_prompts)
    networks = {name: artifact for name, artifact in inputs.items() if name in CASCADE_STEPS}
    cascade, rows = load_cascade(networks, setting.device, network_configs(recipe)), list[Json]()
    for first in range(0, len(prompts.prompts), _BATCH):
        numbers = range(first, min(first + _BATCH, len(prompts.prompts)))
        seeds = [picture_seed(recipe.seed, number, 0) for number in numbers]
        pictures = cascade.sample([prompts.prompts[number].text for number in numbers], seeds).images.numpy()
        rows += [
            {"prompt_number": number} | check_pixels(prompts, number, picture)
            for number, picture in zip(numbers, pictures, strict=True)
        ]
    return {"num_prompts": len(rows), "pixel_check": pixel_check(rows, prompts)}


def table_of(runs: Sequence[Json]) -> list[Json]:
    """A row for each recipe and its settings, in the order of their first runs: rates over its seeds."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in ("recipe", *_SETTINGS)), []).append(run)
    rows: list[Json] = []
    for own in groups.values():
        row: Json = {
            "recipe": own[0]["recipe"],
            "seeds": len(own),
            "steps": round(statistics.mean(run["steps"] for run in own)),
            "train_s": round(statistics.mean(run["train_s"] for run in own)),
        }
        for group, attributes in SHOWN.items():
            for attribute in attributes:
                checks = [run["pixel_check"].get(group, {}).get(attribute) for run in own]
                rates = [100 * check["generated"]["rate"] for check in checks if check is not None]
                row[f"{group}: {attribute}"] = _spread(rates) if rates else None
        rows.append(row | {name: own[0][name] for name in _SETTINGS})
    return rows


def merged(earlier: Json | None, runs: Sequence[Json]) -> tuple[list[Json], list[Json]]:
    """The table and the runs of the results of before with new runs.

    Args:
        earlier: The document of before; None if there is none.
        runs: The new ones, each in the place of one of the same recipe, seed and settings.

    Returns:
        The rows, and the runs that they are of. Rows of before whose runs are not known come last.
    """
    document: Json = earlier or {"settings": {}, "rows": []}
    known: list[Json] = document["settings"].get("runs", [])
    by_name = {tuple(run[name] for name in ("recipe", "seed", *_SETTINGS)): run for run in [*known, *runs]}
    together = sorted(by_name.values(), key=lambda run: (run["recipe"] != "demo", run["recipe"], run["seed"]))
    rows = table_of(together)
    for row in document["rows"]:
        if not row.get("demo_key"):
            settings = {name: document["settings"].get(name) for name in _SETTINGS}
            rows.append(dict.fromkeys(rows[0] if rows else row) | settings | row)
    return rows, together


def _spread(rates: Sequence[float]) -> str:
    mean = f"{statistics.mean(rates):.1f}"
    return f"{mean} +- {(max(rates) - min(rates)) / 2:.1f}" if len(rates) > 1 else mean


def _key(path: Path) -> str:
    """What a recipe's results depend on: its settings, and the versions of its steps."""
    return make_plan(load_recipe(path), until="evaluate")[-1].key[:6]


def main() -> None:
    """Train and check all; prints the table and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="Files of configs/ablations without .toml, or demo; none: all.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="Trainings at a time, each in a process of its own.")
    parser.add_argument("--device", default="cpu")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--share", type=float, default=1.0, help="Share of the decoders' steps that the recipe says.")
    lengths.add_argument("--seconds", type=float, default=0.0, help="Processor time of a row's decoders.")
    parser.add_argument("--num-prompts", type=int, default=240)
    args = parser.parse_args()
    names = args.names or ["demo", *sorted(path.stem for path in ABLATIONS.glob("*.toml"))]
    paths = [DEMO if name == "demo" else ABLATIONS / f"{name}.toml" for name in names]
    num_threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    setting = Setting(args.device, num_threads, args.num_prompts, args.share, args.seconds)
    path = RESULTS / "ablations.json"
    earlier: Json | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    same = {
        "share": None if args.seconds else args.share,
        "seconds": args.seconds or None,
        "prompts": args.num_prompts,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "demo_key": _key(DEMO),
    }
    keys = {path.stem: _key(path) for path in paths}
    runs: list[Json] = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(train_and_check, path, seed, setting) for seed in range(args.seeds) for path in paths]
        for number, task in enumerate(as_completed(tasks)):
            run = task.result()
            run |= same | {"recipe_key": keys[run["recipe"]]}
            runs.append(run)
            print(f"{number + 1}/{len(tasks)}: {run['recipe']}, seed {run['seed']}: {run['train_s']:.0f} s", flush=True)
            rows, together = merged(earlier, runs)
            publish("ablations", rows, {"runs": together})


if __name__ == "__main__":
    main()
