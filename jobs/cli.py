"""The ``unclip`` command.

Errors that a user can mend are one message on standard error and an exit code (see ``pipeline.errors``); Ctrl-C is 130.
"""

import sys
from importlib.metadata import version as package_version
from typing import Annotated, cast

import typer

from jobs import ablate, cluster, data, edits, exchange, generate, inspect, start
from pipeline.errors import UnclipError

# Typer carries a click of its own, and shows only some of its exceptions; this is its base of all wrong usage.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)

_INTERRUPTED = 130

app = typer.Typer(
    help="Train, search and serve your own DALL-E 2 (unCLIP) on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    *(start.init, start.run),
    *(inspect.plan, inspect.status, inspect.config),
    *(generate.sample, data.search, generate.evaluate, ablate.ablate, generate.serve),
    exchange.export,
    *(cluster.submit, cluster.jobs, cluster.logs, cluster.stop),
    *(edits.reconstruct, edits.vary, edits.interpolate, edits.text_diff, edits.inpaint, edits.outpaint),
    *(edits.sdedit, edits.pca_reconstruct),
):
    app.command()(command)
app.command("import")(exchange.import_)


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
