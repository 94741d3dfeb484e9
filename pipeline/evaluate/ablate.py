"""The ablation shows what the prior is for: it samples the same prompts and seeds with different image embeddings.

The paper's "importance of the prior" (arXiv:2204.06125, section 5.1 and figure 8). The decoder reads the caption in
all variants; they differ in the z_image that it reads:

    caption    none: the decoder's null embedding
    z_text     the embedding of the caption
    prior      the prior's sample
    z_image    the embedding of the prompt's real picture, if there is one: the ceiling

A variant is sampled in parts. Each part is committed whole, so that a killed run continues. Legend: N prompts.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from models.cascade import Cascade
from models.stage import Z_IMAGE, Batch
from pipeline.clip.frozen import FrozenClip
from pipeline.data.selection import embeddings_of
from pipeline.evaluate.checks import flags_by_attribute, pixel_check
from pipeline.evaluate.metrics import cosine, mean_of, own_is_nearest, rate_of
from pipeline.evaluate.order import (
    NUM_FRECHET_RESAMPLES,
    NUM_RESAMPLES,
    PAPER_ORDER,
    VARIANTS,
    Measure,
    Statistic,
    check_order,
    frechet_of_rows,
    frechet_statistic,
    mean_statistic,
)
from pipeline.evaluate.parts import check_pixels, picture_seed, read_part, write_rows
from pipeline.evaluate.prompts import PromptSet, choose_prompts
from pipeline.evaluate.work import Part, plan_parts
from pipeline.grid import Block, draw_grid
from pipeline.networks.cascade import load_cascade, network_configs
from pipeline.pictures.png import to_png
from pipeline.pictures.read import decode
from pipeline.recipe.garbage import in_use_of
from pipeline.recipe.keys import sampling_tables
from pipeline.recipe.plan import Step, artifact_of, finished_artifacts, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.shapes.draw import draw_array
from pipeline.workspace.manifest import ShardRecord, add_counts
from pipeline.workspace.store import Artifact, Workspace

Json = dict[str, Any]
Watch = Callable[[str, int, int], None]
"""Called with (variant, pictures done, pictures in all) after each part, and then with ("comparing", resamples of the
prompts that are computed, resamples in all)."""

RESULT = "ablation.json"
GRID = "ablation.png"
_STEP = "ablate"
_INPUTS = ("pairs", "embed", "filter_embeddings")


def ablate_recipe(recipe: Recipe, *, num_prompts: int, num_shown: int, watch: Watch) -> tuple[Artifact, Json]:
    """Sample and measure every variant; parts that are committed already are not repeated.

    Args:
        recipe: A recipe with trained networks.
        num_prompts: Prompts to measure: the first ones of ``unclip evaluate``.
        num_shown: How many of these prompts the grid shows.
        watch: See ``Watch``.

    Returns:
        The artifact, with ``ablation.json``, ``ablation.png`` and the shown pictures; and the numbers.

    Raises:
        ConfigError: If a step that this needs is not finished.
        DataError: If an input is damaged.
    """
    workspace = Workspace(recipe.workspace)
    step = ablation_step(recipe, num_prompts=num_prompts, num_shown=num_shown)
    output = artifact_of(workspace, step)
    with in_use_of(recipe, step.inputs, [(_STEP, step.key)]):
        inputs = finished_artifacts(recipe, step.inputs)
        if output.manifest() is None:
            start = time.monotonic()
            output.clear_temporaries()
            prompts = choose_prompts(recipe.evaluate.prompts_path, inputs["pairs"], embeddings_of(inputs), num_prompts)
            networks = {name: artifact for name, artifact in inputs.items() if name in CASCADE_STEPS}
            accelerator = recipe.evaluate.resources.accelerator
            runner = AblationRunner(load_cascade(networks, accelerator, network_configs(recipe)), prompts, output)
            parts = plan_parts(dict.fromkeys(runner.variants, len(prompts.prompts)), recipe.evaluate.batch_size)
            for part in parts:
                if part.name not in output.shard_records():
                    runner.run(part, recipe.seed, num_shown)
                watch(part.kind, part.stop, len(prompts.prompts))
            shown = [
                {
                    "prompt": prompt.text,
                    "pictures": [{"file": _picture_name(name, n), "label": VARIANTS[name]} for name in runner.variants],
                }
                for n, prompt in enumerate(prompts.prompts[:num_shown])
            ]
            numbers = summarise(output, parts, prompts, runner.references(), watch)
            output.write_json(RESULT, numbers | {"shown": shown})
            output.write_bytes(GRID, to_png(_grid(output, runner.variants, prompts, num_shown)))
            counts = add_counts([record.counts for record in output.shard_records().values()])
            output.commit(manifest_of(step, output, counts, wall_s=time.monotonic() - start))
        return output, output.read_json(RESULT)


def ablation_step(recipe: Recipe, *, num_prompts: int, num_shown: int) -> Step:
    """The ablation as a step: keyed by the networks, the prompts and the seed."""
    steps = {step.name: step for step in make_plan(recipe)}
    fields = {name: steps["evaluate"].section.get(name) for name in ("prompts_path", "content", "seed")}
    inputs = {name: steps[name].key for name in (*_INPUTS, *CASCADE_STEPS) if name in steps}
    fields |= sampling_tables(recipe)
    return Step(_STEP, 7, fields | {"num_prompts": num_prompts, "num_shown": num_shown}, inputs)


class AblationRunner:
    """Samples and measures parts of variants.

    Args:
        cascade: The trained networks.
        prompts: The prompts to sample.
        output: The artifact to write to.
    """

    def __init__(self, cascade: Cascade, prompts: PromptSet, output: Artifact) -> None:
        self._cascade = cascade
        self._clip = cast("FrozenClip", cascade.clip)
        self._prompts = prompts
        self._output = output
        self._side_px = list(cascade.sides_px.values())[-1]
        self._real = self._embed_real()

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that can be sampled; the true z_image needs real pictures."""
        return tuple(name for name in VARIANTS if name != "z_image" or self._real is not None)

    def references(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """z_text of every prompt, and z_image of the real pictures, (N, D) each."""
        z_text = self._clip.encode_text([prompt.text for prompt in self._prompts.prompts]).z_text
        return z_text.cpu().numpy(), None if self._real is None else self._real.cpu().numpy()

    def run(self, part: Part, seed: int, num_shown: int) -> None:
        """Sample one part with the seeds of ``unclip evaluate``, measure it and commit it."""
        start, names = time.monotonic(), [f"{part.name}.parquet"]
        prompts = self._prompts.prompts[part.start : part.stop]
        seeds = [picture_seed(seed, number, 0) for number in range(part.start, part.stop)]
        batch = Batch(self._clip.encode_text([prompt.text for prompt in prompts]), tuple(seeds))
        batch = batch.with_values(**self._z_image_value(part, batch))
        pictures = self._cascade.run(batch, self._cascade.after(Z_IMAGE)).images
        z_picture = self._clip.encode_image(pictures).cpu().numpy()
        rows: list[Json] = []
        for n in range(len(prompts)):
            picture = pictures[n].numpy()
            number = part.start + n
            row: Json = {"prompt_number": number, "seed": seeds[n], "z_image": z_picture[n]}
            rows.append(row | check_pixels(self._prompts, number, picture))
            if number < num_shown:
                names.append(_picture_name(part.kind, number))
                self._output.write_bytes(names[-1], to_png(picture))
        with self._output.write(names[0]) as path:
            write_rows(rows, path)
        files = {name: self._output.describe(name) for name in names}
        counts = {"in": len(rows), "ok": len(rows)}
        record = ShardRecord(shard=part.name, counts=counts, files=files, wall_s=round(time.monotonic() - start, 3))
        self._output.commit_shard(record)

    def _z_image_value(self, part: Part, batch: Batch) -> Mapping[str, Tensor]:
        """The z_image that the decoder reads; empty for ``caption``, where it takes its learned null embedding."""
        if part.kind == "z_text":
            return {Z_IMAGE: batch.text.z_text}
        if part.kind == "prior":
            return self._cascade.run(batch, [stage for stage in self._cascade.stages if stage.makes == Z_IMAGE]).values
        if part.kind == "z_image":
            assert self._real is not None
            return {Z_IMAGE: self._real[part.start : part.stop].to(batch.text.pooled.device)}
        return {}

    def _embed_real(self) -> Tensor | None:
        """z_image of each prompt's real picture, (N, D); None if a prompt has no picture."""
        prompts = self._prompts.prompts
        if all(prompt.scene is not None for prompt in prompts):
            pictures = [draw_array(prompt.scene, self._side_px) for prompt in prompts if prompt.scene is not None]
            parts = [torch.from_numpy(np.stack(pictures[i : i + 64])) for i in range(0, len(pictures), 64)]
            return torch.cat([self._clip.encode_image(part) for part in parts])
        stored = [torch.from_numpy(prompt.row.z_image.astype(np.float32)) for prompt in prompts if prompt.row]
        return torch.stack(stored) if len(stored) == len(prompts) else None


def summarise(
    output: Artifact,
    parts: list[Part],
    prompts: PromptSet,
    references: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None],
    watch: Watch,
) -> Json:
    """The numbers of every variant, and whether the paper's order holds by each of them, from the committed parts.

    ``watch`` is called as for a variant ``comparing``.
    """
    z_text, real = references
    texts = list(dict.fromkeys(prompt.text for prompt in prompts.prompts))
    own = [texts.index(prompt.text) for prompt in prompts.prompts]
    first = np.array([z_text[own.index(number)] for number in range(len(texts))])
    table: Json = {}
    columns: dict[str, dict[str, Statistic]] = {}
    counts: dict[str, int] = {}
    for variant in dict.fromkeys(part.kind for part in parts):
        rows = [row for part in parts if part.kind == variant for row in read_part(output, part)]
        z_image = np.array([row["z_image"] for row in rows], np.float64)
        values = {"clip_score": cosine(z_image, z_text), "r_precision": own_is_nearest(z_image, first, own)}
        table[variant] = {
            "clip_score": mean_of(values["clip_score"]),
            "r_precision": rate_of(bool(hit) for hit in values["r_precision"]).to_dict(),
        }
        if real is not None and len(rows) > 1:
            table[variant]["frechet_clip"] = frechet_of_rows(z_image, real)
            columns.setdefault("frechet_clip", {})[variant] = frechet_statistic(z_image, real)
            counts["frechet_clip"] = len(rows)
        checks = pixel_check(rows, prompts)
        if checks:
            table[variant]["pixel_check"] = checks
        for name, column in (values | flags_by_attribute(rows, prompts)).items():
            columns.setdefault(name, {})[variant] = mean_statistic(column)
            counts[name] = len(column)
    resamples = {"frechet_clip": NUM_FRECHET_RESAMPLES}
    measures = {
        name: Measure(variants, counts[name], resamples.get(name, NUM_RESAMPLES)) for name, variants in columns.items()
    }
    order = check_order(PAPER_ORDER, measures, partial(watch, "comparing"))
    return {"num_prompts": len(prompts.prompts), "prompts": prompts.source, "variants": table, "order": order}


def _grid(output: Artifact, variants: tuple[str, ...], prompts: PromptSet, num_shown: int) -> Any:
    """Rows are prompts, columns are variants."""
    blocks: list[Block] = []
    for number, prompt in enumerate(prompts.prompts[:num_shown]):
        names = [_picture_name(variant, number) for variant in variants]
        pictures = [decode(output.path(name).read_bytes(), where=f"{output.uri}/{name}") for name in names]
        blocks.append(Block(pictures, prompt.text, [VARIANTS[variant] for variant in variants]))
    return draw_grid(blocks, columns=1, cell_px=160)


def _picture_name(variant: str, number: int) -> str:
    return f"samples/{variant}/{number:05d}.png"
