"""``unclip keys``: who may use a server."""

import shlex
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from jobs.options import AsJson, Next, print_json
from pipeline.errors import ConfigError
from pipeline.serve.keys import SCOPES, Scope, add_key, read_keys, revoke_key

_PER_MINUTE = "a minute; 0: no limit."


def keys(
    action: Annotated[Literal["add", "list", "revoke"], typer.Argument(metavar="add|list|revoke", help="What to do.")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file of keys, as in serve.keys.")],
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Whose key it is.")] = "",
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help=f"What it opens: {', '.join(SCOPES)}; default: all of them.")
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=0, help=f"Most requests {_PER_MINUTE}")] = 0,
    pixels: Annotated[int, typer.Option("--pixels", min=0, help=f"Most pixels of pictures {_PER_MINUTE}")] = 0,
    num_bytes: Annotated[int, typer.Option("--bytes", min=0, help=f"Most bytes of bodies {_PER_MINUTE}")] = 0,
    json: AsJson = False,
) -> Next:
    """Add, list or revoke the keys of a server. The file holds digests: a key is printed once, by add.

    Example: unclip keys add keys.json alice --scope images --requests 60
    """
    file = shlex.quote(str(path))
    if action == "list":
        rows = [
            (key.name, key.created, ",".join(key.scopes), key.requests, key.pixels, key.bytes)
            for key in read_keys(path)
        ]
        if json:
            columns = ("name", "created", "scopes", "requests", "pixels", "bytes")
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
            return ()
        for whose, created, opens, *limits in rows:
            used = " ".join(
                f"{unit}={limit or '-'}" for unit, limit in zip(("requests", "pixels", "bytes"), limits, strict=True)
            )
            typer.echo(f"{whose:20} {created} {opens} {used}")
        return (f"unclip keys add {file} NAME", f"unclip keys revoke {file} NAME")
    if not name:
        raise ConfigError(f"keys {action}: say whose key: unclip keys {action} {file} NAME")
    if action == "revoke":
        revoke_key(path, name)
        typer.echo(f"{name} is revoked; running servers refuse the key from now on", err=True)
        return (f"unclip keys list {file}",)
    unknown = sorted({*(scopes or [])} - {*SCOPES})
    if unknown:
        raise ConfigError(f"--scope {unknown[0]}: one of {', '.join(SCOPES)}")
    secret = add_key(
        path, name, cast("list[Scope]", scopes) or SCOPES, requests=requests, pixels=pixels, bytes=num_bytes
    )
    if json:
        print_json({"name": name, "key": secret})
        return ()
    typer.echo(secret)
    typer.echo(f"the key of {name}; it is shown only now", err=True)
    return (f"unclip serve RECIPE --set serve.keys={file}", f"unclip keys list {file}")
