"""Networks that are still in training, read from their checkpoints: ``unclip sample --at decoder@40000``."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Sequence

from pipeline.errors import ConfigError, DataError
from pipeline.networks.files import CONFIG, WEIGHTS
from pipeline.networks.tensor_file import save_tensors
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import STEP_ROWS
from pipeline.train.checkpoint import Checkpoint, DamagedCheckpointError
from pipeline.train.resume import checkpoint_name, checkpoint_steps
from pipeline.workspace.store import Artifact, Workspace

_LAST = "last"


@contextlib.contextmanager
def checkpoint_networks(recipe: Recipe, at: Sequence[str]) -> Generator[dict[str, Artifact]]:
    """The averaged networks of checkpoints as artifacts of the block, by step name.

    Args:
        recipe: The recipe whose steps are in training.
        at: STEP@NUMBER each; ``last`` in place of a number is the newest checkpoint.

    Raises:
        ConfigError: If a step has no such checkpoint; names those that it has.
        DataError: If the checkpoint is damaged.
    """
    with contextlib.ExitStack() as folders:
        yield {
            name: _averaged(recipe, name, number, folders.enter_context(tempfile.TemporaryDirectory(prefix="unclip-")))
            for name, number in map(_parse, at)
        }


def _parse(text: str) -> tuple[str, str]:
    name, _, number = text.partition("@")
    is_number = number.isdigit() or number == _LAST
    if name not in STEP_ROWS or not STEP_ROWS[name].in_cascade or name == "clip" or not is_number:
        steps = ", ".join(row.name for row in STEP_ROWS.values() if row.in_cascade and row.name != "clip")
        raise ConfigError(f"--at {text}: write STEP@NUMBER or STEP@{_LAST}, as in decoder@40000; the steps are {steps}")
    return name, number


def _averaged(recipe: Recipe, name: str, number: str, folder: str) -> Artifact:
    step = next((step for step in make_plan(recipe) if step.name == name), None)
    if step is None:
        raise ConfigError(f"--at {name}@{number}: this recipe has no {name}")
    training = artifact_of(Workspace(recipe.workspace), step)
    steps = checkpoint_steps(training)
    if not steps or (number != _LAST and int(number) not in steps):
        have = f"the checkpoints at {', '.join(map(str, steps))}" if steps else "no checkpoint"
        raise ConfigError(f"--at {name}@{number}: {name} has {have} under this recipe; a finished training keeps none")
    step_number = steps[-1] if number == _LAST else int(number)
    name_of_file = checkpoint_name(step_number)
    try:
        checkpoint = Checkpoint(training, name_of_file)
        average = checkpoint.read("ema")
    except DamagedCheckpointError as error:
        raise DataError(f"{training.uri}/{name_of_file}: {error}; take another checkpoint") from None
    network = Artifact(f"{folder}/{step.key}@{step_number}")  # what a picture says of its networks
    network.write_whole(WEIGHTS, lambda path: save_tensors(average, path, {"format": "pt"}))
    network.write_json(CONFIG, checkpoint.network)
    return network
