"""The parts of an evaluation: each alone, in any order, to the same bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.cascade import Cascade
from models.prior.stage import PriorStage
from pipeline.errors import DataError
from pipeline.evaluate.evaluate import finish, make_runner, plan_work
from pipeline.evaluate.parts import PartRunner, picture_seed, read_part
from pipeline.evaluate.work import Part, Work, plan_parts, samples_of
from pipeline.networks.cascade import load_cascade
from pipeline.recipe.recipe import Recipe
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import evaluate_inputs


def test_plan_parts_covers_every_item_once_in_parts_of_nearly_equal_size() -> None:
    parts = plan_parts({"samples": 23, "validation": 4}, 8)
    for kind, total in (("samples", 23), ("validation", 4)):
        mine = [part for part in parts if part.kind == kind]
        assert [i for part in mine for i in range(part.start, part.stop)] == list(range(total))
        sizes = [part.stop - part.start for part in mine]
        assert max(sizes) <= 8
        assert max(sizes) - min(sizes) <= 1
    assert len({part.name for part in parts}) == len(parts)
    assert plan_parts({"samples": 0, "validation": 0}, 8) == []


def test_samples_take_every_prompt_once_and_the_shown_ones_again() -> None:
    assert samples_of(3, 2, 3) == [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    assert samples_of(1, 16, 1) == [(0, 0)]
    seeds = [picture_seed(5, i, j) for i, j in samples_of(50, 50, 4)]
    assert len(set(seeds)) == len(seeds)


def test_evaluation_in_another_order_gives_the_same_bytes(
    tiny: Recipe, evaluated: tuple[Artifact, Work, dict[str, Any]], tmp_path: Path
) -> None:
    first, work, _ = evaluated
    output, inputs = Artifact(str(tmp_path)), evaluate_inputs(tiny)
    runner = make_runner(tiny, inputs, output, plan_work(tiny, inputs))
    for part in reversed(work.parts):
        record = runner.run(part)
        assert output.shard_records()[part.name] == record
        assert record.counts["ok"] == part.stop - part.start
    finish(tiny, inputs, output, work)
    before = {name: info for name, info in first.describe_files().items() if not name.endswith(".done.json")}
    after = {name: info for name, info in output.describe_files().items() if not name.endswith(".done.json")}
    assert before == after


def test_a_sample_can_be_made_again_alone_from_its_seed(
    cascade: Cascade, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    output, _, _ = evaluated
    row = json.loads(output.path("samples.jsonl").read_text().splitlines()[4])
    alone = cascade.sample([row["prompt"]], [row["seed"]]).images[0].numpy().astype(int)
    with Image.open(output.path(row["file"])) as image:
        # Rounding of another batch size may move the 8-bit condition of an upsampler by one level at single pixels, which
        # random weights enlarge.
        assert np.abs(alone - np.asarray(image).astype(int)).mean() < 0.1


def test_a_broken_part_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    output = Artifact(str(tmp_path))
    output.write_bytes("parts/samples-00002.parquet", b"nothing")
    with pytest.raises(DataError, match="samples-00002"):
        read_part(output, Part("samples", 2, 0, 1))


def test_a_network_that_draws_nan_is_a_data_error_that_names_it(tiny: Recipe, tmp_path: Path) -> None:
    output, inputs = Artifact(str(tmp_path)), evaluate_inputs(tiny)
    work = plan_work(tiny, inputs)
    cascade = load_cascade({name: inputs[name] for name in tiny.trained()})
    cascade.stage("prior", PriorStage).network.out.bias.fill_(float("nan"))
    runner = PartRunner(cascade, work, inputs["download"], output, tiny.seed)
    with pytest.raises(DataError, match="the prior gives numbers that are not finite"):
        runner.run(work.parts[0])
    assert output.shard_records() == {}
