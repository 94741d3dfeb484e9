"""Networks that are still in training, read from their checkpoints: ``unclip sample --at decoder@40000``.

While a decoder is trained, its upsamplers wait: its own pictures are what there is to see.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Generator, Sequence
from dataclasses import replace

from pipeline.errors import ConfigError, DataError
from pipeline.networks.files import CONFIG, WEIGHTS
from pipeline.networks.tensor_file import save_tensors
from pipeline.recipe.plan import artifact_of, finished_artifacts, make_plan, unfinished_steps
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS, STEP_ROWS
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


def as_far_as_trained(recipe: Recipe, at: Sequence[str]) -> Recipe:
    """The recipe without the upsamplers that wait for their training: its pictures end at the network before.

    Args:
        recipe: The recipe.
        at: See ``checkpoint_networks``. If it is empty, or names a network after one that waits, nothing is left out.

    Raises:
        ConfigError: If it is malformed.
        DataError: If a manifest cannot be read.
    """
    live, names = {name for name, _ in map(_parse, at)}, list(recipe.upsamplers())
    waiting = unfinished_steps(recipe, [name for name in names if name not in live]) if live else []
    left_out = names[names.index(waiting[0]) :] if waiting else []
    if not left_out or not live.isdisjoint(left_out):
        return recipe
    return replace(recipe, **dict.fromkeys(left_out))


def note_on_left_out(recipe: Recipe, at: Sequence[str]) -> str:
    """What ``as_far_as_trained`` leaves out, in words; empty if nothing.

    Raises:
        ConfigError, DataError: As ``as_far_as_trained``.
    """
    shorter = as_far_as_trained(recipe, at)
    last, model = [("decoder", shorter.decoder.model), *shorter.upsamplers().items()][-1]
    left_out = [name for name in recipe.upsamplers() if name not in shorter.upsamplers()]
    return (
        f"{left_out[0]} is not finished: the pictures are those of {last}, of {model.image_px} px" if left_out else ""
    )


def networks_of(recipe: Recipe, live: dict[str, Artifact]) -> dict[str, Artifact]:
    """The artifacts of a cascade, of which some networks are read from checkpoints.

    Raises:
        ConfigError: If another one is not finished under this recipe; names the command that finishes it, and what
            samples without that.
        DataError: If a manifest cannot be read.
    """
    names = set(CASCADE_STEPS) - live.keys()
    try:
        return finished_artifacts(recipe, names) | live
    except ConfigError as error:
        raise ConfigError(f"{error}{_way_around(recipe, unfinished_steps(recipe, names), live)}") from None


def _way_around(recipe: Recipe, missing: list[str], live: Collection[str]) -> str:
    """The end of a sentence about networks that are not finished: what samples those that are there."""
    upsamplers = list(recipe.upsamplers())
    needed = [name for name in missing if name not in upsamplers] or missing
    if needed and all(name != "clip" and checkpoint_steps(_training(recipe, name)) for name in needed):
        return f"; or take what is trained so far: {' '.join(f'--at {name}@{_LAST}' for name in needed)}"
    left_out = upsamplers[upsamplers.index(needed[0]) :] if needed and needed[0] in upsamplers else []
    if left_out and set(left_out).isdisjoint(live):
        return f"; or sample without: {' '.join(f'--set {name}=false' for name in left_out)}"
    return ""


def _training(recipe: Recipe, name: str) -> Artifact:
    step = next(step for step in make_plan(recipe) if step.name == name)
    return artifact_of(Workspace(recipe.workspace), step)


def _parse(text: str) -> tuple[str, str]:
    name, _, number = text.partition("@")
    is_number = number.isdigit() or number == _LAST
    if name not in STEP_ROWS or not STEP_ROWS[name].in_cascade or name == "clip" or not is_number:
        steps = ", ".join(row.name for row in STEP_ROWS.values() if row.in_cascade and row.name != "clip")
        raise ConfigError(f"--at {text}: write STEP@NUMBER or STEP@{_LAST}, as in decoder@40000; the steps are {steps}")
    return name, number


def _averaged(recipe: Recipe, name: str, number: str, folder: str) -> Artifact:
    if getattr(recipe, name) is None:
        raise ConfigError(f"--at {name}@{number}: this recipe has no {name}")
    training = _training(recipe, name)
    steps = checkpoint_steps(training)
    if not steps or (number != _LAST and int(number) not in steps):
        have = f"the checkpoints at {', '.join(map(str, steps))}" if steps else "no checkpoint"
        raise ConfigError(f"--at {name}@{number}: {name} has {have} under this recipe; a finished training keeps none")
    step_number = steps[-1] if number == _LAST else int(number)
    name_of_file = checkpoint_name(step_number)
    try:
        checkpoint = Checkpoint(training, name_of_file)
        average = checkpoint.read("ema")
    except (DamagedCheckpointError, DataError) as error:
        if step_number not in checkpoint_steps(training):  # the training has removed it since it was listed
            return _averaged(recipe, name, number, folder)
        why = "it cannot be read" if isinstance(error, DataError) else error
        raise DataError(f"{training.uri}/{name_of_file}: {why}; take another checkpoint") from None
    network = Artifact(f"{folder}/{training.key}@{step_number}")  # what a picture says of its networks
    network.write_whole(WEIGHTS, lambda path: save_tensors(average, path, {"format": "pt"}))
    network.write_json(CONFIG, checkpoint.network)
    return network
