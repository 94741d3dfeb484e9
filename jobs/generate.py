"""``unclip sample``, ``evaluate`` and ``serve``."""

from json import dumps
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from jobs.options import (
    AsJson,
    Next,
    Overrides,
    RayAddress,
    RecipeOrFolder,
    RecipePath,
    Seed,
    print_json,
    print_next,
    print_warning,
    recipe_words,
)
from jobs.watch import SamplingWatcher
from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.steps import CASCADE_STEPS


def sample(
    recipe: RecipeOrFolder,
    prompts: Annotated[list[str] | None, typer.Argument(metavar='"PROMPT"', help="What the pictures show.")] = None,
    prompts_path: Annotated[str, typer.Option("--prompts", help="Text file of prompts, one a line.")] = "",
    num_images: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt.")] = 4,
    seed: Seed = 0,
    out: Annotated[
        str,
        typer.Option(
            "--out", help="Folder for the pictures, grid.png and samples.jsonl; those of before are replaced."
        ),
    ] = "out",
    candidates: Annotated[
        int,
        typer.Option(
            "--candidates", min=0, help="Sample this many of each and keep the -n nearest by CLIP; 0: sample -n."
        ),
    ] = 0,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="STEP@NUMBER",
            help="Take a network in training from a checkpoint: decoder@40000, decoder@last. Upsamplers that wait are "
            "left out.",
        ),
    ] = None,
    overrides: Overrides = None,
    json: AsJson = False,
) -> Next:
    """Sample pictures from prompts with the trained cascade.

    Example: unclip sample configs/demo.toml "a large red star on a white background" -n 4 --out out
    """
    texts = list(prompts or [])
    if prompts_path:
        try:
            lines = Path(prompts_path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {prompts_path}: cannot be read: {error}") from None
        texts += [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError('sample: give at least one prompt, for example: unclip sample RECIPE "a red circle"')
    resolved = load_recipe(recipe, overrides or [])

    from pipeline.sampling.at import note_on_left_out
    from pipeline.sampling.sample import sample_recipe

    if note := note_on_left_out(resolved, at or []):
        print_warning(note)
    with SamplingWatcher() as watcher:
        rows = sample_recipe(
            resolved,
            texts,
            num_images=num_images,
            seed=seed,
            out_dir=Path(out),
            num_candidates=candidates,
            at=at or [],
            watch=watcher,
        )
    if json:
        print_json(rows)
        return ()
    count = "1 picture" if len(rows) == 1 else f"{len(rows)} pictures"
    typer.echo(f"{count} in {out}; all at a glance: {Path(out) / 'grid.png'}")
    words = recipe_words(recipe, overrides)
    lineage = f"unclip lineage {quote(str(Path(out) / rows[0]['file']))} --workspace {quote(resolved.workspace)}"
    sections = [getattr(resolved, name) for name in CASCADE_STEPS]
    is_traced = any(section is not None and not section.finished_network for section in sections)
    return (*((lineage,) if is_traced else ()), f"unclip serve {words}")


def evaluate(recipe: RecipePath, overrides: Overrides = None, address: RayAddress = "", json: AsJson = False) -> Next:
    """Measure the trained cascade; its unfinished inputs run first.

    Example: unclip evaluate configs/demo.toml
    """
    from jobs.watch import Watcher
    from pipeline.recipe.plan import artifact_of, make_plan
    from pipeline.recipe.status import plan_status
    from pipeline.runtime.run import run_recipe
    from pipeline.workspace.store import Workspace

    resolved = load_recipe(recipe, overrides or [])
    workspace, steps = Workspace(resolved.workspace), make_plan(resolved, until="evaluate")
    statuses = plan_status(workspace, steps)
    words = recipe_words(recipe, overrides)
    watcher = Watcher(statuses, recipe=words)
    try:
        run_recipe(resolved, statuses, watcher, address=address)
    finally:
        watcher.close()
    artifact = artifact_of(workspace, steps[-1])
    metrics = artifact.read_json("metrics.json")
    from pipeline.report.report import format_metrics, update_report

    report = update_report(workspace, make_plan(resolved), resolved, words)
    if json:
        print_json(metrics)
        return ()
    typer.echo(format_metrics(metrics))
    typer.echo(f"pictures: {artifact.uri}")
    typer.echo(f"report: {report}")
    return (
        f'unclip sample {words} "your prompt" --out out',
        f"unclip serve {words}",
        f"unclip export {words} --native FOLDER",
    )


def serve(
    recipe: RecipeOrFolder,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; default: serve.host.")] = "",
    port: Annotated[
        int, typer.Option("--port", help="Port to listen on; default: serve.port.", show_default=False)
    ] = 0,
    name: Annotated[str, typer.Option("--name", help="Name of the model and of this server on its cluster.")] = "",
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Print a file for Ray Serve's own `serve deploy`, and end.")
    ] = False,
    manifest: Annotated[
        str, typer.Option("--manifest", metavar="IMAGE", help="Print a KubeRay RayService with this image, and end.")
    ] = "",
    overrides: Overrides = None,
    address: RayAddress = "",
) -> Next:
    """Serve pictures (OpenAI's image API), neighbours (clip-retrieval's API) and a page, until Ctrl-C.

    Example: unclip serve configs/demo.toml --port 8000
    """
    changes = [
        f"serve.{key}={dumps(value)}" for key, value in {"host": host, "port": port, "name": name}.items() if value
    ]

    def load() -> Recipe:
        return load_recipe(recipe, [*(overrides or []), *changes])

    def note(line: str) -> None:
        typer.echo(line, err=True)  # the file is written to standard output

    if manifest:
        from pipeline.runtime.kuberay import ray_service

        typer.echo(ray_service(load(), manifest, note), nl=False)
        return ("kubectl apply -f FILE", "kubectl get rayservices")
    if config_only:
        from pipeline.runtime.serve_file import serve_file

        typer.echo(serve_file(load(), note), nl=False)
        return ("serve deploy FILE", "serve status")

    from pipeline.runtime.kept_ray import KeptRay
    from pipeline.serve.keeper import keep
    from pipeline.serve.keys import read_keys

    served, words = load(), recipe_words(recipe, overrides)
    is_here = served.serve.mode == "process"
    if is_here and address:
        raise ConfigError('--address: serve.mode = "process" uses no Ray; with "replica" the networks run on a cluster')
    if served.serve.keys:
        read_keys(Path(served.serve.keys))  # a mistake ends this command, and no server that is started again
    own_ray = None if address or is_here else KeptRay(typer.echo, has_spare=served.serve.spare)
    kept = keep(served.serve, typer.echo, own_ray and own_ray.hold)
    from pipeline.serve.http_server import url_of

    def propose() -> None:
        print_next(f"curl {url_of(served.serve.host, served.serve.port)}/readyz", "unclip keys add keys.json NAME")

    if is_here:
        from pipeline.runtime.serve_here import serve_here

        serve_here(served, reload=load, on_ready=propose, kept=kept)
    else:
        from pipeline.runtime.serve import serve_recipe

        serve_recipe(served, address=address, reload=load, on_ready=propose, kept=kept, own_ray=own_ray)
    return (f"unclip serve {words}", f"unclip status {words}")
