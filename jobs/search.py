"""``unclip search``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jobs.options import AsJson, Next, Overrides, RayAddress, RecipePath, print_json, recipe_words
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pipeline.retrieve.index import Neighbour

_CAPTION_COLUMNS = 60


def search(
    recipe: RecipePath,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="What to look for.")] = None,
    images: Annotated[
        list[str] | None, typer.Option("--image", metavar="FILE", help="Picture to look for.", show_default=False)
    ] = None,
    embeddings: Annotated[
        list[str] | None,
        typer.Option("--embedding", metavar="FILE", help="Vector to look for, .npy or .json.", show_default=False),
    ] = None,
    uids: Annotated[
        list[str] | None,
        typer.Option("--uid", metavar="UID", help="Pair of the index to look for.", show_default=False),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="Weights of several, as 1,-0.5: the texts first, then --image, --embedding, --uid; default: 1 each.",
        ),
    ] = "",
    num_results: Annotated[int, typer.Option("-k", min=1, help="Neighbours to find.")] = 10,
    modality: Annotated[
        Literal["image", "text"], typer.Option("--modality", help="Search pictures (image) or captions (text).")
    ] = "image",
    where: Annotated[
        str,
        typer.Option(
            "--where",
            metavar="EXPRESSION",
            help="Keep rows for which it holds, as \"width >= 512 and split == 'train'\".",
        ),
    ] = "",
    distinct: Annotated[
        float | None,
        typer.Option(
            "--distinct",
            min=0,
            max=1,
            metavar="COSINE",
            help="Of pictures nearer than this to each other, as 0.95, keep one.",
            show_default=False,
        ),
    ] = None,
    query_list: Annotated[
        str,
        typer.Option("--queries", metavar="FILE", help="Answer every row of a list: txt, csv, jsonl, parquet or npy."),
    ] = "",
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="With --queries: where the answers go; default: workspace.")
    ] = "",
    address: RayAddress = "",
    html: Annotated[str, typer.Option("--html", metavar="FILE", help="Write a contact sheet: one HTML page.")] = "",
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Find the nearest pairs to a text, a picture, a vector or another pair, or to a mixture of them.

    Example: unclip search configs/demo.toml "a blue circle" -k 10 --html sheet.html
    """
    kinds = {"text": texts, "image": images, "embedding": embeddings, "uid": uids}
    things = [(kind, value) for kind, values in kinds.items() for value in values or []]
    if query_list:
        if things or weights or html:
            raise ConfigError("search: --queries takes no text, --image, --embedding, --uid, --weights or --html")
        _search_many(
            load_recipe(recipe, overrides or []),
            query_list,
            (num_results, modality, where, distinct),
            out,
            address,
            json=json,
        )
        return (f"unclip serve {recipe_words(recipe, overrides)}",)
    if not things:
        raise ConfigError(
            "search: give a text, --image FILE, --embedding FILE or --uid UID, "
            'for example: unclip search RECIPE "a blue circle"'
        )
    factors = _parse_weights(weights, len(things))
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.retrieve.queries import Query
    from pipeline.retrieve.search import Searcher, SearchOptions

    queries = [Query(kind, value, factor) for (kind, value), factor in zip(things, factors, strict=True)]  # pyright: ignore[reportArgumentType]
    options = SearchOptions(num_results, modality, where, distinct)
    searcher = Searcher.open(resolved)
    results = searcher.search(queries, options)
    problems: Sequence[str] = []
    if html:
        from pipeline.retrieve.sheet import SheetText, write_sheet

        text = SheetText(resolved.name, f"unclip search {recipe_words(recipe, overrides)} --uid")
        problems = write_sheet(Path(html), text, queries, options, results, searcher)
    shortage = results.shortage(num_results)
    if json:
        rows = [dataclasses.asdict(neighbour) for neighbour in results.neighbours]
        print_json({"neighbours": rows, "num_candidates": results.num_candidates, "shortage": shortage})
    else:
        for line in _table(results.neighbours):
            typer.echo(line)
        if html:
            typer.echo(f"contact sheet: {html}")
    for problem in [*([shortage] if shortage else []), *(f"no picture: {problem}" for problem in problems)]:
        typer.echo(problem, err=True)
    words, neighbours = recipe_words(recipe, overrides), results.neighbours
    like_the_first = (f"unclip search {words} --uid {neighbours[0].uid}",) if neighbours else ()
    return (*like_the_first, f"unclip serve {words}")


def _search_many(recipe: Recipe, queries: str, options: Any, out: str, address: str, *, json: bool) -> None:
    from jobs.watch import Watcher
    from pipeline.retrieve.search import SearchOptions
    from pipeline.runtime.search import search_many

    watcher = Watcher()
    try:
        answers, manifest = search_many(recipe, queries, SearchOptions(*options), watcher, out=out, address=address)
    finally:
        watcher.close()
    if json:
        print_json({"answers": answers.uri, **manifest.to_dict()})
        return
    counts = ", ".join(f"{value:,} {name}" for name, value in manifest.counts.items())
    typer.echo(f"{answers.uri}: {counts}")


def _parse_weights(text: str, count: int) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        raise ConfigError(f"--weights {text}: write numbers with commas between them, as 1,-0.5") from None
    if len(weights) != count:
        raise ConfigError(f"--weights {text}: {len(weights)} weights for {count} things to look for")
    return weights


def _table(neighbours: Sequence["Neighbour"]) -> list[str]:
    """Rank, similarity, uid, caption and URL in columns; characters that would disturb a terminal are left out."""
    captions = [_printable(neighbour.caption) for neighbour in neighbours]
    width = min(_CAPTION_COLUMNS, max(map(len, captions), default=0))
    rank_width = len(str(len(neighbours)))
    return [
        f"{rank:{rank_width}}  {one.similarity:.4f}  {one.uid}  {caption:{width}}  {_printable(one.url)}".rstrip()
        for rank, (one, caption) in enumerate(zip(neighbours, captions, strict=True), 1)
    ]


def _printable(text: Any) -> str:
    return "".join(character for character in " ".join(str(text or "").split()) if character.isprintable())
