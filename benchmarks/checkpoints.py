"""How long a training waits for a checkpoint, and where the time goes, on the CPU.

    python -m benchmarks.checkpoints [--steps 40]

A small decoder is trained; a checkpoint of weights, average and moments is written in the background, and by the same
code while the training waits. Shares are of the time between two checkpoints at the default of 200 steps. Floor: the
training waits for less than 0.01 of it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sharding import CONFIG, DIMS, DecoderLoss
from benchmarks.side_by_side import publish
from models.decoder.network import Decoder
from models.layers.ema import update_average
from pipeline.recipe.train_sections import TrainConfig, TrainResources
from pipeline.train.checkpoint import Snapshot
from pipeline.train.resume import CheckpointWriter, Keep, checkpoint_name
from pipeline.train.state import create_state
from pipeline.workspace.store import Artifact

SAVE_EVERY_STEPS = TrainResources().save_every_steps


def run(num_steps: int) -> list[dict[str, Any]]:
    """One row for each part of the time, of one checkpoint."""
    torch.manual_seed(0)
    network = Decoder(CONFIG, DIMS)
    objective = DecoderLoss(network).train()
    state = create_state(network, TrainConfig(), torch.device("cpu"))

    def step() -> None:
        objective().backward()
        state.clip_gradients(1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        update_average(state.average_pairs, 0.9, 1)
        state.step += 1

    steps = [_time(step) for _ in range(num_steps)][1:]
    between_s = SAVE_EVERY_STEPS * statistics.median(steps)
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Artifact(folder), "key", Keep(1)) as writer:
        state.step = 1
        save_s = _time(lambda: writer.save(state))
        beside = [_time(step) for _ in range(num_steps)]
        wait_s = _time(writer.wait)
        copy_s = _time(lambda: Snapshot.of(state))
        snapshot = Snapshot.of(state)
        write_s = _time(lambda: snapshot.publish(Artifact(folder), checkpoint_name(state.step), "key"))
    slower_s = max(0.0, sum(beside) - num_steps * statistics.median(steps))
    rows = (
        ("step", statistics.median(steps), None),
        ("background: the training waits", save_s + (wait_s if wait_s > 1e-3 else 0.0), 0.01),
        ("background: steps are slower beside it, in all", slower_s, None),
        ("waiting: copy to memory", copy_s, None),
        ("waiting: checksums and file", write_s, None),
    )
    return [
        {"part": name, "seconds": seconds, "share": seconds / between_s, "below": most} for name, seconds, most in rows
    ]


def _time(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def main() -> None:
    """Parse, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    publish("checkpoints", run(arguments.steps), vars(arguments))


if __name__ == "__main__":
    main()
