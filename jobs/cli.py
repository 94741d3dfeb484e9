"""The ``unclip`` command.

Errors that a user can mend are one message on standard error and an exit code (see ``pipeline.errors``); Ctrl-C is 130.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version as package_version
from typing import Annotated, Any, cast

import typer
import typer.core

from jobs import (
    ablate,
    cluster,
    doctor,
    edit_commands,
    exchange,
    forget,
    generate,
    index,
    inspect,
    keys,
    origins,
    promote,
    search,
    start,
)
from jobs.options import Next, print_next, proposing, recipe_words
from pipeline.data.causes import ALL
from pipeline.errors import UnclipError

# Typer carries a click of its own, and shows only some of its exceptions; this is the base class of its usage errors.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

_INTERRUPTED = 130
_CONTINUED = {"run", "evaluate", "append", "compact", "ablate"}
"""Commands that go on where they were interrupted, as some others do with an option."""
_CONTINUED_WITH = {"search": "--queries", "forget": "--compact"}

# One line of 80 columns each in `unclip --help`; the whole sentence stands in `unclip COMMAND --help`.
COMMANDS: dict[str, dict[str, tuple[Callable[..., Next], str]]] = {
    "Train": {
        "init": (start.init, "Look at your pairs, write a recipe."),
        "doctor": (doctor.doctor, "Check what would stop a run here, with mends."),
        "plan": (inspect.plan, "Show which steps would run and why, or the cost."),
        "run": (start.run, "Run every step that is not done."),
        "status": (inspect.status, "Show where every step stands."),
        "lineage": (origins.lineage, "Show what a picture or an artifact was made from."),
        "gc": (origins.gc, "List, or remove, what no recipe needs."),
        "forget": (forget.forget, "Take pairs out of everything, for good."),
        "config": (inspect.config, "Print the resolved recipe, or the schema."),
        "evaluate": (generate.evaluate, "Measure the trained cascade."),
        "promote": (promote.promote_, "Make the measured cascade the champion."),
        "ablate": (ablate.ablate, "Show what the prior is for."),
    },
    "Use": {
        "sample": (generate.sample, "Make pictures from prompts."),
        "search": (search.search, "Find the nearest pairs to a text or a picture."),
        "serve": (generate.serve, "Serve pictures, neighbours and a page over HTTP."),
        "keys": (keys.keys, "Add, list or revoke the keys of a server."),
    },
    "Index": {
        "append": (index.append, "Add the pairs of another recipe to the index."),
        "delete": (index.delete, "Take pairs out of the index, by uid or URL."),
        "restore": (index.restore, "Undo delete."),
        "compact": (index.compact, "Build the index anew, without deleted pairs."),
    },
    "Edit": {
        "vary": (edit_commands.vary, "Make variations of a picture."),
        "interpolate": (edit_commands.interpolate, "Interpolate between two pictures."),
        "text-diff": (edit_commands.text_diff, "Turn a picture from one text towards another."),
        "inpaint": (edit_commands.inpaint, "Fill the masked part of a picture."),
        "outpaint": (edit_commands.outpaint, "Extend a picture beyond its borders."),
        "sdedit": (edit_commands.sdedit, "Add noise to a picture, denoise it to a prompt."),
        "reconstruct": (edit_commands.reconstruct, "Reconstruct a picture from its latents."),
        "pca-reconstruct": (edit_commands.pca_reconstruct, "Show what components of z_image hold."),
    },
    "Exchange": {
        "export": (exchange.export, "Write the trained cascade for other programs."),
        "import": (exchange.import_, "Import networks in diffusers' layout."),
    },
    "Cluster": {
        "submit": (cluster.submit, "Run a recipe as a job on a Ray cluster."),
        "jobs": (cluster.jobs, "List the cluster's unclip jobs."),
        "logs": (cluster.logs, "Print a job's log."),
        "stop": (cluster.stop, "Stop a job; what it finished is kept."),
    },
}


def _ending(command: Callable[..., Next]) -> Callable[..., None]:
    """The command, which then prints what is useful next; with ``--json``, which is for scripts, it does not.

    What its errors propose is for its own recipe, as that was typed.
    """

    @functools.wraps(command)
    def run(**values: Any) -> None:
        recipe = values.get("recipe")
        words = values.get("shown_as") or (recipe_words(recipe, values.get("overrides")) if recipe else "RECIPE")
        with proposing(words):
            following = command(**values)
        if not values.get("json"):
            print_next(*following)

    return run


class _GroupedCommands(typer.core.TyperGroup):
    """Print the commands of the help text in groups; Typer alone does so with rich markup only."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002  (Typer's own signature)
        """Write one section for each group."""
        width = max(map(len, self.commands))
        for group, commands in COMMANDS.items():
            with formatter.section(group):
                formatter.write_dl([(f"{name:{width}}", line) for name, (_, line) in commands.items()])


app = typer.Typer(
    cls=_GroupedCommands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for table in COMMANDS.values():
    for name, (command, line) in table.items():
        app.command(name, short_help=line)(_ending(command))


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"unclip {package_version('unclip')}")
        raise typer.Exit


@app.callback()
def _main(  # pyright: ignore[reportUnusedFunction]  (typer keeps it)
    version: Annotated[bool, typer.Option("--version", callback=_print_version, help="Print the version.")] = False,
) -> None:
    """Train, search and serve your own DALL-E 2 (unCLIP) on a Ray cluster.

    Begin with: unclip run configs/demo.toml
    """


def _with_class(words: list[str]) -> list[str]:
    """The words of the command; ``--retry-failed`` without a class means all: Typer has no option like that."""
    if "--retry-failed" not in words:
        return words
    place = words.index("--retry-failed") + 1
    following = words[place : place + 1]
    is_class = bool(following) and not following[0].startswith("-") and not following[0].endswith(".toml")
    return words if is_class else [*words[:place], ALL, *words[place:]]


def main() -> None:
    """Run the command; turn errors into messages and exit codes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM is handled like Ctrl-C
    if "RAY_JOB_STOP_SIGNAL" in os.environ:  # a cluster that a script started ignores SIGINT; its jobs must not
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = app(_with_class(sys.argv[1:]), standalone_mode=False)
    except UnclipError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except _UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code itself, without a message
        command, *options = sys.argv[1:] or [""]
        names = {option.partition("=")[0] for option in options}
        continues = command in _CONTINUED or _CONTINUED_WITH.get(command) in names
        then = "; what is finished is kept, run the same command again to continue" if continues else ""
        typer.echo(f"interrupted{then}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
