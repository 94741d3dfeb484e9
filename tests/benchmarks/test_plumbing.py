"""Every benchmark runs, at a size at which its numbers mean nothing, and says what its JSON holds."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import side_by_side
from benchmarks.loop import Sizes
from benchmarks.loop import run as run_loop
from benchmarks.memory import run as run_memory
from benchmarks.recovery import PARTS, divided, parts_noted, times_of
from benchmarks.refusals import BODIES, measure, running
from benchmarks.sampler_steps import DecoderQuality
from benchmarks.sampler_steps import run as run_sampler_steps
from benchmarks.serving import load_networks, steps_after_leaving
from benchmarks.serving import rates as serving_rates
from benchmarks.serving_crowds import differences
from benchmarks.side_by_side import compare, publish
from benchmarks.token_states import run as run_token_states
from benchmarks.train_step import DECODER, PRIOR
from benchmarks.train_step import run as run_train_step
from models.diffusion.samplers import SAMPLERS
from pipeline.recipe.recipe import parse_recipe
from tests.ports import free_port
from tests.tiny.command import ROOT
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import train_here, upsampler_context
from tests.tiny.workspace import served_workspace

DECODER_TINY = replace(
    DECODER, image_px=8, unet=replace(DECODER.unet, channels=8, channel_mults=(1, 2), attention_resolutions=(4,),
                                      head_channels=8, norm_groups=4),
)  # fmt: skip


def test_compare_takes_turns_and_gives_the_median_of_the_ratios() -> None:
    calls: list[str] = []

    def wait(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    comparison = compare("sleep", lambda: wait("ours", 0.01), lambda: wait("theirs", 0.02), rounds=4, floor=1.0)
    assert calls[2:] == ["ours", "theirs", "theirs", "ours"] * 2
    assert 1.2 < comparison.ratio < 3
    assert comparison.low <= comparison.ratio <= comparison.high


def test_refused_bodies_are_measured_in_a_server_of_its_own() -> None:
    with running() as (url, server):
        row = measure("no JSON", BODIES["no JSON"], url, server, 2)
    assert row["status"] == 400
    assert 0 < row["wall_ms"] <= row["wall_ms_90"]
    assert row["memory_mb"] > 1e-6 * len(BODIES["no JSON"])  # it holds the body


def test_publish_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    comparison = json.loads(publish("some", [{"way": "a", "ratio": 1.23456}], {"rounds": 1}).read_text())
    assert comparison["rows"] == [{"way": "a", "ratio": 1.23456}]
    assert comparison["versions"]["torch"] == torch.__version__
    assert "1.235" in capsys.readouterr().out


def test_train_step_compares_equal_networks() -> None:
    rows = run_train_step(1, 2, replace(PRIOR, width=16, depth=1, num_heads=2), DECODER_TINY)
    assert [row.name for row in rows] == ["prior", "decoder"]
    assert all(row.ratio > 0 for row in rows)


def test_token_states_give_the_same_step_from_the_same_files() -> None:
    [row] = run_token_states(1, 2, sizes=((64, 1),), rows=8)
    assert row["ratio"] > 0
    assert row["row_bytes"] > 7 * 2 * 64  # the shortest caption


_SAMPLING = """
from dataclasses import replace
import torch
from benchmarks.sampling import DEMO, load_pipeline, make_cascade, run, share_pipeline
tiny = replace(DEMO, num_images=1, **{
    name: replace(getattr(DEMO, name), sampler=replace(getattr(DEMO, name).sampler, num_steps=2))
    for name in ("prior", "decoder", "upsampler")
})
[row] = run(tiny, 1, share=True)
assert row.ratio > 0 and row.floor == 1.2, row
cascade = make_cascade(tiny)
pictures = []
for make in (load_pipeline, share_pipeline):
    pipe = make(cascade, cascade.clip)
    steps = dict.fromkeys([f"{name}_num_inference_steps" for name in ("prior", "decoder", "super_res")], 2)
    pictures.append(pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="pt", **steps).images)
