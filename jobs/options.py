"""Arguments and options that several commands share."""

import contextlib
import json
import re
import shlex
from collections.abc import Generator, Mapping
from typing import Annotated, Any

import typer

from pipeline.addresses import HIDDEN, without_password, without_secrets, words_without_secrets
from pipeline.errors import ConfigError, UnclipError
from pipeline.recipe.last_run import PLAN
from pipeline.recipe.steps import STEP_ROWS
from pipeline.workspace.store import Workspace

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, for example configs/demo.toml.")]
RecipeOrFolder = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe file, for example configs/demo.toml; or a folder of networks.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change one field, for example --set prior.train.num_steps=500."),
]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same pictures.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Until = Annotated[
    str, typer.Option("--until", metavar="STEP", help="Run this step and what it needs, nothing after it.")
]
RayAddress = Annotated[
    str, typer.Option("--address", help="Ray cluster to join, for example auto; default: a new one on this machine.")
]
From = Annotated[
    str, typer.Option("--from", metavar="STEP", help="Start with this step; what it reads must be finished.")
]
Only = Annotated[str, typer.Option("--step", metavar="STEP", help="This step alone; what it reads must be finished.")]
Next = tuple[str, ...]
"""What a command returns: the commands, with all their words, that are useful after it."""
_OF_RECIPE = re.compile(r"(\bunclip [a-z-]+) RECIPE\b")
DASHBOARD = "http://127.0.0.1:8265"
JobAddress = Annotated[
    str,
    typer.Option("--address", help="Dashboard URL of the Ray cluster, or ssh://USER@HOST for one behind its head."),
]


def recipe_words(recipe: str, overrides: list[str] | None) -> str:
    """A recipe and its changes as words of a shell command."""
    return shlex.join([recipe, *(word for override in overrides or [] for word in ("--set", override))])


def with_recipe(text: str, words: str) -> str:
    """A text whose proposed commands have these words of a recipe in the place of RECIPE.

    It may be kept in a log that other people read, so the words are without passwords, and it says so.
    """
    shown = words_without_secrets(words)
    proposed, number = _OF_RECIPE.subn(lambda command: f"{command[1]} {shown}", text)
    return f"{proposed} ({HIDDEN})" if number and "***" in shown else proposed


@contextlib.contextmanager
def proposing(words: str) -> Generator[None]:
    """Inside the block, the commands that errors propose have these words of a recipe in the place of RECIPE."""
    try:
        yield
    except UnclipError as error:
        error.args = (with_recipe(str(error), words),)
        raise


def with_options(command: str, options: Mapping[str, str | bool]) -> str:
    """A command with those of its options that are set; one that is True has no value."""
    words = [command]
    for name, value in options.items():
        if value:
            words += [name, shlex.quote(value)] if isinstance(value, str) else [name]
    return " ".join(words)


def describe_workspace(workspace: Workspace) -> str:
    """Where the artifacts of a recipe are: a relative path depends on the folder where a person stands."""
    return f"workspace {without_password(workspace.root)}{'' if has_run(workspace) else ' (nothing is there yet)'}"


def has_run(workspace: Workspace) -> bool:
    """Whether a run has written to a workspace; `init` and `plan --time` keep only times there."""
    names = {*workspace.keys("")}
    if not STEP_ROWS.keys().isdisjoint(names):
        return True
    recipes = workspace.keys("recipes") if "recipes" in names else []
    return any(workspace.artifact("recipes", name).exists(PLAN) for name in recipes)


def require_workspace(workspace: Workspace) -> None:
    """Make sure that a run has written to a workspace, before its lock is taken, which would make the folder.

    Raises:
        ConfigError: If there is none, or its store does not answer.
    """
    workspace.check()
    if not has_run(workspace):
        raise ConfigError(f"{workspace.root}: no workspace is here; relative paths start at the folder where you are")


def print_next(*commands: str) -> None:
    """The commands that are useful now, on standard error: they are no part of what a command makes."""
    typer.echo("next:", err=True)
    for command in commands:
        typer.echo(f"  {command}", err=True)
    if any("***" in command for command in commands):  # of a job, whose log other people read
        typer.echo(f"  ({HIDDEN})", err=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=1))


def print_warning(message: str) -> None:
    """Something that a person should know, on standard error."""
    typer.echo(f"warning: {without_secrets(message)}", err=True)


def print_measured(what: str) -> None:
    """What is measured next, on standard error."""
    typer.echo(f"measuring: {what}", err=True)
