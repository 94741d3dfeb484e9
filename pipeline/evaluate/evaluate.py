"""The evaluate step without Ray: its plan, the worker that runs its parts, and the files made from all parts."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.data.negatives import bigrams_of
from pipeline.data.selection import embeddings_of
from pipeline.data.training_rows import sample_captions
from pipeline.evaluate.aggregate import Aggregate, TrainingNeighbours
from pipeline.evaluate.features import FeatureExtractor
from pipeline.evaluate.gallery import Gallery
from pipeline.evaluate.parts import PartRunner
from pipeline.evaluate.prompts import Watch, choose_prompts, held_out_rows, trained_prompts, unwatched
from pipeline.evaluate.work import Work, plan_parts, samples_of
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.recipe.recipe import Recipe
from pipeline.sampling.sample import SAMPLES
from pipeline.workspace.store import Artifact

Json = dict[str, Any]

METRICS_FILE = "metrics.json"


def plan_work(recipe: Recipe, inputs: Mapping[str, Artifact], watch: Watch = unwatched) -> Work:
    """Choose prompts and rows, and cut them into parts.

    Args:
        recipe: The recipe.
        inputs: The artifacts that the step reads.
        watch: Is told how far the choice is.

    Raises:
        DataError: If there is no prompt, or an input breaks its schema.
    """
    config, embed = recipe.evaluate, embeddings_of(inputs)
    held_out = held_out_rows(embed, config.num_prompts, watch)
    prompts = choose_prompts(config.prompts_path, inputs["pairs"], embed, config.num_prompts, held_out)
    trained = trained_prompts(prompts.prompts[: config.num_trained_prompts], recipe.seed)
    samples = samples_of(len(prompts.prompts), config.num_shown, config.num_images_per_shown)
    counts = {"samples": len(samples), "trained": len(trained.prompts), "validation": len(held_out.rows)}
    parts = plan_parts(counts, config.batch_size)
    bigrams = bigrams_of(sample_captions(embed))
    return Work(prompts, trained, held_out.rows, held_out.split, samples, parts, bigrams)


def make_runner(recipe: Recipe, inputs: Mapping[str, Artifact], output: Artifact, work: Work) -> PartRunner:
    """Load the cascade and make a worker for any part."""
    networks = {name: inputs[name] for name in recipe.trained()}
    device = recipe.evaluate.resources.accelerator
    path = recipe.evaluate.features_path
    extractor = FeatureExtractor(path, device) if path else None
    configs = network_configs(recipe)
    cascade = load_cascade(networks, device, configs)
    runner = PartRunner(cascade, work, inputs["download"], output, recipe.seed, extractor)
    if recipe.prior_2 is not None:
        second, config = {"prior": inputs["prior_2"]}, {"prior": configs["prior_2"]}
        runner.second = load_cascade(second, device, config, cascade.clip)
    return runner


def finish(
    recipe: Recipe, inputs: Mapping[str, Artifact], output: Artifact, work: Work, watch: Watch = unwatched
) -> Json:
    """Write metrics.json, samples.jsonl, pictures.json and the grids from the committed parts; return the metrics.

    ``watch`` is told how far the choice of training rows to compare with is.
    """
    aggregate = Aggregate(output, work)
    neighbours = TrainingNeighbours(inputs["index"])
    metrics = aggregate.measure(embeddings_of(inputs), neighbours, watch)
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
    return dict(_rates_by_name(metrics, ""))


def _rates_by_name(tables: Json, prefix: str) -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in tables.items():
        path = f"{prefix}{name}".replace(" ", "_").replace(",", "")
        if isinstance(value, dict):
            own = [value[name] for name in ("rate", "mean", "difference") if isinstance(value.get(name), int | float)]
            numbers += [(path, float(own[0]))] if own else _rates_by_name(value, f"{path}.")
        elif isinstance(value, int | float):
            numbers.append((path, float(value)))
    return numbers