assert pictures[0].std() > 0.01
torch.testing.assert_close(*pictures)
"""


def test_sampling_compares_with_a_pipeline_on_shared_weights_that_samples_the_exported_pictures() -> None:
    comparison = subprocess.run(
        [sys.executable, "-c", _SAMPLING], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert comparison.returncode == 0, comparison.stderr


def test_memory_of_recomputed_activations_is_below_that_of_kept_ones() -> None:
    rows = {row["way"]: row["peak_bytes"] for row in run_memory(DECODER_TINY, 8)}
    assert 0 < rows["ours, recomputed"] < rows["ours, kept"]


def test_sampler_steps_compares_every_sampler(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path, port=free_port(), overrides=("pairs.validation_prob=0",))
    quality = DecoderQuality(recipe, 8, 4, split="train")
    rows = run_sampler_steps(quality, [2], 3)
    assert [row["sampler"] for row in rows] == ["ddpm", *SAMPLERS]
    assert all(0 < row["frechet_distance"] < math.inf for row in rows)
    assert rows[0]["of_reference"] == 1


def test_serving_compares_crowds_with_the_bare_sampler(tmp_path: Path) -> None:
    cascade = load_networks(served_workspace(tmp_path, port=free_port()))
    prompts = ["a", "b", "c"]
    rows = serving_rates(cascade, prompts, 0.01, 1, sizes=(2,))
    assert [row["what"] for row in rows] == [
        f"3 clients, {begin}: share of the bare rate in batches of {size}"
        for begin in ("together", "apart")
        for size in (2, 3)
    ]
    assert all(0 < row["value"] < 3 for row in rows)
    assert steps_after_leaving(cascade, "a", 2, 5)["value"] <= 1


def test_serving_crowds_compares_pictures_of_random_requests_with_the_same_alone(tmp_path: Path) -> None:
    cascade = load_networks(served_workspace(tmp_path, port=free_port()))
    levels = differences(cascade, 1, 8)
    assert levels.rows / levels.steps > 1
    assert levels.pictures >= 4
    assert levels.largest < 16
    assert levels.psnr_db(levels) == [pytest.approx(108.13, abs=0.01)] * levels.pictures  # no noise
    levels.add(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 20, np.uint8), (9, 9))
    assert levels.largest == 20
    assert levels.different >= 12


def test_gpu_benchmark_counts_and_times_on_any_device(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    sizes = ["--steps", "1", "--batch-size-decoder", "2", "--batch-size-prior", "2"]
    arguments = ["-m", "benchmarks.gpu", "--tiny", "--compile", "none", "--device", "cpu", *sizes, "--out", str(out)]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    comparison = json.loads(out.read_text())
    assert [row["network"] for row in comparison["rows"]] == ["decoder", "prior"]
    for row in comparison["rows"]:
        assert row["tflop_s"] == pytest.approx(row["tflop_a_step"] / row["step_s"])
        assert row["tflop_s"] / row["of_measured_peak"] == pytest.approx(row["peak_tflop_s"])  # rows may be merged


def test_a_recovery_is_divided_up_to_the_end_of_the_first_step(tmp_path: Path) -> None:
    context = upsampler_context(parse_recipe(tiny_tables(tmp_path / "workspace")))
    killed = time.time()
    with parts_noted(tmp_path):
        before = train_here(context)["num_steps"]
        assert len(list(tmp_path.glob("*-*"))) == len(PARTS)
    times = [times_of(tmp_path, part, killed) for part in PARTS]
    assert before > 1
    assert times == sorted(times)
    assert {len(of_part) for of_part in times} == {1}
    row = divided(tmp_path, killed, killed)
    assert sum(row[f"{part}_s"] for part in PARTS) == pytest.approx(row["next_step_s"])
    assert row["first_step_s"] > 0
    assert times_of(tmp_path, PARTS[-1], time.time()) == []  # those of the workers before the kill


_SERVING_DIFFUSERS = """
from dataclasses import replace
from benchmarks import serving_diffusers
from benchmarks.serving_diffusers import Setting, demo, measure

if __name__ == "__main__":
    size = serving_diffusers._with_steps(demo(), 2, 2, 2)
    rows = {row["what"].partition(":")[0]: row for row in measure(Setting(size, "cpu", "float32", 1, clients=2), 1)}
    assert abs(rows["parameters, M"]["ratio"] - 1) < 1e-3, rows
    assert 0.9 < rows["GFLOP of a picture"]["ratio"] < 1.2, rows
    assert rows["2 clients, a picture each"]["ratio"] > 0, rows
"""


@pytest.mark.slow
def test_our_server_and_that_of_diffusers_have_the_same_networks(tmp_path: Path) -> None:
    script = tmp_path / "serving.py"
    script.write_text(_SERVING_DIFFUSERS)
    command = [sys.executable, str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_training_and_its_bare_step_are_timed_in_turns() -> None:
    rows = run_loop(1, 40, Sizes(channels=8, image_px=32, batch_size=4))
    assert [row["workers"] for row in rows] == [1, 2]
    assert all(row["training_step_s"] > 0 and row["bare_step_s"] > 0 for row in rows)
    assert all(row["ratio"] == pytest.approx(row["bare_step_s"] / row["training_step_s"]) for row in rows)
