"""A training through Ray beside its bare step: what loop, reader, reports and Ray Train cost, on the CPU.

    python -m benchmarks.loop [--rounds 5] [--steps 80]

A small upsampler is trained on few pictures, which are decoded once, as `unclip run` trains it: by one worker with two
threads, and by two workers with one. The bare step is written out below: forward, backward, AdamW and average of the
same network on one batch that stays in memory, started by ``torchrun`` and wrapped in DistributedDataParallel where
there are two of them. Both run one after the other in each round, in an order that changes, with nothing of the other
alive. Seconds of a step are the median over the lines of the curve, ten steps each, after the first ones, so that
neither a start counts nor what happens once in a training (the product that the share of the peak is read from).

Required: one worker takes less than 3 % more than the bare step; two are at least .97 times as quick as ``torchrun``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reader import write_pictures
from benchmarks.side_by_side import publish
from models.layers.ema import create_average
from pipeline.data.batches import plan_order
from pipeline.data.order import Share
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext
from pipeline.runtime.train import run_training
from pipeline.train.assemble import TrainJob, assemble
from pipeline.train.loop import random_of_step
from pipeline.workspace.progress import METRICS
from tests.tiny.recipe import tiny_tables

_STEP = "upsampler_1"
_LOG_EVERY = 10
_WARM_STEPS = 20
_PICTURES = 64
_LEAST_RATIO = {1: 1 / 1.03, 2: 0.97}
_CORES = 2


@dataclass(frozen=True)
class Sizes:
    """The sizes of the network and of its batch."""

    channels: int = 64
    image_px: int = 64
    batch_size: int = 8


def context_of(workspace: Path, num_workers: int, num_steps: int, sizes: Sizes) -> StepContext:
    """The training of the upsampler in a workspace, which ``write_pictures`` has filled."""
    unet = {"channels": sizes.channels, "channel_mults": [1, 2], "dropout": 0.0, "norm_groups": 8}
    low_res_px = sizes.image_px // 4
    resources = {"num_workers": num_workers, "cpus_per_worker": _CORES / num_workers, "log_every_steps": _LOG_EVERY}
    upsampler = {
        "model": {"low_res_px": low_res_px, "image_px": sizes.image_px, "crop_px": sizes.image_px // 2, "unet": unet},
        "train": {"num_steps": num_steps, "batch_size": sizes.batch_size},
        "resources": resources,
    }
    tables = tiny_tables(
        workspace,
        download={"image_px": sizes.image_px},
        decoder={"model": {"image_px": low_res_px, "unet": {"attention_resolutions": [low_res_px // 2]}}},
        upsampler_1=upsampler,
        upsampler_2=None,
    )
    recipe = parse_recipe(tables)
    return StepContext(recipe, next(step for step in make_plan(recipe) if step.name == _STEP), recipe.workspace)


def ours(context: StepContext) -> float:
    """Seconds of a step of the training on Ray."""
    with connect():
        run_training(context)
    curve = context.output.path(METRICS).read_text().splitlines()
    rows = [row for row in map(json.loads, curve) if "loss" in row]
    return _step_s([(row["step"], row["time"]) for row in rows])


def theirs(workspace: Path, num_workers: int, num_steps: int, sizes: Sizes) -> float:
    """Seconds of a step by ``torchrun``, or by Python alone for one process."""
    out = workspace / "bare.json"
    command = [sys.executable]
    if num_workers > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    settings = {"num_workers": num_workers, "num_steps": num_steps, "sizes": vars(sizes)}
    command += ["-m", "benchmarks.loop", "--bare", str(workspace), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": str(_CORES // num_workers)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return _step_s(json.loads(out.read_text()))


def _step_s(curve: list[tuple[int, float]]) -> float:
    warm = [line for line in curve if line[0] >= _WARM_STEPS]
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(warm))


def run_bare(workspace: Path, num_workers: int, num_steps: int, sizes: Sizes) -> None:
    """The bare step, again and again, in one of the processes; the first writes when its steps were done."""
    rank = int(os.environ.get("RANK", "0"))
    if num_workers > 1:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(_CORES // num_workers)
    context = context_of(workspace, num_workers, num_steps, sizes)
    job = TrainJob(_STEP, context.recipe, context.inputs, context.output, "key", torch.device("cpu"))
    parts, share = assemble(job), Share(sizes.batch_size, rank, num_workers)
    network = parts.network
    objective: nn.Module = parts.objective(network).train()
    if num_workers > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    average = create_average(network)
    weights, averages = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    batch = parts.train.batch(plan_order(parts.train, 0, where="bare").locations(share.start, share.stop))
    curve: list[tuple[int, float]] = []
    for step in range(1, num_steps + 1):
        loss = objective(batch, random_of_step(0, step, share))
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 0.001)
        if step % _LOG_EVERY == 0:
            loss.item()
            curve.append((step, time.time()))
    if rank == 0:
        (workspace / "bare.json").write_text(json.dumps(curve))


def run(rounds: int, num_steps: int, sizes: Sizes) -> list[dict[str, Any]]:
    """One row for each number of workers."""
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for number in range(rounds):
        for num_workers, pairs in times.items():
            with tempfile.TemporaryDirectory() as folder:
                context = context_of(Path(folder), num_workers, num_steps, sizes)
                write_pictures(Path(context.inputs["download"].uri), _PICTURES)
                pair = [0.0, 0.0]
                for who in ((0, 1), (1, 0))[number % 2]:
                    bare = (Path(folder), num_workers, num_steps, sizes)
                    pair[who] = theirs(*bare) if who else ours(context)
                pairs.append((pair[0], pair[1]))
    return [_row(num_workers, pairs) for num_workers, pairs in times.items()]


def _row(num_workers: int, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [bare / trained for trained, bare in pairs]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    row: dict[str, Any] = {"workers": num_workers, "training_step_s": statistics.median(a for a, _ in pairs)}
    row |= {"bare_step_s": statistics.median(b for _, b in pairs), "ratio": ratio, "low": low, "high": high}
    return row | {"floor": _LEAST_RATIO[num_workers], "rounds": len(pairs)}


def main() -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        settings = json.loads(arguments.bare[1])
        sizes = Sizes(**settings.pop("sizes"))
        run_bare(Path(arguments.bare[0]), **settings, sizes=sizes)
        return
    settings = {"rounds": arguments.rounds, "steps": arguments.steps}
    publish("loop", run(arguments.rounds, arguments.steps, Sizes()), settings)


if __name__ == "__main__":
    main()
