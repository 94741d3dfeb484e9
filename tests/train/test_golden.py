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
    "clip": [3.544276, 3.403224, 1.684599, 2.435634, 1.544958, 2.333394, 0.740994],
    "prior": [0.2889062, 0.2898844, 0.2899296, 0.2899036, 0.2866648, 0.282692, 0.2948527],
    "prior_2": [2.772589, 2.761854, 2.75145, 2.734217, 2.71796, 2.699945, 2.698027],
    "decoder": [0.9964976, 1.000664, 0.9820782, 1.007199, 0.9789057, 0.9784674, 1.016572],
    "decoder bound": [6.715414, 6.311505, 6.837789, 6.836647, 7.029884, 7.432332, 16.3606],
    "noisy_clip": [1.819342, 1.574606, 2.586985, 2.46692, 1.592486, 1.330667, 0.9685744],
    "upsampler_1": [0.9759706, 0.9243678, 1.016228, 0.9226224, 0.9189795, 0.9427599, 0.9942789],
    "upsampler_2": [0.9967943, 1.042373, 1.032829, 0.9509355, 0.9510211, 0.9121865, 1.067377],
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
