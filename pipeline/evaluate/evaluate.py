"""The evaluate step without Ray: its plan, the worker that runs its parts, and the files made from all parts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluate.aggregate import Aggregate, TrainingNeighbours
from pipeline.evaluate.features import FeatureExtractor
from pipeline.evaluate.gallery import Gallery
from pipeline.evaluate.parts import Part, PartRunner, plan_parts, samples_of
from pipeline.evaluate.prompts import PromptSet, Row, choose_prompts, held_out_rows
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.recipe import Recipe
from pipeline.sampling.sample import SAMPLES
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Work:
    """Everything that an evaluation samples and measures; a function of the recipe and its inputs."""

    prompts: PromptSet
    rows: Sequence[Row]
    """Validation rows, for the measures of each network."""
    samples: Sequence[tuple[int, int]]
    """(prompt number, image number) of each sample."""
    parts: Sequence[Part]

    @property
    def num_items(self) -> int:
        """Number of samples and rows together."""
        return len(self.samples) + len(self.rows)


def plan_work(recipe: Recipe, inputs: Mapping[str, Artifact]) -> Work:
    """Choose prompts and rows, and cut them into parts.

    Raises:
        DataError: If there is no prompt, or an input breaks its schema.
    """
    config = recipe.evaluate
    prompts = choose_prompts(config.prompts_path, inputs["pairs"], inputs["embed"], config.num_prompts)
    rows, _ = held_out_rows(inputs["embed"], config.num_prompts)
    samples = samples_of(len(prompts.prompts), config.num_shown, config.num_images_per_shown)
    return Work(prompts, rows, samples, plan_parts(len(samples), len(rows), config.batch_size))


def make_runner(recipe: Recipe, inputs: Mapping[str, Artifact], output: Artifact, work: Work) -> PartRunner:
    """Load the cascade and make a worker for any part."""
    networks = {name: inputs[name] for name in recipe.trained()}
    device = recipe.evaluate.resources.accelerator
    path = recipe.evaluate.features_path
    extractor = FeatureExtractor(path, device) if path else None
    configs = network_configs(recipe)
    cascade = load_cascade(networks, device, configs)
    runner = PartRunner(
        cascade,
        work.prompts,
        work.rows,
        inputs["download"],
        output,
        recipe.seed,
        work.samples,
        extractor,
    )
    if recipe.prior_2 is not None:
        second, config = {"prior": inputs["prior_2"]}, {"prior": configs["prior_2"]}
        runner.second = load_cascade(second, device, config, cascade.clip)
    return runner


def finish(recipe: Recipe, inputs: Mapping[str, Artifact], output: Artifact, work: Work) -> Json:
    """Write metrics.json, samples.jsonl, pictures.json and the grids from the committed parts; return the metrics."""
    aggregate = Aggregate(output, work.parts, work.prompts)
    neighbours = TrainingNeighbours(inputs["index"])
    metrics = aggregate.measure(inputs["embed"], neighbours)
    for name, section in (("prior", recipe.prior), ("prior_2", recipe.prior_2)):
        if section is not None and name in metrics:
            metrics[name]["kind"] = section.model.kind
    Gallery(aggregate, output, recipe.evaluate.num_shown).write(neighbours, inputs["download"])
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in aggregate.list_samples(neighbours))
    output.write_bytes(SAMPLES, lines.encode())
    output.write_json(METRICS_FILE, metrics)
    return metrics


def summarise(metrics: Json) -> dict[str, float]:
    """The numbers of metrics.json by dotted name, without counts and intervals, for manifest and tracker."""
    return dict(_walk(metrics, ""))


def _walk(tables: Json, prefix: str) -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in tables.items():
        path = f"{prefix}{name}".replace(" ", "_").replace(",", "")
        if isinstance(value, dict):
            number: Any = value.get("rate", value.get("mean"))
            numbers += [(path, float(number))] if number is not None else _walk(value, f"{path}.")
        elif isinstance(value, int | float):
            numbers.append((path, float(value)))
    return numbers
