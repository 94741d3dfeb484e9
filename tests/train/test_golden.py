"""The first losses of every network, seed fixed: what changes them changes what all trainings come to.

To accept a change on purpose: ``python -m tests.train.test_golden`` prints the new numbers.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.train.job import run_job
from pipeline.workspace.progress import METRICS
from tests.tiny.training import no_watch, tiny_inputs, tiny_job

GOLDEN: dict[str, list[float]] = {
    "clip": [3.544273, 3.403224, 1.684599, 2.435634, 1.54495, 2.333405, 0.7409936],
    "prior": [0.2889062, 0.2896253, 0.2861, 0.2911749, 0.2899684, 0.2890109, 0.2931752],
    "prior_2": [2.772589, 2.760818, 2.752224, 2.735273, 2.717986, 2.702336, 2.698458],
    "decoder": [1.050873, 1.06157, 0.910724, 0.9722837, 0.941978, 1.027317, 0.9792284],
    "decoder bound": [6.855731, 9.445711, 7.409093, 7.162755, 7.132129, 7.404533, 8.377098],
    "noisy_clip": [1.845504, 2.031462, 2.039018, 2.850035, 1.460197, 1.180561, 0.4109738],
    "upsampler_1": [0.9628787, 0.9392475, 1.04289, 1.011, 0.9879042, 0.913839, 1.00717],
    "upsampler_2": [0.9785941, 0.9803533, 0.9977053, 1.073629, 1.002173, 0.9655851, 0.95495],
}
"""Measured on one thread; without AVX-512, and without AVX, they differ by 2.4e-5 (clip) and 1e-7 (the others) at most."""


def losses(name: str, folder: Path) -> list[float]:
    """The loss of each of six steps, then the validation loss of the average."""
    job = tiny_job(name, tiny_inputs(folder), folder / name)
    run_job(job, no_watch)
    rows = [json.loads(line) for line in job.output.path(METRICS).read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row] + [rows[-1]["val_loss"]]


@pytest.mark.parametrize("name", GOLDEN)
def test_first_losses_are_the_known_ones(name: str, tmp_path: Path) -> None:
    assert losses(name, tmp_path) == pytest.approx(GOLDEN[name], rel=1e-4)


if __name__ == "__main__":
    for network in GOLDEN:
        with tempfile.TemporaryDirectory() as place:
            numbers = ", ".join(f"{loss:.7g}" for loss in losses(network, Path(place)))
            sys.stdout.write(f'    "{network}": [{numbers}],\n')
