"""The user's files that a recipe names: what stands for them in a key, and what a plan says of them."""

from pathlib import Path
from typing import Any

from pipeline.addresses import without_password
from pipeline.errors import ConfigError
from pipeline.recipe.initial_files import CHECKPOINTS, num_files
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.sections import StepSection
from pipeline.recipe.steps import STEPS, StepRow
from pipeline.recipe.train_sections import is_checkpoint
from pipeline.workspace.digests import fingerprint, unseen_files
from pipeline.workspace.files import exists

Json = dict[str, Any]


def local_inputs(row: StepRow, section: StepSection, where: str = "") -> Json:
    """Fingerprints of the user's files that a section names; in the key they replace the paths."""
    entries: Json = {}
    for name, path in section.local_paths(row.files).items():
        if not exists(path):
            mend = "relative paths start at the folder where you run unclip"
            if name == "init_from" and is_checkpoint(path):
                mend += (
                    ". A training removes its old checkpoints: name a copy (the same content goes on with the same "
                    "training; of a divided state, NUMBER.*, copy all files), another checkpoint, or the folder of a "
                    "network"
                )
            raise ConfigError(f"{row.name}: {where}{path} does not exist; {mend}")
        content = [fingerprint(file, section.known_by_size) for file in section.files_in_key(path)]
        entries |= {name: section.path_in_key(path), row.files[name]: content if len(content) > 1 else content[0]}
    return entries


def unseen_inputs(recipe: Recipe) -> list[str]:
    """A sentence for each of the user's inputs of which the plan knows less than the content."""
    notes: list[str] = []
    for row in STEPS:
        section: StepSection | None = getattr(recipe, row.name)
        if section is None:
            continue
        for path in [path for one in section.each() for path in one.local_paths(row.files).values()]:
            if files_by_size := unseen_files(path, section.known_by_size):
                first = without_password(str(files_by_size[0]))
                files = f"{len(files_by_size)} files, such as {first}," if len(files_by_size) > 1 else first
                notes.append(
                    f"{row.name}: a change of {files} is noticed only by its size: the content is not looked at"
                )
    return notes


def passing_inputs(recipe: Recipe) -> list[str]:
    """A sentence for each checkpoint of a running training that another one starts from: it will be removed.

    The key of the other one holds its content, so there is no plan without it, also when that training has begun.
    """
    return [
        f"{name}: init_from {without_password(path)} is removed when its training is beyond it, and this recipe has no "
        "plan without it: "
        f"{_to_copy(path)} elsewhere and name the copy (the same content goes on with the same training)"
        for name, section in recipe.trained().items()
        if is_checkpoint(path := getattr(section, "init_from", "")) and CHECKPOINTS in path
    ]


def _to_copy(path: str) -> str:
    """The words for copying a checkpoint, all files of it."""
    count = num_files(path)
    return "copy it" if count == 1 else f"copy its {count} files ({Path(path).stem}.*) under their names"
