"""The ``unclip`` command.

Errors that a user can mend are one message on standard error and an exit code (see ``pipeline.errors``); Ctrl-C is 130.
"""

import os
import signal
import sys
from importlib.metadata import version as package_version
from typing import Annotated, cast

import typer

from jobs import ablate, cluster, edits, exchange, generate, inspect, start
from jobs import search as data
from pipeline.errors import UnclipError

# Typer carries a click of its own, and shows only some of its exceptions; this is its base of all wrong usage.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# One line of 80 columns each in `unclip --help`; the whole sentence stands in `unclip COMMAND --help`.
for command, line in (
    (start.init, "Look at your pairs, write a recipe."),
    (start.run, "Run every step that is not done."),
    (inspect.plan, "Show which steps would run and why, or the cost."),
    (inspect.status, "Show where every step stands."),
    (inspect.config, "Print the resolved recipe, or the schema."),
    (generate.sample, "Draw prompts with the trained cascade."),
    (data.search, "Find the nearest pairs to a text or a picture."),
    (generate.evaluate, "Measure the trained cascade."),
    (ablate.ablate, "Show what the prior is for."),
    (generate.serve, "Serve pictures, neighbours and a page over HTTP."),
    (edits.reconstruct, "Draw a picture again from its latents."),
    (edits.vary, "Draw variations of a picture."),
    (edits.interpolate, "Draw the way from one picture to another."),
    (edits.text_diff, "Turn a picture from one text towards another."),
    (edits.inpaint, "Draw the masked part of a picture anew."),
    (edits.outpaint, "Draw what is around a picture."),
    (edits.sdedit, "Noise a picture, draw it from there."),
    (edits.pca_reconstruct, "Draw what components of z_image hold."),
    (cluster.submit, "Run a recipe as a job on a Ray cluster."),
    (cluster.jobs, "List the cluster's unclip jobs."),
    (cluster.logs, "Print a job's log."),
    (cluster.stop, "Stop a job; what it finished is kept."),
    (exchange.export, "Write the trained cascade for other programs."),
):
    app.command(short_help=line)(command)
app.command("import", short_help="Take over networks in diffusers' layout.")(exchange.import_)


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


def main() -> None:
    """Run the command; turn errors into messages and exit codes."""
    if "RAY_JOB_STOP_SIGNAL" in os.environ:  # the cluster may ignore Ctrl-C (a script started it): not its jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = app(standalone_mode=False)
    except UnclipError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except _UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code itself, without a word
        typer.echo("interrupted; what is finished is kept, run the same command again to continue", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
